const { tokens, order, visible, shares, places, pictures } = data;
const layers = order.length, count = data.n_visual;
const attention = Uint8Array.from(atob(data.attention), (c) => c.charCodeAt(0));
// Place of each token in its layer's order of importance: it is visible while that is below the
// layer's count.
const ranks = order.map((kept) => {
  const rank = new Int32Array(count).fill(count);
  kept.forEach((token, place) => { rank[token] = place; });
  return rank;
});
let layer = -1, pass = 0, chosen = null, pinned = null; // layer -1: all; chosen: a word or null

// Words: runs of tokens up to the next that starts with a space.
const words = [];
tokens.forEach((text, token) => {
  if (!words.length || /^\s/.test(text)) words.push({ text: "", tokens: [] });
  words[words.length - 1].text += text;
  words[words.length - 1].tokens.push(token);
});

function look(token) {
  const given = attention.subarray(token * count, (token + 1) * count);
  const brightness = new Float32Array(count);
  const asked = layer < 0 ? ranks.keys() : [layer];
  const share = layer < 0 ? 1 / layers : 1;
  for (const index of asked) {
    const rank = ranks[index], limit = visible[token][index];
    for (let i = 0; i < count; i += 1) if (rank[i] < limit) brightness[i] += share;
  }
  return { given, brightness };
}

const panels = (places ? pictures : [null]).map((picture, number) => {
  const canvas = make("canvas", { role: "img" });
  const caption = make("figcaption", {}, "");
  const name = !places ? "visual tokens in their order" :
    pictures.length > 1 ? `picture ${number + 1}` : "image";
  $("pictures").append(make("figure", {}, canvas, caption));
  return { canvas, caption, name, picture, image: null, number,
    own: places ? places.flatMap((p, i) => (p[0] === number ? [i] : [])) : [...ranks[0].keys()] };
});

function paint(panel, seen) {
  const { canvas, image } = panel;
  const paper = canvas.getContext("2d");
  const [wide, high] = [canvas.width, canvas.height];
  const columns = Math.min(count, 48);
  const cell = wide / columns;
  const box = (i) => places ? [places[i][1] * wide, places[i][2] * high, places[i][3] * wide,
    places[i][4] * high] : [(i % columns) * cell, Math.floor(i / columns) * cell,
    (i % columns + 1) * cell - 2, (Math.floor(i / columns) + 1) * cell - 2];
  paper.globalAlpha = 1;
  paper.clearRect(0, 0, wide, high);
  if (image) paper.drawImage(image, 0, 0, wide, high);
  paper.fillStyle = "rgba(64, 64, 64, 0.8)";
  if (image) paper.fillRect(0, 0, wide, high);
  let shown = 0;
  const placed = panel.own.filter((i) => !places || places[i].length > 1);
  for (const i of placed) {
    const [x, y, right, bottom] = box(i).map(Math.round);
    const [w, h] = [Math.max(1, right - x), Math.max(1, bottom - y)];
    if (seen.brightness[i] > 0) shown += 1;
    paper.globalAlpha = Math.min(1, seen.brightness[i]);
    if (image) {
      const [sx, sy] = [image.naturalWidth / wide, image.naturalHeight / high];
      if (seen.brightness[i] > 0) paper.drawImage(image, x * sx, y * sy, w * sx, h * sy, x, y, w, h);
    } else {
      paper.globalAlpha = 0.15 + 0.85 * paper.globalAlpha;
      paper.fillStyle = "#8c8c8c";
      paper.fillRect(x, y, w, h);
    }
  }
  if (chosen !== null && $("glow").checked) {
    paper.fillStyle = $("glow-colour").value;
    for (const i of placed) {
      if (!(seen.brightness[i] > 0)) continue;
      const [x, y, right, bottom] = box(i).map(Math.round);
      paper.globalAlpha = 0.75 * seen.given[i] / 255;
      paper.fillRect(x, y, Math.max(1, right - x), Math.max(1, bottom - y));
    }
  }
  const nowhere = panel.own.length - placed.length;
  const note = nowhere ? `; ${nowhere} tokens for line ends or padding have no place` : "";
  const mean = placed.reduce((sum, i) => sum + seen.brightness[i], 0);
  panel.caption.textContent = layer < 0
    ? `${panel.name}: ${mean.toFixed(1)} of ${placed.length} visual tokens visible, mean over the layers; ` +
      `the more layers see a patch, the brighter it is${note}`
    : `${panel.name}: ${shown} of ${placed.length} visual tokens visible${note}`;
  canvas.setAttribute("aria-label", panel.caption.textContent);
}

