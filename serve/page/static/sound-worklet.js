// What runs in the audio thread: the microphone's sound on its way out, the reply's on its way in. Both have 24 kHz.

const RATE = 24000;
const FRAME = RATE / 25; // samples of one message
const START = RATE / 10; // samples with which playing begins, and goes on after a gap
const REPORT = RATE / 20;

/** Root mean square of the first n samples. */
function level(samples, n) {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += samples[i] * samples[i];
  return Math.sqrt(sum / Math.max(1, n));
}

/** Sends the microphone's sound in frames. A context of another rate is brought to ours by averages over time. */
class Capture extends AudioWorkletProcessor {
  frame = new Float32Array(FRAME);
  filled = 0;
  step = sampleRate / RATE; // input samples for one of ours
  sum = 0;
  covered = 0;

  process([[channel]]) {
    for (const sample of channel ?? []) {
      let left = 1;
      while (left > 1e-9) {
        const part = Math.min(left, this.step - this.covered);
        this.sum += sample * part;
        this.covered += part;
        left -= part;
        if (this.covered > this.step - 1e-9) {
          this.emit(this.sum / this.step);
          this.sum = this.covered = 0;
        }
      }
    }
    return true;
  }

  emit(sample) {
    this.frame[this.filled++] = sample;
    if (this.filled < FRAME) return;
    this.filled = 0;
    const samples = Int16Array.from(this.frame, (value) => Math.max(-1, Math.min(1, value)) * 32767);
    this.port.postMessage({ samples, level: level(this.frame, FRAME) }, [samples.buffer]);
  }
}

/** Plays one reply at a time from a ring buffer, and counts what it has played. */
class Playback extends AudioWorkletProcessor {
  ring = new Float32Array(RATE * 8);
  item = null;

  constructor() {
    super();
    this.reset(null);
    this.port.onmessage = ({ data }) => this[data.action](data);
  }

  reset(item) {
    this.item = item;
    this.read = this.held = this.played = this.reported = 0;
    this.complete = this.running = false;
  }

  begin({ item }) {
    this.reset(item);
  }

  push({ item, samples }) {
    if (item !== this.item) return; // of a reply that was stopped
    while (this.held + samples.length > this.ring.length) this.grow();
    for (let i = 0; i < samples.length; i++) {
      this.ring[(this.read + this.held + i) % this.ring.length] = samples[i] / 32768;
    }
    this.held += samples.length;
  }

  finish({ item }) {
    if (item === this.item) this.complete = true;
  }

  stop({ ticket }) {
    this.port.postMessage({ event: "stopped", ticket, item: this.item, played: this.played });
    this.reset(null);
  }

  grow() {
    const larger = new Float32Array(this.ring.length * 2);
    for (let i = 0; i < this.held; i++) larger[i] = this.ring[(this.read + i) % this.ring.length];
    this.ring = larger;
    this.read = 0;
  }

  process(_, [[out]]) {
    if (this.held >= START || this.complete) this.running = true;
    const n = this.running ? Math.min(out.length, this.held) : 0;
    for (let i = 0; i < n; i++) out[i] = this.ring[(this.read + i) % this.ring.length];
    this.read = (this.read + n) % this.ring.length;
    this.held -= n;
    this.played += n;
    if (n < out.length) this.running = false;
    if (this.item !== null) this.report(out, n);
    return true;
  }

  report(out, n) {
    const drained = this.complete && this.held === 0;
    if (!drained && this.played - this.reported < REPORT) return;
    this.reported = this.played;
    const event = drained ? "drained" : "progress";
    this.port.postMessage({ event, item: this.item, played: this.played, level: level(out, n) });
    if (drained) this.reset(null);
  }
}

registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
