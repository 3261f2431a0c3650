// Asking the server: one chat completion, streamed; and its errors in plain words.

let key = "";

export function useKey(given) { key = given.trim(); }

/** What went wrong, for the reader. askKey: a key is missing or wrong. */
export class Trouble extends Error {
  constructor(message, askKey = false) { super(message); this.askKey = askKey; }
}

const WORDS = {
  401: "The server did not take the key.",
  408: "The picture did not reach the server in time. Try a smaller one.",
  413: "The picture is too large for this server. Try a smaller one.",
  429: "The server is busy. Try again in a moment.",
  503: "The server is shutting down, or out of memory. Try again later.",
  504: "The answer took too long. Ask for a shorter one, or try again later.",
};

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw trouble(response.status, body.error);
}

function trouble(status, error) {
  const reason = error && error.message ? `${error.message[0].toUpperCase()}${error.message.slice(1)}.` : "";
  const words = WORDS[status] || reason || `The server answered with status ${status}.`;
  return new Trouble(words.replace(/\.\.$/, "."), status === 401);
}

export async function about() { return (await call("page/about")).json(); }

/**
 * One answer. Calls on.text(piece) as it comes and on.kept(what each layer saw) once.
 * Returns { tokens, ...the facts under st3 in the response }.
 */
export async function answer({ model, picture, question, policy, longest, signal }, on = {}) {
  const content = [
    { type: "image_url", image_url: { url: picture } },
    { type: "text", text: question },
  ];
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model, messages: [{ role: "user", content }], max_tokens: longest, temperature: 0,
      stream: true, stream_options: { include_usage: true },
      st3: { policy, ...(on.kept ? { kept: true } : {}) },
    }),
    signal,
  });
  let facts = null, tokens = 0;
  for await (const event of events(response.body)) {
    if (event.error) throw trouble(event.error.code === "timeout" ? 504 : 0, event.error);
    if (event.usage) tokens = event.usage.completion_tokens;
    const text = event.choices?.[0]?.delta?.content;
    if (text && on.text) on.text(text);
    if (event.st3?.kept) { if (on.kept) on.kept(event.st3.kept); } else if (event.st3) facts = event.st3;
  }
  if (!facts) throw new Trouble("The server broke off its answer.");
  return { tokens, ...facts };
}

/** The JSON objects of a stream of server-sent events. */
async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let got;
    try {
      got = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The connection to the server broke off.");
    }
    if (got.done) return;
    rest += decoder.decode(got.value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}
