// The page: a picture and a question in, two answers side by side out.
import { Trouble, about, answer, useKey } from "./api.js";
import { chart, counts, paint, read } from "./picture.js";

const $ = (id) => document.getElementById(id);
const KiB = 1024, MiB = 1024 * KiB;
let server = null, picture = null, asking = null, warm = new Set();
let kept = null, shown = null; // of the latest trimmed answer: what was kept, and its picture

// The reader's picture ------------------------------------------------------------------------

async function take(blob) {
  say("");
  try {
    const got = await read(blob, server ? server.max_image_bytes : 10 * MiB);
    picture = got;
    if ($("preview").src.startsWith("blob:")) URL.revokeObjectURL($("preview").src);
    $("preview").src = URL.createObjectURL(blob);
    $("preview").hidden = false;
    $("preview").alt = "Your picture";
    $("drop-text").textContent = `${got.note}. Press to choose another.`;
  } catch (error) {
    fail(error);
  }
}

function choose(sample, button) {
  for (const other of $("samples").children) other.setAttribute("aria-pressed", String(other === button));
  return fetch(`page/samples/${sample}`).then((got) => got.blob()).then(take)
    .catch(() => fail(new Trouble("The server cannot be reached. Is it still running?")));
}

function watchPictures() {
  const drop = $("drop");
  $("file").addEventListener("change", () => {
    if ($("file").files.length) take($("file").files[0]);
    unpress();
    $("file").value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const files = [...event.dataTransfer.files];
    unpress();
    if (files.length) take(files[0]);
    else fail(new Trouble("That was no file. Save the picture, then drop its file here."));
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) { unpress(); take(file); }
  });
}

function unpress() {
  for (const button of $("samples").children) button.setAttribute("aria-pressed", "false");
}

// What is said ---------------------------------------------------------------------------------

function say(text) {
  $("error").hidden = true;
  $("status").textContent = text;
}

function fail(error) {
  $("status").textContent = "";
  if (error.name === "AbortError") { say("Stopped."); return; }
  $("error").textContent = error.message;
  $("error").hidden = false;
  if (error.askKey) askForKey(true);
}

