"""Metrics of descriptions and answers: by hand, and against pycocoevalcap 1.2's values."""

from __future__ import annotations

import math

import pytest
import torch

from st3.tools.eval import text

TEXTS = [
    "a red car drives along the road",
    "two small cats sleep on a sofa",
    "the dog the dog runs",
]
REFERENCES = [
    ["a red car drives on the road", "there is a car on a road"],
    ["two cats sleep on the sofa"],
    ["a dog runs over the green grass", "the dog runs"],
]
# Of pycocoevalcap 1.2 (CiderScorer, BleuScorer, Rouge) on the above.
CIDER = [3.39619588, 3.72489477, 2.77696226]
BLEU = 0.32629864
ROUGE = [0.85714286, 0.78005115, 0.78540773]


def test_cider_d_is_that_of_pycocoevalcap() -> None:
    assert text.cider_d(TEXTS, REFERENCES) == pytest.approx(CIDER, abs=1e-6)


def test_bleu_4_is_that_of_pycocoevalcap() -> None:
    pairs = zip(TEXTS, REFERENCES, strict=True)
    counts = torch.stack([text.bleu_counts(*pair) for pair in pairs])
    assert float(text.bleu4(counts.sum(0))) == pytest.approx(BLEU, abs=1e-6)


def test_rouge_l_is_that_of_pycocoevalcap() -> None:
    pairs = zip(TEXTS, REFERENCES, strict=True)
    assert [text.rouge_l(*pair) for pair in pairs] == pytest.approx(ROUGE, abs=1e-6)


def test_by_hand() -> None:
    # Two images, one reference each, own words equal to the reference and words found nowhere:
    # every n-gram of the first has idf log 2, all cosines are 1.
    same = "a b c d"
    assert text.cider_d([same, "x y z w"], [[same], ["e f g h"]]) == pytest.approx([10.0, 0.0])
    # Subsequence "a c d" of 3 words: precision 3/4, recall 3/3.
    precision, recall = 3 / 4, 1.0
    wanted = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert text.rouge_l("a b c d", ["a c d"]) == pytest.approx(wanted)
    # 4 of 5 unigrams, 3 of 4 bigrams, 2 of 3, 1 of 2; lengths equal.
    counts = text.bleu_counts("a b c d x", ["a b c d e"])
    wanted = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert float(text.bleu4(counts)) == pytest.approx(wanted)
    # Half as long: the brevity penalty exp(1 - 8 / 4).
    short = text.bleu_counts("a b c d", ["a b c d e f g h"])
    assert float(text.bleu4(short)) == pytest.approx(math.exp(-1))


def test_nothing_said_is_worth_nothing() -> None:
    assert text.cider_d(["", "a b"], [["a b"], ["c d"]])[0] == 0
    assert text.rouge_l("", ["a b"]) == 0
    assert float(text.bleu4(text.bleu_counts("", ["a b c d"]))) == 0


def test_objects_are_found_as_phrases() -> None:
    known = {"cat": "cat", "kitten": "cat", "letter a": "letter a", "car": "car", "red car": "car"}
    said = text.mentioned("A kitten, a red car; the letter A and a cat. Cart!", known)
    assert said == ["cat", "car", "letter a"]
    assert text.mentioned("a letter, a", known) == ["letter a"]  # punctuation is no word
    assert text.mentioned("letter b", known) == []


@pytest.mark.parametrize(
    ("own", "right"),
    [("Cat.", True), ("the cat", True), (" a  CAT!", True), ("cats", False), ("a cat sits", False)],
)
def test_answers(own: str, right: bool) -> None:
    assert text.is_right(own, ["cat", "kitten"]) is right


def test_an_answer_that_is_an_article_counts() -> None:
    assert text.is_right("A", ["a"])
    assert not text.is_right("A", ["b"])
