"""`st3 tune`: how items are cut, how candidates are narrowed down, what is written and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import st3
from st3.methods.policies import NoTrim, parse, plain
from st3.tools.cli import app
from st3.tools.eval.budget import Entry
from st3.tools.eval.data import Dataset, Item, Turn
from st3.tools.eval.store import Record, Store
from st3.tools.tune.candidates import SETTINGS, Candidates, sources
from st3.tools.tune.items import Part, Quality, Questions, questions, read_goal
from st3.tools.tune.search import Search
from st3.tools.tune.tuning import Tuning, items_for
from tests.serving import load
from tests.tiny_llava import LAYERS

COUNT = 10


def write_set(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    for number in range(len(rows)):
        Image.new("RGB", (24, 16), (20 * number % 256, 90, 160)).save(folder / f"{number}.png")
    path = folder / "my.jsonl"
    lines = [{"image": f"{number}.png", **row} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def plain_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions without answers."""
    folder = tmp_path_factory.mktemp("plain")
    return write_set(folder, [{"question": "what is at the top left ?"}] * COUNT)


def tune(data: Path, model: Path, out: Path, *more: object) -> Result:
    words = ["tune", "--data", data, "-m", model, "--out", out, "--max-new-tokens", 4]
    words += ["--for", "memory", "--rounds", 1]
    words += ["--policies", "fastv,divprune", "--budgets", "60%,30%"]
    return CliRunner().invoke(app, [str(word) for word in [*words, *more]])


# Items ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["98% of answers", "98%", " 0.98 ", "98 % of the answers"])
def test_goals(text: str) -> None:
    assert read_goal(text) == pytest.approx(0.98)


@pytest.mark.parametrize("text", ["", "98", "all", "0", "0%", "101%", "98% of tokens", "-5%"])
def test_goals_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no share: write 98%"):
        read_goal(text)


def test_halves_share_no_image(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": f"q{n}", "answer": "a"} for n in range(12)]
    rows[3]["image"] = ["3.png", "7.png"]  # ties item 7 to item 3
    rows[7]["image"] = "7.png"
    rows[8]["image"] = "0.png"
    given = questions(write_set(tmp_path, rows))
    seen = [{image for item in half for image in item.images} for half in halves(given)]
    assert not seen[0] & seen[1]
    assert sorted(map(len, halves(given))) in ([5, 7], [6, 6])
    assert {item.number for half in halves(given) for item in half} == set(range(12))
    assert given.labelled
    assert given.unit == "right answers"
    again = questions(tmp_path / "my.jsonl")
    assert halves(again) == halves(given)
    assert halves(questions(tmp_path / "my.jsonl", seed=1)) != halves(given)


def halves(given: Questions) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    return given.search, given.confirm


def test_every_beginning_of_a_half_has_all_kinds() -> None:
    given = questions(None)
    assert len(given.search) == len(given.confirm) == 20
    for half in halves(given):
        assert {item.kind for item in half[:4]} == {"questions", "descriptions"}
    assert given.labelled


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    path = write_set(tmp_path, [{"question": "what"}] * 20)
    given = questions(path, limit=10)
    assert sorted(item.number for item in given.data.items) == list(range(0, 20, 2))


def test_items_without_answers_are_held_against_the_untrimmed_ones(tmp_path: Path) -> None:
    rows = [{"question": "what", "answer": "a"}] * 7 + [{"question": "what"}]
    given = questions(write_set(tmp_path, rows))
    assert not given.labelled
    assert given.unit == "next tokens"
    assert given.notes == [
        "1 of 8 items have no answer: all are held against the untrimmed answers"
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "what"}] * 7, "has 7 items: give at least 8"),
        ([{"question": "what", "image": "0.png"}] * 9, "too few images"),
        ([{"answer": "yes"}] * 9, 'line 1: a line needs "question"'),
    ],
)
def test_sets_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        questions(write_set(tmp_path, rows))


# Quality ----------------------------------------------------------------------------------------


def of(kept: Sequence[float], whole: float = 1.0, fault: float = 1.0) -> Quality:
    parts = tuple(Part(k, whole, fault, f"{n}.png") for n, k in enumerate(kept))
    return Quality(sum(kept) / (whole * len(kept)), 0.0, parts)


def test_nothing_lost_is_no_certainty() -> None:
    twenty = of([1.0] * 20).lower()
    assert 0.8 < twenty < 0.9  # 0.05 ** (1 / 20) is 0.861
    assert of([1.0] * 19 + [0.0]).lower() < twenty < of([1.0] * 80).lower() < 1
    tokens = of([40.0] * 20, whole=40.0, fault=1 / 40).lower()
    assert 0.98 < tokens < 1  # one more token, not one more answer
    assert of([1.0] * 20).lower(0.99) < twenty
    assert items_for(0.98) == 149
    assert items_for(1.0) is None


def test_gains_make_up_for_losses() -> None:
    parts = (Part(1, 0, 1, "a"), Part(0, 1, 1, "b"), *(Part(1, 1, 1, f"{n}") for n in range(8)))
    found = Quality(9 / 9, 0.0, parts)
    assert found.lower() < 0.9