const seconds = (s) => (s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(s < 10 ? 2 : 1)} s`);
const bytes = (n) => (n < MiB ? `${(n / KiB).toFixed(0)} KiB` : `${(n / MiB).toFixed(n < 100 * MiB ? 1 : 0)} MiB`);
const percent = (share) => `${Math.round(100 * share)} %`;

function fill(card, got, before) {
  const speed = (one) => (one.tokens > 1 ? (one.tokens - 1) / (one.total_s - one.ttft_s) : 0);
  const beside = (text, ratio) => (before && Number.isFinite(ratio) ? `${text} (${percent(ratio)})` : text);
  const seen = got.visual_tokens * got.mean_share;
  const rows = {
    "visual tokens a layer sees, mean": beside(seen.toFixed(0), got.mean_share),
    "first token": beside(seconds(got.ttft_s), before && got.ttft_s / before.ttft_s),
    "tokens per second": speed(got)
      ? beside(speed(got).toFixed(1), before && speed(got) / speed(before)) : "-",
    "tokens of the answer": String(got.tokens),
    "whole answer": seconds(got.total_s),
    "KV cache, at most": beside(bytes(got.kv_bytes), before && got.kv_bytes / before.kv_bytes),
  };
  const list = card.querySelector("dl");
  list.replaceChildren();
  for (const [name, value] of Object.entries(rows)) {
    const [term, what] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    what.textContent = value;
    list.append(term, what);
  }
}

/** The words of the trimmed answer from the first that differs on are marked. */
function compare() {
  const [first, second] = ["untrimmed", "trimmed"].map((id) => $(id).querySelector(".answer"));
  const [a, b] = [first, second].map((one) => one.textContent.split(/(?<=\s)/));
  const at = b.findIndex((word, place) => word.trim() !== (a[place] || "").trim());
  if (at < 0) return a.length === b.length ? "Same answer" : "The trimmed answer ends earlier";
  const mark = document.createElement("mark");
  mark.textContent = b.slice(at).join("");
  second.replaceChildren(b.slice(0, at).join(""), mark);
  return "The answers differ from the mark on";
}

// Asking ---------------------------------------------------------------------------------------

function policy() {
  const name = $("policy").value.trim() || server.policy;
  const budget = $("budget").value;
  return budget && !name.includes("budget=")
    ? `${name}${name.includes(":") ? "," : ":"}budget=${budget}` : name;
}

async function ask() {
  if (!server) { await start(); if (!server) return; }
  const question = $("question").value.trim();
  if (!picture) { fail(new Trouble("Choose a picture first.")); $("file").focus(); return; }
  if (!question) { fail(new Trouble("Write a question first.")); $("question").focus(); return; }
  const longest = Number($("longest").value);
  if (!(Number.isInteger(longest) && longest >= 1 && longest <= server.max_tokens)) {
    fail(new Trouble(`The longest answer is a whole number from 1 to ${server.max_tokens}.`));
    return;
  }
  asking = new AbortController();
  const chosen = policy(), bitmap = picture.bitmap;
  const request = { model: server.model, picture: picture.url, question, longest, signal: asking.signal };
  $("ask").disabled = true;
  $("stop").hidden = false;
  try {
    for (const name of ["none", chosen].filter((one) => !warm.has(one))) {
      say("A run of one token first, so that the times are fair …");
      await answer({ ...request, policy: name, longest: 1 });
      warm.add(name);
    }
    $("answers").hidden = false;
    $("seen").hidden = true;
    $("verdict").textContent = "";
    for (const id of ["untrimmed", "trimmed"]) {
      $(id).querySelector(".answer").textContent = "";
      $(id).querySelector("dl").replaceChildren();
    }
    $("trimmed").querySelector("h2").textContent = `Trimmed: ${chosen}`;
    say("Answering with all visual tokens …");
    const before = await one("untrimmed", { ...request, policy: "none" });
    say("Answering trimmed …");
    const after = await one("trimmed", { ...request, policy: chosen }, before, (what) => {
      kept = what;
      shown = bitmap;
      look();
    });
    $("verdict").textContent = `${compare()}. The trimmed one took ${percent(after.mean_share)} of the ` +
      `visual tokens and ${percent(after.kv_bytes / before.kv_bytes)} of the KV cache.`;
    say("Done.");
  } catch (error) {
    fail(error);
  } finally {
    asking = null;
    $("ask").disabled = false;
    $("stop").hidden = true;
  }
}

async function one(id, request, before, onKept) {
  const text = $(id).querySelector(".answer");
  text.classList.add("busy");
  try {
    const got = await answer(request, { text: (piece) => text.append(piece), kept: onKept });
    fill($(id), got, before);
    return got;
  } finally {
    text.classList.remove("busy");
  }
}

// What each layer sees -------------------------------------------------------------------------

function look() {
  const numbers = counts(kept);
  $("seen").hidden = !kept.seen_by.length;
  $("unplaced").hidden = Boolean(kept.places);
  $("unplaced").textContent = kept.places ? "" : `No picture: ${kept.unplaced}.`;
  $("canvas").hidden = !kept.places;
  $("layer").max = kept.layers - 1;
  $("layer").value = kept.layers - 1;
  chart($("chart"), numbers);
  show();
}

function show() {
  const layer = Number($("layer").value), numbers = counts(kept);
  const text = `${numbers[layer]} of ${kept.seen_by.length} visual tokens`;
  $("layer-name").textContent = `${layer} (0 to ${kept.layers - 1})`;
  $("layer").setAttribute("aria-valuetext", `layer ${layer}: ${text}`);
  $("layer-text").textContent = `Layer ${layer} sees ${text}.`;
  $("chart").querySelectorAll("rect").forEach((bar, at) => bar.classList.toggle("now", at === layer));
  if (!kept.places) return;
  paint($("canvas"), shown, kept, layer);
  $("canvas").setAttribute("aria-label", `Your picture as layer ${layer} sees it: ${text}`);
}

// The start ------------------------------------------------------------------------------------

function askForKey(again) {
  if (again) $("key-text").textContent = "The server did not take that key. Try again.";
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

async function start(again = false) {
  try {
    server = await about();
  } catch (error) {
    if (error.askKey) askForKey(again);
    else fail(error);
    return;
  }
  $("model").textContent = server.model;
  $("policy").value = $("policy").value || server.policy;
  $("longest").max = server.max_tokens;
  if (Number($("longest").value) > server.max_tokens) $("longest").value = server.max_tokens;
  $("question").value = $("question").value || server.questions[0];
  $("policies").replaceChildren(...server.policies.map((name) => new Option(name)));
  $("questions").replaceChildren(...server.questions.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => { $("question").value = text; });
    return button;
  }));
  $("samples").hidden = $("small").hidden = !server.samples.length;
  $("samples").replaceChildren(...server.samples.map((name, number) => {
    const image = Object.assign(new Image(), { src: `page/samples/${name}`, alt: `Sample ${number + 1}` });
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-pressed", "false");
    button.append(image);
    button.addEventListener("click", () => choose(name, button));
    return button;
  }));
  if (server.samples.length && !picture) {
    await choose(server.samples[0], $("samples").firstElementChild);
    say("This small model knows drawn scenes only: of photographs it says nonsense.");
  }
}

watchPictures();
$("form").addEventListener("submit", (event) => { event.preventDefault(); if (!asking) ask(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!asking) ask();
  }
});
$("stop").addEventListener("click", () => asking && asking.abort());
$("layer").addEventListener("input", show);
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key-dialog").close();
  $("error").hidden = true;
  await start(true);
});
start().finally(() => { document.documentElement.dataset.ready = "true"; });
