const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with attributes and children (text or elements). */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "circle"].includes(name);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** A number with a prefix: bytes in powers of 1024, others in powers of 1000. */
function scaled(value, unit) {
  if (value === null || value === undefined) return "-";
  const step = unit === "B" ? 1024 : 1000;
  const prefixes = unit === "B" ? ["", "Ki", "Mi", "Gi", "Ti"] : ["", "K", "M", "G", "T", "P"];
  if (unit === "tokens") return value.toFixed(value % 1 ? 1 : 0);
  if (unit === "ms") return value.toFixed(1) + " ms";
  let power = 0;
  while (Math.abs(value) >= step && power < prefixes.length - 1) { value /= step; power += 1; }
  return `${Number(value.toPrecision(3))} ${prefixes[power]}${unit}`;
}

const percent = (share, digits = 0) => (100 * share).toFixed(digits) + " %";

/** A list of terms and what they are. */
function fillTerms(list, terms) {
  for (const [term, value] of Object.entries(terms)) {
    if (value) list.append(make("dt", {}, term), make("dd", {}, value));
  }
}
