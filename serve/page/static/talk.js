// The talk screen: a spoken conversation over the Realtime protocol.

import { Camera } from "./camera.js";
import { Levels } from "./levels.js";
import { Realtime, explained } from "./realtime.js";
import { Microphone, fromBase64, openPlayer, toBase64 } from "./sound.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const DETECTION = { type: "server_vad", create_response: true, interrupt_response: true };
const TAP = 300; // ms: a shorter press of the button is a tap
const TELL = 500; // ms of playing after which the server is told how much was played

export class Talk {
  /** `page`: {notice(error), settings(), model}. */
  constructor(page) {
    this.page = page;
    this.log = new Transcript($("talk-log"));
    this.levels = new Levels($("levels"));
    $("talk-start").onclick = () => (this.running ? this.connecting || this.stop() : this.start());
    $("camera").onchange = () => this.switchCamera();
    for (const radio of document.querySelectorAll("[name=mode]")) radio.onchange = () => this.switchMode();
    this.watchButton($("push"));
  }

  get handsFree() {
    return document.querySelector("[name=mode]:checked").value === "free";
  }

  // -- beginning and end

  async start() {
    this.running = this.connecting = true;
    this.page.notice(null);
    this.show("Connecting…");
    this.setStart("Stop");
    try {
      this.player = await openPlayer().catch(() => null); // without a secure page the microphone says why
      this.microphone = await Microphone.open((samples, level) => this.hear(samples, level));
      await this.player?.stop();
      const { voice, instructions } = this.page.settings();
      const session = {
        instructions,
        audio: { input: { transcription: { model: "omniport" } }, output: voice ? { voice } : {} },
      };
      this.server = await Realtime.open(session, {
        take: (event) => this.take(event),
        lost: () => this.lost(),
        ended: (told) => this.stop(told),
      });
      if (!this.running) this.stop(); // stopped meanwhile
    } catch (error) {
      this.stop(error);
    } finally {
      this.connecting = false;
    }
  }

  /** Another screen is shown: nothing listens or looks unseen. */
  leave() {
    if (this.running) this.stop();
    $("camera").checked = false;
    this.switchCamera();
  }

  stop(error = null) {
    this.running = this.pressed = this.speaking = false;
    this.server?.close();
    this.microphone?.close();
    this.player?.stop();
    this.server = this.microphone = this.player = this.open = null;
    this.levels.clear();
    this.setStart("Start");
    this.setButton(false);
    $("push").disabled = true;
    this.show("Press Start, and speak.");
    if (error) this.page.notice(error);
  }

  /** The connection, and not the conversation: the server has stopped the reply, and tells later what was heard of it. */
  lost() {
    this.speaking = false;
    this.player?.stop();
    this.silenced = this.playing ?? this.silenced;
    this.playing = this.open = null;
    this.setButton(false);
    $("push").disabled = true;
    this.show("The connection was lost. Connecting again…");
  }

  ready(session) {
    const canDetect = session.audio.input.turn_detection !== null;
    const free = document.querySelector("[name=mode][value=free]");
    free.disabled = !canDetect;
    if (!canDetect && free.checked) {
      document.querySelector("[name=mode][value=push]").checked = true;
      this.page.notice("This server cannot hear when you begin and end (it lacks the extra “live”): press to talk.");
    }
    this.switchMode();
  }

  switchMode() {
    const { handsFree } = this;
    $("push").hidden = $("push-help").hidden = handsFree;
    $("push").disabled = !this.server;
    if (!this.server) return;
    this.release(false);
    this.speaking = false;
    this.server.send("session.update", {
      session: { type: "realtime", audio: { input: { turn_detection: handsFree ? DETECTION : null } } },
    });
    this.listening();
  }

  // -- what is sent

  hear(samples, level) {
    const sent = this.server && (this.handsFree || this.pressed);
    if (!this.playing || level > 0.02) this.levels.add(sent ? level : 0, "user");
    if (sent) this.server.send("input_audio_buffer.append", { audio: toBase64(samples) });
  }

  async switchCamera() {
    this.camera?.close();
    this.camera = null;
    if (!$("camera").checked) return;
    const show = (image) => {
      if (this.speaking || this.pressed) this.server?.send("input_image_buffer.append", { image });
    };
    try {
      this.camera = await Camera.open($("camera-view"), show);
    } catch (error) {
      $("camera").checked = false;
      this.page.notice(error);
    }
  }

  /** Held, or tapped to begin and tapped again to end; by pointer or by Space and Enter. */
  watchButton(button) {
    const down = () => {
      if (this.latched) return this.release(true);
      this.since = performance.now();
      this.press();
    };
    const up = () => {
      if (!this.pressed || this.latched) return;
      if (performance.now() - this.since < TAP) this.latched = true;
      else this.release(true);
    };
    const keys = new Set([" ", "Enter"]);
    button.onpointerdown = (event) => {
      button.setPointerCapture(event.pointerId);
      down();
    };
    button.onpointerup = button.onpointercancel = up;
    button.oncontextmenu = (event) => event.preventDefault(); // a long press on phones
    button.onkeydown = (event) => {
      if (!keys.has(event.key)) return;
      event.preventDefault();
      if (!event.repeat) down();
    };
    button.onkeyup = (event) => keys.has(event.key) && up();
    button.onblur = () => this.pressed && this.release(true);
  }