function draw() {
  const seen = look(pass);
  panels.forEach((panel) => paint(panel, seen));
  const name = layer < 0 ? "mean over the layers" : `layer ${layer}`;
  $("layer-name").textContent = layer < 0 ? "all layers" : `${layer} of 0 to ${layers - 1}`;
  $("layer").setAttribute("aria-valuetext", name);
  const mean = visible[pass].reduce((a, b) => a + b, 0) / layers;
  const number = layer < 0 ? `${mean.toFixed(1)} of ${count} visual tokens visible`
    : `${visible[pass][layer]} of ${count} visual tokens visible`;
  $("state").textContent = chosen === null
    ? `Prefill, ${name}: ${number}.`
    : `Word “${words[chosen].text.trim()}” (token ${pass + 1} of ${tokens.length}), ${name}: ` +
      `${number}; ${percent(shares[pass], 1)} of its attention was on the image.`;
  spans.forEach((span, index) => span.setAttribute("aria-pressed", String(index === chosen)));
  drawByLayer();
  drawKV();
}

function choose(word) {
  chosen = word;
  pass = word === null ? 0 : words[word].tokens[0];
  draw();
}

const most = Math.max(...shares, 1e-9);
const spans = words.map((word, index) => {
  const span = make("span", { class: "word", role: "button", tabindex: "0", "aria-pressed": "false",
    style: `--look: ${(shares[word.tokens[0]] / most).toFixed(2)}` }, word.text.trim() || "␣");
  span.addEventListener("mouseenter", () => choose(index));
  span.addEventListener("mouseleave", () => choose(pinned));
  span.addEventListener("focus", () => choose(index));
  span.addEventListener("click", () => { pinned = index; choose(index); });
  span.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") { pinned = index; choose(index); }
    else if (step && spans[index + step]) spans[index + step].focus();
    else if (event.key === "Escape") { pinned = null; choose(null); }
    else return;
    event.preventDefault();
  });
  $("answer").append(span, " ");
  return span;
});
$("layer").max = layers;
$("layer").addEventListener("input", (event) => { layer = Number(event.target.value) - 1; draw(); });
$("release").addEventListener("click", () => { pinned = null; choose(null); });
for (const id of ["glow", "glow-colour"]) $(id).addEventListener("input", draw);

/** Round numbers from 0 to at most ``top``: 1, 2 or 5 times a power of ten, or powers of two. */
function ticks(top, base = 10) {
  let step = base ** Math.floor(Math.log(Math.max(top, 1e-9) / 3) / Math.log(base));
  for (const times of base === 10 ? [1, 2, 5, 10] : [1, 2, 4]) {
    if (top / (step * times) <= 5) { step *= times; break; }
  }
  if (base === 10 && Number.isInteger(top)) step = Math.max(1, step);
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => i * step);
}

/** A chart of lines: { title, unit, x label, lines: [{ name, color, dash, points }], mark }. */
function chart(home, { label, yLabel, xLabel, top, last, lines, mark, steps, binary }) {
  // As wide as the page has room for, in its own pixels: the letters keep their size on a phone.
  const [wide, high, left, low] = [Math.max(280, Math.min(760, home.clientWidth || 760)), 240, 78, 42];
  const x = (v) => left + (v / Math.max(last, 1)) * (wide - left - 16);
  const y = (v) => high - low - (v / Math.max(top, 1e-9)) * (high - low - 26);
  const svg = make("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": label });
  for (const value of ticks(top, binary ? 2 : 10)) {
    svg.append(make("line", { x1: left, x2: wide - 16, y1: y(value), y2: y(value),
      stroke: "currentColor", "stroke-opacity": 0.2 }));
    svg.append(make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, yLabel(value)));
  }
  for (const value of ticks(last)) {
    svg.append(make("text", { x: x(value), y: high - low + 18, "text-anchor": "middle" }, value));
  }
  svg.append(make("text", { x: (left + wide) / 2, y: high - 4, "text-anchor": "middle" }, xLabel));
  if (mark !== null) {
    svg.append(make("line", { x1: x(mark), x2: x(mark), y1: 20, y2: high - low, class: "mark",
      stroke: "var(--mark)", "stroke-width": 2 }));
  }
  let along = left;
  const legend = lines.reduce((sum, { name }) => sum + 50 + 7 * name.length, 0);
  if (left + legend > wide) along = 4;
  for (const { name, color, dash, points } of lines) {
    const path = points.map(([a, b], i) => {
      const level = y(b).toFixed(1);
      if (!steps) return `${i ? "L" : "M"}${x(a).toFixed(1)} ${level}`;
      return i ? `H${x(a).toFixed(1)}V${level}` : `M${x(a).toFixed(1)} ${level}`;
    });
    if (steps) path.push(`H${x(last).toFixed(1)}`);
    svg.append(make("path", { d: path.join(""), fill: "none", stroke: color, "stroke-width": 2.5,
      "stroke-dasharray": dash || "none" }));
    svg.append(make("line", { x1: along, x2: along + 26, y1: 10, y2: 10, stroke: color,
      "stroke-width": 2.5, "stroke-dasharray": dash || "none" }));
    svg.append(make("text", { x: along + 32, y: 14 }, name));
    along += 50 + 7 * name.length;
  }
  home.replaceChildren(svg);
}

