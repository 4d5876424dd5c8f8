// The Realtime protocol over a WebSocket.

import { Told, call, explain, getKey, url } from "./server.js";

const CLOSED = {
  1001: "The server has ended the conversation: it stops, or the hour of a conversation is over. Press Start again.",
  1008: "The server has closed the conversation, because this page did not keep up. Press Start again.",
  1009: "The microphone's sound came faster than the server could take it. Press Start again.",
  1013: "The server is busy: all its places are taken. Try again in a moment.",
};
const GONE = 404; // the server answers, but has no place or no session for this WebSocket
const LOST = "The connection was lost. Press Start again.";
const FULL = "The server takes no further conversation now: all its places are in use. Try again in a moment.";

const PAUSE = 500; // ms between attempts to come back

/**
 * A conversation, which goes on over another connection when one is lost. `watch` is told: take(event) of every event,
 * lost() when the connection is, ended(Told) of the end, unless `close` brought it.
 */
export class Realtime {
  static async open(session, watch) {
    const made = new Realtime();
    made.watch = watch;
    await made.connect({});
    made.send("session.update", { session: { type: "realtime", ...session } });
    return made;
  }

  async connect(query) {
    const address = url("v1/realtime");
    address.protocol = address.protocol.replace("http", "ws");
    for (const name in query) address.searchParams.set(name, query[name]);
    const socket = new WebSocket(address, await protocols());
    await new Promise((resolve, reject) => {
      socket.onopen = resolve;
      socket.onclose = () => reasonOfRefusal().then(reject, reject);
    });
    this.socket = socket;
    if (this.closed) return this.close();
    socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    socket.onclose = ({ code }) => (this.token && !CLOSED[code] ? this.resume() : this.end(CLOSED[code]));
  }

  take(event) {
    if (event.type === "session.created") {
      ({ resume_token: this.token, resume_seconds: this.seconds } = event.session.omniport);
    }
    if (!event.type.endsWith(".delta")) this.last = event.event_id;
    this.watch.take(event);
  }

  /** Try to take the session up for as long as the server keeps it. */
  async resume() {
    this.watch.lost();
    const until = performance.now() + this.seconds * 1000;
    for (let refused = 0; !this.closed && refused < 2 && performance.now() < until; ) {
      try {
        return await this.connect({ resume: this.token, after: this.last });
      } catch (error) {
        if (error.status === GONE) refused++; // once may be chance: the network had just come back
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
    this.end();
  }

  end(words = LOST) {
    if (!this.closed) this.watch.ended(new Told(words));
  }

  send(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  close() {
    this.closed = true;
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close(1000); // the server need not keep the session
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
  return new Told(realtime.free ? LOST : FULL, GONE);
}

/** What an error event says, in words. */
export const explained = (error) => explain(0, error);