  async press() {
    if (!this.server) return;
    this.setButton(true);
    this.show("Speak.");
    this.server.send("input_audio_buffer.clear");
    this.camera?.shoot();
    await this.interrupt();
  }

  /** The end of a turn that is said by hand; `asked`: answer it. */
  release(asked) {
    if (!this.pressed) return;
    this.setButton(false);
    if (!this.server || !asked) return;
    this.server.send("input_audio_buffer.commit");
    this.server.send("response.create");
    this.show("Thinking…");
  }

  setStart(text) {
    $("talk-start").textContent = text;
    $("talk-start").classList.toggle("primary", text === "Start");
  }

  setButton(pressed) {
    this.pressed = pressed;
    this.latched = false;
    $("push").setAttribute("aria-pressed", pressed);
    $("push").textContent = pressed ? "Release to send" : "Hold to talk";
  }

  // -- what comes

  take(event) {
    this.handlers[event.type]?.call(this, event);
  }

  handlers = {
    "session.created"({ session }) {
      this.ready(session);
    },
    "input_audio_buffer.speech_started"({ item_id }) {
      this.interrupt();
      this.speaking = true;
      this.camera?.shoot();
      this.log.turn(item_id, "user").placeholder("listening…");
      this.show("I hear you.");
    },
    "input_audio_buffer.speech_stopped"() {
      this.speaking = false;
      this.show("Thinking…");
    },
    "input_audio_buffer.committed"({ item_id }) {
      const turn = this.log.turn(item_id, "user");
      turn.placeholder("spoken");
      turn.done();
    },
    "conversation.item.input_audio_transcription.completed"({ item_id, transcript }) {
      const turn = this.log.turn(item_id, "user");
      turn.write(transcript);
      turn.placeholder("spoken, no words");
    },
    "conversation.item.input_audio_transcription.failed"({ item_id }) {
      this.log.get(item_id)?.placeholder("spoken, not written down");
    },
    "response.created"({ response }) {
      this.response = response.id;
    },
    "response.output_audio_transcript.delta"(event) {
      this.said(event);
    },
    "response.output_text.delta"(event) {
      this.said(event);
    },
    "response.output_audio.delta"({ item_id, delta }) {
      this.play(item_id, fromBase64(delta));
    },
    "response.output_audio.done"({ item_id }) {
      this.player?.finish(item_id);
    },
    "response.done"({ response }) {
      this.responded(response);
    },
    "conversation.item.truncated"({ item_id }) {
      this.server?.send("conversation.item.retrieve", { item_id });
    },
    "conversation.item.retrieved"({ item }) {
      const text = item.content.map((part) => part.transcript ?? part.text ?? "").join("");
      this.log.get(item.id)?.cut(text);
    },
    error({ error }) {
      if (error.code === "response_cancel_not_active") return; // it had just ended
      if (error.code === "input_audio_buffer_commit_empty") this.show("That was too short. Hold the button while you speak.");
      else this.page.notice(explained(error));
    },
  };

  said({ item_id, delta }) {
    this.open = item_id;
    this.log.turn(item_id, "model").append(delta);
  }

  play(item, samples) {
    if (!this.player || item === this.silenced) return;
    this.open = item;
    if (this.playing !== item) {
      this.playing = item;
      this.told = 0;
      this.player.begin(item, {
        progress: (milliseconds, level) => this.progress(item, milliseconds, level),
        drained: (milliseconds) => this.drained(item, milliseconds),
      });
      this.show("Speaking. Talk to interrupt.");
    }
    this.player.push(item, samples);
  }

  progress(item, milliseconds, level) {
    this.levels.add(level, "model");
    if (milliseconds - this.told < TELL) return;
    this.told = milliseconds;
    this.server?.send("omniport.playback", { item_id: item, played_ms: milliseconds });
  }

  drained(item, milliseconds) {
    this.server?.send("omniport.playback", { item_id: item, played_ms: milliseconds });
    this.playing = null;
    this.listening();
  }

  /** The user speaks: be silent at once, and tell the server how much of the reply was played. */
  async interrupt() {
    const open = this.open;
    const stopped = await this.player?.stop();
    this.playing = this.open = null;
    const item = stopped?.item ?? open;
    if (item) {
      this.silenced = item;
      const fields = { item_id: item, content_index: 0, audio_end_ms: stopped?.milliseconds ?? 0 };
      this.server?.send("conversation.item.truncate", fields);
    } else if (this.response && !this.handsFree) {
      this.server?.send("response.cancel");
    }
  }

  responded(response) {
    this.response = this.open = null;
    for (const item of response.output) this.describe(item, response);
    if (response.status === "failed") this.page.notice(explained(response.status_details?.error ?? {}));
    if (!this.playing) this.listening();
  }

  describe(item, { status, omniport }) {
    const turn = this.log.get(item.id);
    if (!turn) return;
    turn.done();
    if (status === "completed" && omniport?.time_to_first_audio) {
      turn.note(`first sound after ${omniport.time_to_first_audio.toFixed(2)} s`);
    } else if (status === "incomplete") {
      turn.note("ended: the limit of its length");
    }
  }

  listening() {
    if (this.server && !this.pressed && !this.speaking) this.show(this.handsFree ? "Listening." : "Hold the button, and speak.");
  }

  show(text) {
    $("talk-state").textContent = text;
  }
}
