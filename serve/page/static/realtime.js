// The Realtime protocol over a WebSocket.

import { Told, call, explain, getKey, url } from "./server.js";

const CLOSED = {
  1001: "The server has ended the conversation: it stops, or the hour of a conversation is over. Press Start again.",
  1008: "The server has closed the conversation, because this page did not keep up. Press Start again.",
  1009: "The microphone's sound came faster than the server could take it. Press Start again.",
  1013: "The server is busy: all its places are taken. Try again in a moment.",
};
const LOST = "The connection was lost. Press Start again.";
const FULL = "The server takes no further conversation now: all its places are in use. Try again in a moment.";

/** An open connection. `take(event)` gets every event, `ended(Told)` its end, unless `close` brought it. */
export class Realtime {
  static async open(session, take, ended) {
    const made = new Realtime();
    const address = url("v1/realtime");
    address.protocol = address.protocol.replace("http", "ws");
    made.socket = new WebSocket(address, await protocols());
    made.socket.onmessage = ({ data }) => take(JSON.parse(data));
    await new Promise((resolve, reject) => {
      made.socket.onopen = resolve;
      made.socket.onclose = () => reasonOfRefusal().then(reject, reject);
    });
    made.socket.onclose = ({ code }) => ended(new Told(CLOSED[code] ?? LOST));
    made.send("session.update", { session: { type: "realtime", ...session } });
    return made;
  }

  send(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  close() {
    this.socket.onclose = null;
    this.socket.onmessage = null;
    this.socket.close();
  }
}

/** WebSockets send no headers: a key goes as a subprotocol, one that the server signs for this purpose and a while. */
async function protocols() {
  if (!getKey()) return ["realtime"];
  const secret = await (await call("v1/realtime/client_secrets", { body: { session: { type: "realtime" } } })).json();
  return ["realtime", `openai-insecure-api-key.${secret.value}`];
}

/** A browser does not tell why a WebSocket was refused, so HTTP is asked. */
async function reasonOfRefusal() {
  await call("ready");
  const { realtime } = await (await call("v1/omniport/capacity")).json();
  return new Told(realtime.free ? LOST : FULL);
}

/** What an error event says, in words. */
export const explained = (error) => explain(0, error);
