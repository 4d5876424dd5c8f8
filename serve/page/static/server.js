// The server's HTTP, with the key, and its errors in plain words.

const KEY = "omniport-key";

/** An error whose message is for the user. */
export class Told extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const getKey = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** URL of a path, also where a proxy serves all of it under a folder. */
export const url = (path) => new URL(path, document.baseURI);

/** Ask the server; `body` is sent as JSON. Throws Told for whatever is no success. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (getKey()) headers.authorization = `Bearer ${getKey()}`;
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(url(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told("The server does not answer. Check that omniport serve is running, and that this device reaches it.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw explain(response.status, told?.error ?? {}, Number(response.headers.get("retry-after")));
}

// for errors without a body of ours, as proxies send them
const CODES = { 401: "invalid_api_key", 413: "request_too_large", 429: "session_limit_reached", 503: "not_ready" };

/** What an error means, and what to do about it. */
export function explain(status, { code = CODES[status], message = "" }, seconds = 0) {
  const again = seconds > 1 ? `Try again in ${seconds} seconds.` : "Try again in a moment.";
  const words = {
    invalid_api_key: getKey()
      ? "The server does not take this key. Type another one in Settings."
      : "This server wants a key. Type it in Settings.",
    origin_not_allowed: `The server refuses this page: ${message}.`,
    host_not_allowed: `The server refuses this page: ${message}.`,
    request_too_large: `That is too large: ${message || "send less at once"}.`,
    session_limit_reached: `The server is busy: all its places are taken. ${again}`,
    not_ready: `The server is not ready: it is still loading its model, or about to stop. ${again}`,
    context_length_exceeded: "The conversation is longer than the model can hold. Begin a new one.",
  };
  return new Told(words[code] || message || `The server failed, with status ${status}. Its log tells more.`, status);
}