function drawByLayer() {
  const line = (counts) => counts.map((value, index) => [index, value]);
  chart($("by-layer"), {
    label: "Visual tokens that each layer sees", yLabel: (v) => String(Math.round(v)),
    xLabel: "decoder layer", top: count, last: layers, mark: layer < 0 ? null : layer, steps: true,
    lines: [{ name: "prefill", color: "var(--policy)", points: line(visible[0]) },
      ...(chosen === null ? [] : [{ name: "the chosen word", color: "var(--mark)", dash: "6 4",
        points: line(visible[pass]) }])],
  });
}

function drawKV() {
  if (!data.kv.length) {
    $("kv").textContent = "Nothing was trimmed: the cache is the model's own.";
    return;
  }
  const points = (key) => data.kv.map((sample) => [sample.step, sample[key]]);
  chart($("kv"), {
    label: "Bytes of the KV cache over the decode steps", yLabel: (v) => scaled(v, "B"),
    xLabel: "decode step", binary: true, last: data.kv[data.kv.length - 1].step,
    top: Math.max(...data.kv.map((s) => Math.max(s.untrimmed, s.allocated))),
    mark: chosen === null ? null : pass,
    lines: [{ name: "untrimmed", color: "var(--grey)", points: points("untrimmed") },
      { name: "allocated", color: "var(--policy)", dash: "3 3", points: points("allocated") },
      { name: "in use", color: "var(--policy)", points: points("live") }],
  });
}

document.documentElement.style.setProperty("--own", data.color || "#0072b2");
fillTerms($("about"), { Model: data.about.model, Policy: data.about.policy,
  Prompt: data.about.prompt, Conditions: data.about.conditions,
  Places: places ? "" : data.unplaced });
$("costs").append(make("tr", {}, ...["", "untrimmed", "trimmed", "ratio"].map((t) =>
  make("th", { scope: "col" }, t))));
for (const { name, unit, untrimmed, trimmed } of data.costs) {
  $("costs").append(make("tr", {}, make("th", { scope: "row" }, name),
    make("td", {}, scaled(untrimmed, unit)), make("td", {}, scaled(trimmed, unit)),
    make("td", {}, untrimmed && trimmed !== null ? percent(trimmed / untrimmed) : "")));
}

document.querySelector(".split").classList.toggle("many", panels.length > 2);
const room = Math.min(560, document.body.clientWidth - 40);
const narrow = panels.length > 2 ? 260 : panels.length > 1 ? 400 : 520;
panels.forEach((panel) => {
  if (!panel.picture) {
    const columns = Math.min(count, 48);
    panel.canvas.width = columns * 20;
    panel.canvas.height = Math.ceil(count / columns) * 20;
    return;
  }
  panel.image = new Image();
  panel.image.onload = () => {
    const ratio = panel.image.naturalHeight / panel.image.naturalWidth;
    const wide = Math.min(narrow, room, ratio > 1 ? narrow / ratio : narrow);
    panel.canvas.width = Math.round(wide);
    panel.canvas.height = Math.round(wide * ratio);
    draw();
  };
  panel.image.src = panel.picture;
});
if (data.about.untrimmed) {
  $("untrimmed").hidden = false;
  $("untrimmed-answer").textContent = data.about.untrimmed;
}
addEventListener("resize", () => { drawByLayer(); drawKV(); });
draw();
document.documentElement.dataset.ready = "true";
