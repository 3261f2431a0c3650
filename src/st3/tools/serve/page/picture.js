// The reader's picture: read, made small enough for the server, and drawn with what a layer sees.

const LONGEST = 2048; // pixels a side; more than any model takes of one picture
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** { url: as the server takes it, bitmap: as it is drawn, note: what was done to it }. */
export async function read(blob, mostBytes) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error("That is no picture that this browser can read. Take a PNG, JPEG or WebP file.");
  }
  const [long, short] = [Math.max(bitmap.width, bitmap.height), Math.min(bitmap.width, bitmap.height)];
  if (long > 200 * short) throw new Error("That picture is too thin: at most 200 times as long as wide.");
  if (KINDS.includes(blob.type) && long <= LONGEST && blob.size <= mostBytes) {
    return { url: await dataURL(blob), bitmap, note: `${bitmap.width} x ${bitmap.height} pixels` };
  }
  const scale = Math.min(1, LONGEST / long);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff"; // what is transparent is shown on white, as the server does
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const smaller = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  const note = `${bitmap.width} x ${bitmap.height} pixels, sent as ${canvas.width} x ${canvas.height}`;
  return { url: await dataURL(smaller), bitmap, note };
}

function dataURL(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The file could not be read."));
    reader.readAsDataURL(blob);
  });
}

/** How many visual tokens each layer saw. */
export function counts(kept) {
  const found = new Array(kept.layers).fill(0);
  for (const reach of kept.seen_by) for (let layer = 0; layer < reach; layer += 1) found[layer] += 1;
  return found;
}

/** Draw the picture: what the layer still sees bright, the rest dim. */
export function paint(canvas, bitmap, kept, layer) {
  const wide = Math.min(960, Math.max(bitmap.width, 480));
  canvas.width = wide;
  canvas.height = Math.max(1, Math.round((wide * bitmap.height) / bitmap.width));
  const pen = canvas.getContext("2d");
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  pen.fillStyle = "rgba(40, 40, 40, 0.82)";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.save();
  pen.beginPath();
  kept.places.forEach((place, token) => {
    if (place.length < 5 || kept.seen_by[token] <= layer) return;
    const [x, y] = [Math.round(place[1] * canvas.width), Math.round(place[2] * canvas.height)];
    pen.rect(x, y, Math.round(place[3] * canvas.width) - x, Math.round(place[4] * canvas.height) - y);
  });
  pen.clip();
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  pen.restore();
}

/** A bar for each layer. */
export function chart(home, numbers) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const set = (element, values) => {
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
  };
  set(svg, { viewBox: `0 0 ${10 * numbers.length} 100`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Visual tokens by layer: ${numbers.join(", ")}` });
  const most = Math.max(1, ...numbers);
  numbers.forEach((number, layer) => {
    const bar = document.createElementNS(space, "rect");
    const high = Math.max(1, (100 * number) / most);
    set(bar, { x: 10 * layer + 1, y: 100 - high, width: 8, height: high });
    svg.append(bar);
  });
  home.replaceChildren(svg);
}
