// The level meter: bars of the last seconds, the user's and the model's.

const BARS = 64;
const FLOOR = -50; // dB that is shown as nothing

/** 0..1 of a root mean square. */
const height = (level) => Math.max(0, 1 - (20 * Math.log10(Math.max(level, 1e-5))) / FLOOR);

export class Levels {
  bars = [];

  constructor(canvas) {
    this.canvas = canvas;
    this.paint = canvas.getContext("2d");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.draw();
  }

  /** Show a level of "user" or "model". */
  add(level, who) {
    this.bars.push({ height: height(level), who });
    if (this.bars.length > BARS) this.bars.shift();
    this.pending ??= requestAnimationFrame(() => this.draw());
  }

  clear() {
    this.bars = [];
    this.draw();
  }

  draw() {
    this.pending = null;
    const { paint, canvas } = this;
    const style = getComputedStyle(canvas);
    const step = canvas.width / BARS;
    paint.clearRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < BARS; i++) {
      const bar = this.bars[this.bars.length - BARS + i] ?? { height: 0, who: "none" };
      paint.fillStyle = style.getPropertyValue(`--${bar.who}-bar`);
      const tall = Math.max(4, bar.height * canvas.height);
      paint.fillRect(i * step + step * 0.2, (canvas.height - tall) / 2, step * 0.6, tall);
    }
  }
}
