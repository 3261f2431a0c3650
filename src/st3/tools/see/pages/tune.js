const evidence = data.evidence, pick = data.outcome === "pick";
const shown = evidence.finalists.find((one) => one.verdict === "the pick");
const atCost = (one) => (one.cost ? one.cost[data.cost_of] : null);
const kept = (seen) => (seen ? percent(seen.kept, 1) : "-");

$("title").textContent = document.title;
$("verdict").textContent = pick ? `Use ${shown.name}` : "Stay untrimmed";
$("policy").textContent = data.policy;
$("summary").textContent = data.summary;
$("copy").addEventListener("click", () => {
  const done = () => { $("copy").textContent = "Copied"; };
  if (navigator.clipboard) navigator.clipboard.writeText(data.policy).then(done, () => {});
});
if (pick) {
  const saved = { total_ratio: "whole answer", first_ratio: "first token", kv_ratio: "KV read" };
  const tiles = [[kept(shown.confirm), `of the ${evidence.counted} kept`],
    [percent(shown.at_least, 1), `at least, with ${percent(shown.certainty)} certainty`],
    ...Object.entries(saved).map(([key, name]) =>
      [percent(shown.cost[key]), `${name}, of untrimmed`]),
    [percent(shown.mean_share), "of the visual tokens, mean over layers"]];
  for (const [value, name] of tiles) {
    $("figures").append(make("div", {}, make("dd", {}, value), make("dt", {}, name)));
  }
}

/** The picture, as wide as there is room for, so that its text keeps its size. */
function plot() {
  const home = $("plot"), wide = Math.max(280, home.clientWidth), narrow = wide < 560;
  const high = narrow ? 300 : 380, left = 46, low = 42, goal = data.goal.kept;
  const timed = evidence.finalists.filter((one) => one.cost);
  const seen = timed.flatMap((one) => [one.search, one.confirm].filter(Boolean).map((q) => q.kept));
  const bottom = Math.max(0, Math.floor(20 * Math.min(goal - 0.08, ...seen)) / 20);
  const top = Math.max(1.01, ...seen) + 0.015;
  const right = Math.max(1.05, ...timed.map(atCost)) + 0.02;
  const from = Math.max(0, Math.floor(10 * Math.min(...timed.map(atCost)) - 1) / 10);
  const x = (value) => left + (wide - left - 12) * (value - from) / (right - from);
  const y = (value) => 12 + (high - low - 12) * (top - value) / (top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img",
    "aria-label": `${evidence.counted} kept against cost; the numbers stand in the table below` });
  const text = (value, where) => svg.append(make("text", where, value));
  const hint = (element, words) => {
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = words;
    element.append(title);
    svg.append(element);
  };
  const every = top - bottom > 0.45 ? 0.1 : 0.05;
  for (let value = Math.ceil(bottom / every) * every; value <= top; value += every) {
    svg.append(make("line", { x1: left, x2: wide - 12, y1: y(value), y2: y(value), class: "rule" }));
    text(percent(value), { x: left - 6, y: y(value) + 4, "text-anchor": "end" });
  }
  const step = right - from > 0.6 ? 0.2 : 0.1;
  for (let value = Math.ceil(from / step - 1e-6) * step; value <= right; value += step) {
    text(percent(value), { x: x(value), y: high - low + 18, "text-anchor": "middle" });
  }
  text(data.axis, { x: (left + wide) / 2, y: high - 6, "text-anchor": "middle" });
  svg.append(make("line", { x1: left, x2: wide - 12, y1: y(goal), y2: y(goal), class: "goal" }));
  text(`goal ${percent(goal)}`, { x: left + 6, y: y(goal) + 15, class: "goal-name" });
  hint(make("circle", { cx: x(1), cy: y(1), r: 5, class: "untrimmed" }), "untrimmed");
  text("untrimmed", { x: Math.min(x(1), wide - 36), y: y(1) - 9, "text-anchor": "middle" });
  for (const one of timed) {
    const across = x(atCost(one)), style = `--own: ${data.colors[one.policy]}`;
    const words = `${one.name}: ${kept(one.search)} searching, ${kept(one.confirm)} confirming, ` +
      `${percent(atCost(one))} of the cost`;
    if (one.confirm) {
      svg.append(make("line", { x1: across, x2: across, y1: y(one.confirm.kept),
        y2: y(Math.max(bottom, one.at_least)), class: "certain", style }));
      hint(make("circle", { cx: across, cy: y(one.confirm.kept), r: one === shown ? 8 : 5.5,
        class: one === shown ? "dot picked" : "dot", style }), words);
    } else if (one.search) {
      hint(make("circle", { cx: across, cy: y(one.search.kept), r: 4.5, class: "hollow", style }),
        words);
    }
  }
  if (shown) {
    const at = Math.min(Math.max(x(atCost(shown)), left + 50), wide - 110);
    text(shown.name, { x: at, y: y(shown.confirm.kept) - 14, class: "name",
      "text-anchor": "middle" });
  }
  home.replaceChildren(svg);
}
plot();
addEventListener("resize", plot);
$("legend").textContent = "Full: on the half that nothing was chosen on, with a line down to what " +
  "is certain. Hollow: a finalist on the searching half. Further left saves more.";

function fill(table, head, rows) {
  table.append(
    make("thead", {}, make("tr", {}, ...head.map((t) => make("th", { scope: "col" }, t)))),
    make("tbody", {}, ...rows.map(({ cells, cls }) => make("tr", cls ? { class: cls } : {},
      ...cells.map((cell, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, cell))))));
}
fill($("finalists"),
  ["policy", "kept", "at least", "first token", "whole answer", "KV read", "verdict"],
  evidence.finalists.map((one) => ({
    cls: one === shown ? "picked" : "",
    cells: [make("span", {}, make("span", { class: "swatch", "aria-hidden": "true",
      style: `--own: ${data.colors[one.policy]}` }), one.name), one.confirm ? kept(one.confirm) : `(${kept(one.search)})`,
      one.at_least === null ? "-" : percent(one.at_least, 1),
      ...["first_ratio", "total_ratio", "kv_ratio"].map((key) =>
        (one.cost ? percent(one.cost[key]) : "-")), one.verdict],
  })));
$("notes").textContent = "In brackets: on the searching half only. " + data.table_notes;

const families = new Map();
for (const one of evidence.candidates.filter((trial) => trial.rejected)) {
  const family = one.policy.split(":")[0];
  families.set(family, [...(families.get(family) ?? []), one]);
}
for (const [family, trials] of families) {
  $("rejected").append(make("details", {},
    make("summary", {}, `${family} (${trials.length})`),
    make("ul", {}, ...trials.map((one) => make("li", {}, `${one.name}: ${one.rejected}`)),
      ...Object.entries(evidence.narrowed).filter(([name]) => name.split(":")[0] === family)
        .map(([name, why]) => make("li", {}, `${name}: ${why}`)))));
}
if (Object.keys(evidence.refused).length) {
  $("rejected").append(make("details", {}, make("summary", {}, "not for this model"),
    make("ul", {}, ...Object.entries(evidence.refused).map(([name, why]) =>
      make("li", {}, `${name}: ${why}`)))));
}
fillTerms($("about"), { Model: data.conditions.model, Data: `${data.conditions.data}: ` +
    `${evidence.items.search} items to search on, ${evidence.items.confirm} to confirm on`,
  "Held against": evidence.held_against, Candidates: String(evidence.candidates.length),
  Took: `${data.conditions.seconds.toFixed(0)} s`, Conditions: data.conditions_in_words,
  Command: data.conditions.command });
document.documentElement.dataset.ready = "true";