# Search -----------------------------------------------------------------------------------------


class Asked:
    """Answers as policies of made-up quality give them: kept tokens of 100, by name and budget."""

    def __init__(self, kept: dict[str, float]) -> None:
        self.kept = kept
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, entries: Sequence[Entry], items: Sequence[Item]) -> list[Record]:
        self.calls.append(([entry.title for entry in entries], len(items)))
        untrimmed = Entry(NoTrim(), source="none")
        return [self.record(e, item) for item in items for e in (untrimmed, *entries)]

    def record(self, entry: Entry, item: Item) -> Record:
        name, share = entry.source.partition(":")[0], entry.budget or 0.37
        lost = 0.0 if name == "none" else (1 - self.kept.get(name, 0.5)) * (1 - share)
        agree = round(100 * (1 - lost))
        return Record(
            item.task, item.number, entry.label, ["a"], [True], 100, agree, agree, lost, 1.0,
            share, share, share,
        )  # fmt: skip


def searched(kept: dict[str, float], count: int = 20, goal: float = 0.95) -> tuple[Search, Any]:
    items = tuple(Item(n, "questions", (Path(f"{n}.png"),), (Turn("what"),)) for n in range(count))
    given = Questions(Dataset(Path("x"), items, {}), items, items, labelled=False)
    candidates = Candidates.__new__(Candidates)
    candidates.layers, candidates.policies = 32, sources(["all"])
    candidates.refused = []
    candidates.untrimmed = Entry(NoTrim(), source="none")
    candidates.default = Entry(parse("balanced"), None, source="balanced")
    asked = Asked(kept)
    search = Search(given, candidates, asked, goal, "end-to-end", (0.7, 0.5, 0.35, 0.25, 0.15))
    return search, asked


def test_many_on_few_items_then_few_on_many() -> None:
    search, asked = searched({"balanced": 0.97, "grid": 0.96, "scope": 0.99})
    found = search.run()
    assert search.sizes == (4, 10, 20)
    at = {size: sum(len(names) for names, n in asked.calls if n == size) for size in search.sizes}
    assert at[4] > 2.5 * at[10] > 6 * at[20]
    assert at[4] == len(search.trials)
    tried = sum(len(names) * n for names, n in asked.calls)
    assert tried < 0.35 * 20 * len(search.candidates.policies) * 5  # of asking all of them all
    assert {trial.quality.items for trial in found} == {20}
    meets = [trial for trial in found if trial.quality.kept >= search.goal]
    cheapest = min(meets, key=lambda trial: trial.counted)
    assert cheapest.entry.title == "scope at 15%"


def test_every_rejected_candidate_has_its_reason() -> None:
    search, _ = searched({"balanced": 0.97, "grid": 0.96, "scope": 0.99}, goal=0.98)
    finalists = {trial.entry.label for trial in search.run()}
    for label, trial in search.trials.items():
        assert bool(trial.reason) != (label in finalists), label
    reasons = " ".join(trial.reason for trial in search.trials.values())
    for part in ("out of reach", "is at least as good at no more cost"):
        assert part in reasons
    assert any("not tried below 70%" in why for why in search.narrowed.values())
    assert "balanced" not in search.narrowed
    assert "random" not in search.narrowed


def test_all_methods_and_the_baselines_are_candidates() -> None:
    names = {policy.name for policy in sources()}
    assert names == set(st3.available()) - {"none", "evs", "vidcom2"}
    assert {str(parse(text)) for text in SETTINGS} <= set(map(str, sources()))
    assert list(map(str, sources(["dart"]))) == ["thirds", "random", "grid", "dart"]
    with pytest.raises(ValueError, match="unknown policy"):
        sources(["magic"])


def test_policies_that_a_model_cannot_have_are_told(tiny_model: Path) -> None:
    model, _ = load(tiny_model)
    found = Candidates(model, LAYERS, [parse("fastv"), parse("fastv:layer=99")])
    assert [name for name, _ in found.refused] == ["fastv:layer=99"]
    assert [e.title for e in found.at(0.5, ["fastv", "fastv:layer=99"])] == ["fastv at 50%"]
    assert found.at(0.1, ["fastv"]) == []  # its first layers alone are more


# The command ------------------------------------------------------------------------------------


