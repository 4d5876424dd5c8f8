// The chat screen: messages with files, answered by text that streams, and speech.

import { Attachments } from "./attachments.js";
import { call, explain } from "./server.js";
import { fromBase64, openPlayer, secure, toWav } from "./sound.js";
import { Transcript, element } from "./transcript.js";

const $ = (id) => document.getElementById(id);

export class Chat {
  messages = [];
  count = 0;

  constructor(page) {
    this.page = page;
    this.log = new Transcript($("chat-log"));
    this.attachments = new Attachments($("attached"));
    $("chat-form").onsubmit = (event) => {
      event.preventDefault();
      this.send();
    };
    $("message").onkeydown = (event) => {
      const typed = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (!typed || !matchMedia("(pointer: fine)").matches) return;
      event.preventDefault();
      this.send();
    };
    $("message").onpaste = ({ clipboardData }) => this.add(clipboardData.files);
    $("files").onchange = async () => {
      await this.add($("files").files);
      $("files").value = "";
    };
    $("chat-stop").onclick = () => this.stop();
    $("chat-clear").onclick = () => {
      this.stop();
      this.messages = [];
      this.log.clear();
      $("message").focus();
    };
  }

  async add(files) {
    for (const file of [...files]) {
      await this.attachments.add(file).catch((error) => this.page.notice(error));
    }
  }

  stop() {
    this.aborting?.abort();
    this.player?.stop();
    this.busy({ playing: false });
  }

  /** What is under way: it can be stopped. */
  busy(change) {
    Object.assign(this, change);
    $("send").disabled = Boolean(this.aborting);
    $("chat-stop").hidden = !this.aborting && !this.playing;
  }

  async send() {
    const text = $("message").value.trim();
    if (this.aborting || (!text && !this.attachments.files.length)) return;
    this.page.notice(null);
    const aborting = new AbortController();
    this.busy({ aborting });
    $("message").value = "";
    const before = this.messages.length;
    const { files } = this.attachments;
    const id = ++this.count;
    try {
      this.ask(`question-${id}`, text, await this.attachments.take());
      await this.answer(`reply-${id}`, aborting.signal);
    } catch (error) {
      const reply = this.log.get(`reply-${id}`);
      if (!reply?.text) this.messages.length = before; // it was not answered
      reply?.note(error.name === "AbortError" ? "stopped" : "failed");
      if (error.name !== "AbortError") this.unsend(id, text, files, error);
    } finally {
      this.log.get(`reply-${id}`)?.done();
      this.busy({ aborting: null });
    }
  }

  /** Something failed: what was not answered can be sent again. */
  unsend(id, text, files, error) {
    this.page.notice(error);
    if (this.log.get(`reply-${id}`)?.text) return;
    this.log.remove(`question-${id}`);
    this.log.remove(`reply-${id}`);
    $("message").value = text;
    this.attachments.replace(files);
  }

  ask(id, text, files) {
    const turn = this.log.turn(id, "user");
    turn.write(text);
    for (const { preview } of files) turn.attach(preview);
    turn.done();
    const parts = files.map(({ part }) => part);
    if (text) parts.push({ type: "text", text });
    this.messages.push({ role: "user", content: parts });
  }

  async answer(id, signal) {
    const speak = $("aloud").checked && this.page.model.modalities.includes("audio");
    const player = speak && secure() ? await openPlayer() : null;
    const turn = this.log.turn(id, "model");
    turn.placeholder("thinking…");
    const response = await call("v1/chat/completions", { body: this.body(speak), signal });
    const pieces = [];
    const reply = { role: "assistant", content: "" };
    this.messages.push(reply);
    await player?.stop();
    player?.begin(id, { drained: () => this.busy({ playing: false }) });
    this.busy({ player, playing: Boolean(player) });
    try {
      for await (const { content, audio } of deltas(response.body)) {
        if (content) turn.append(content);
        reply.content = turn.text;
        if (!audio?.data) continue;
        const samples = fromBase64(audio.data);
        pieces.push(samples);
        player?.push(id, samples.slice());
      }
    } finally {
      player?.finish(id);
      if (pieces.length) turn.attach(replay(toWav(pieces), !player));
    }
    turn.placeholder("nothing");
  }

  body(speak) {
    const { voice, instructions } = this.page.settings();
    const system = instructions ? [{ role: "system", content: instructions }] : [];
    const spoken = { modalities: ["text", "audio"], audio: { format: "pcm16", ...(voice && { voice }) } };
    return { messages: [...system, ...this.messages], stream: true, ...(speak && spoken) };
  }
}

/** Controls to hear a reply again; where there is no player, it begins by itself. */
function replay(wav, autoplay) {
  const audio = element("audio");
  audio.controls = true;
  audio.autoplay = autoplay;
  audio.src = URL.createObjectURL(wav);
  return audio;
}

/** The deltas of a stream of events. Throws Told for an error in it. */
async function* deltas(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue; // empty, a comment, or [DONE]
      const event = JSON.parse(line.slice(6));
      if (event.error) throw explain(0, event.error);
      if (event.choices.length) yield event.choices[0].delta;
    }
    if (done) return;
  }
}
