// Sound in and out: the microphone, the loudspeaker, and 16-bit samples as base64.

import { Told, url } from "./server.js";

const RATE = 24000;

/** Whether this browser gives sound to this page: it does on https, and on this machine's own name. */
export const secure = () => window.isSecureContext && "AudioWorkletNode" in window;

const INSECURE =
  "Browsers give the microphone and the camera to secure pages only. Open this page by https (omniport serve " +
  "--tls-self-signed), or as http://localhost on the machine that serves it.";

/** The user's microphone or camera. Throws Told, which says what to do. */
export async function openDevice(wanted) {
  if (!window.isSecureContext || !navigator.mediaDevices) throw new Told(INSECURE);
  const name = wanted.video ? "camera" : "microphone";
  try {
    return await navigator.mediaDevices.getUserMedia(wanted);
  } catch (error) {
    const words = {
      NotAllowedError: `This page may not use the ${name}. Allow it in the browser's settings for this site.`,
      NotFoundError: `No ${name} was found. Plug one in, or choose one in the system's settings.`,
      NotReadableError: `The ${name} is in use by another program. Close that program, and try again.`,
    };
    throw new Told(words[error.name] ?? `The ${name} cannot be used: ${error.message}`);
  }
}

async function makeContext(options) {
  const context = new AudioContext({ latencyHint: "interactive", ...options });
  await context.audioWorklet.addModule(url("page/sound-worklet.js"));
  return context;
}

/** Sends frames of 40 ms to `take(samples, level)` until it is closed. */
export class Microphone {
  static async open(take) {
    const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
    const made = new Microphone();
    made.stream = await openDevice({ audio });
    await made.connect(take, { sampleRate: RATE }).catch(() => made.connect(take, {})); // Firefox: the device's own rate
    return made;
  }

  async connect(take, options) {
    this.context = await makeContext(options);
    try {
      const source = this.context.createMediaStreamSource(this.stream);
      const node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
      node.port.onmessage = ({ data }) => take(data.samples, data.level);
      source.connect(node);
      this.source = source; // else it may be collected, and the sound ends
      await this.context.resume();
    } catch (error) {
      await this.context.close();
      throw error;
    }
  }

  close() {
    for (const track of this.stream.getTracks()) track.stop();
    this.context.close();
  }
}

/** Plays replies, one at a time. */
class Player {
  listeners = {};
  stops = new Map();
  tickets = 0;

  static async open() {
    const made = new Player();
    made.context = await makeContext({ sampleRate: RATE });
    made.node = new AudioWorkletNode(made.context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    made.node.port.onmessage = ({ data }) => made.take(data);
    made.node.connect(made.context.destination);
    return made;
  }

  take({ event, ticket, item, played, level }) {
    const milliseconds = this.heard(played);
    if (event === "stopped") {
      this.stops.get(ticket)?.(item === null ? null : { item, milliseconds });
      this.stops.delete(ticket);
    } else if (item === this.item) {
      this.listeners[event]?.(event === "drained" ? played / (RATE / 1000) : milliseconds, level);
      if (event === "drained") this.item = null;
    }
  }

  /** Milliseconds of the samples that were played which have left the loudspeaker. */
  heard(played) {
    return Math.max(0, Math.round(played / (RATE / 1000) - (this.context.outputLatency || 0) * 1000));
  }

  /** What comes next is `item`; `listeners` are progress(milliseconds, level) and drained(milliseconds). */
  begin(item, listeners = {}) {
    this.item = item;
    this.listeners = listeners;
    this.node.port.postMessage({ action: "begin", item });
  }

  push(item, samples) {
    this.node.port.postMessage({ action: "push", item, samples });
  }

  /** All of it was pushed. */
  finish(item) {
    this.node.port.postMessage({ action: "finish", item });
  }

  /** Be silent at once. Gives what was playing, {item, milliseconds}, or null. */
  stop() {
    this.item = null;
    const ticket = ++this.tickets;
    return new Promise((resolve) => {
      this.stops.set(ticket, resolve);
      this.node.port.postMessage({ action: "stop", ticket });
    });
  }
}

let opening = null;

/** The one player; to be called by a click, without which browsers play nothing. */
export async function openPlayer() {
  opening ??= Player.open();
  const player = await opening.catch((error) => {
    opening = null;
    throw error;
  });
  await player.context.resume();
  return player;
}

export function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Int16Array(bytes.buffer, 0, bytes.length >> 1);
}

/** A WAV file of pieces of 16-bit samples. */
export function toWav(pieces) {
  const size = pieces.reduce((sum, piece) => sum + piece.byteLength, 0);
  const head = new DataView(new ArrayBuffer(44));
  const write = (at, text) => [...text].forEach((c, i) => head.setUint8(at + i, c.charCodeAt(0)));
  write(0, "RIFF");
  head.setUint32(4, 36 + size, true);
  write(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true); // PCM
  head.setUint16(22, 1, true); // mono
  head.setUint32(24, RATE, true);
  head.setUint32(28, RATE * 2, true);
  head.setUint16(32, 2, true);
  head.setUint16(34, 16, true);
  write(36, "data");
  head.setUint32(40, size, true);
  return new Blob([head, ...pieces], { type: "audio/wav" });
}