def test_it_writes_a_policy_that_every_command_reads(
    plain_set: Path, tiny_model: Path, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "policy.json"
    result = tune(plain_set, tiny_model, out, "--goal", "1%")
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data["outcome"] == "pick"
    assert data["model"] == {"name": tiny_model.name, "type": "llava", "layers": LAYERS}
    policy = parse(str(out))
    assert str(plain(policy)) == data["policy"]
    model, _ = load(tiny_model)
    assert st3.trim(model, str(out)).schedule.mean_share < 0.4  # the cheapest there was
    shown = CliRunner().invoke(
        app, ["generate", str(picture), "-p", "what", "-m", str(tiny_model), "--policy", str(out),
              "--json", "--max-new-tokens", "2"],
    )  # fmt: skip
    assert json.loads(shown.stdout)["policy"] == data["policy"]
    evidence = data["evidence"]
    assert evidence["items"] == {"search": 5, "confirm": 5}
    picked = [one for one in evidence["finalists"] if one["verdict"] == "the pick"]
    assert [one["policy"] for one in picked] == [data["policy"]]
    assert picked[0]["confirm"]["kept"] >= picked[0]["at_least"] > 0
    assert 0 < picked[0]["cost"]["kv_ratio"] < 1
    names = {one["name"].partition(" at")[0] for one in evidence["finalists"] if one["confirm"]}
    assert {"thirds", "random", "grid"} <= names
    assert data["conditions"]["seconds"] > 0
    assert data["summary"] in result.stdout
    assert data["summary"] in (tmp_path / "policy.md").read_text()
    page = (tmp_path / "policy.html").read_text()
    assert "https://" not in page
    assert data["summary"] in page


def test_nothing_meets_the_goal(plain_set: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    result = tune(plain_set, tiny_model, out, "--goal", "100%", "--sure")
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert (data["outcome"], data["policy"]) == ("untrimmed", "none")
    assert data["summary"].startswith(
        "Untrimmed: nothing is certain to keep 100% of the next tokens"
    )
    assert "Nearest: " in data["summary"]
    assert plain(parse(str(out))) == NoTrim()
    assert '"outcome":"untrimmed"' in (tmp_path / "policy.html").read_text()


def test_a_finished_run_is_not_asked_again(
    plain_set: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "policy.json"
    assert tune(plain_set, tiny_model, out, "--goal", "1%").exit_code == 0
    first, items = json.loads(out.read_text()), (tmp_path / "policy.run/items.jsonl").read_text()
    assert tune(plain_set, tiny_model, out, "--goal", "1%").exit_code == 0
    second = json.loads(out.read_text())
    said = json.loads(tune(plain_set, tiny_model, out, "--goal", "1%", "--json").stdout)
    assert (said["policy"], said["outcome"]) == (first["policy"], "pick")
    assert (tmp_path / "policy.run/items.jsonl").read_text() == items
    assert second["evidence"] == first["evidence"]
    other = tune(plain_set, tiny_model, out, "--max-new-tokens", 5)
    assert other.exit_code == 1
    assert "holds results with another max_new_tokens" in other.stderr


def test_a_killed_run_goes_on(plain_set: Path, tiny_model: Path, tmp_path: Path) -> None:
    model, processor = load(tiny_model)
    given = questions(plain_set)
    candidates = Candidates(model, LAYERS, sources(["fastv", "divprune"]))
    done: list[int] = []

    def run(folder: Path, limit: int) -> Any:
        def step(what: str, count: int) -> None:
            done.append(count)
            if len(done) > limit:
                raise KeyboardInterrupt

        work = Tuning(
            model, processor, given, candidates, Store(folder, {}), 0.01, "memory", (0.6, 0.3),
            max_new_tokens=3, rounds=1, on_step=step,
        )  # fmt: skip
        return work.run()

    for limit in (3, 9, 1000):
        done.clear()
        try:
            found = run(tmp_path / "a", limit)
        except KeyboardInterrupt:
            assert limit < 1000
    done.clear()
    whole = run(tmp_path / "b", 1000)
    lines = [sorted((tmp_path / name / "items.jsonl").read_text().splitlines()) for name in "ab"]
    keys = [[(row["number"], row["policy"]) for row in map(json.loads, own)] for own in lines]
    assert sorted(keys[0]) == sorted(keys[1])
    assert len(set(keys[0])) == len(keys[0])  # nothing was asked twice
    assert found.pick.entry == whole.pick.entry
    assert found.pick.confirm == whole.pick.confirm


def test_labels_of_which_nothing_is_right(tiny_model: Path, tmp_path: Path) -> None:
    data = write_set(tmp_path, [{"question": "what", "answer": "zebra"}] * COUNT)
    result = tune(data, tiny_model, tmp_path / "policy.json")
    assert result.exit_code == 1
    assert "the untrimmed model answers none of" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--goal", "98"], "goal '98' is no share: write 98%"),
        (["--data", "/nowhere.jsonl"], "no such folder or file"),
        (["--policies", "magic"], "unknown policy 'magic'"),
        (["--budgets", "35"], "budget 35 is no share"),
        (["--budgets", "100%"], "budget 1 is no share to try"),
        (["--limit", "4"], "has 4 items: give at least 8"),
        (["--out", "policy.txt"], "the name must end in .json"),
        (["--out", "/nowhere/policy.json"], "there is no folder '/nowhere'"),
        (["--for", "speed"], "speed"),
    ],
)
def test_wrong_use_is_one_line(
    plain_set: Path, tiny_model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = tune(plain_set, tiny_model, tmp_path / "policy.json", *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_another_model_needs_data(tiny_model: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "-m", str(tiny_model)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --data says on what to tune: a JSONL file")
