// Small plots over time, drawn as SVG.

import { element } from "./transcript.js";

const WIDTH = 300;
const HEIGHT = 80;
const SPAN = 300; // seconds that are shown

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A line over the last minutes; what has no value yet leaves a gap. */
export class Plot {
  points = [];

  /** `write(value)` gives a value with its unit. */
  constructor(title, write) {
    this.title = title;
    this.write = write;
    this.box = element("figure", "plot");
    this.value = element("b");
    const caption = element("figcaption", "", title);
    caption.append(this.value);
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" });
    this.scale = element("span", "scale");
    this.box.append(caption, this.drawing, this.scale);
  }

  /** Add a value, or null, at a time in seconds. */
  add(time, value) {
    this.points.push({ time, value });
    while (this.points[0].time < time - SPAN) this.points.shift();
    this.draw(time);
  }

  draw(now) {
    const known = this.points.filter(({ value }) => value !== null);
    const last = known.at(-1);
    const most = Math.max(...known.map(({ value }) => value), 1e-9);
    this.value.textContent = last ? this.write(last.value) : "–";
    this.scale.textContent = last ? `highest ${this.write(most)}` : "nothing yet";
    this.drawing.setAttribute("aria-label", `${this.title}: ${this.value.textContent}; ${this.scale.textContent}`);
    const x = (time) => (WIDTH * (1 - (now - time) / SPAN)).toFixed(1);
    const y = (value) => (HEIGHT - 3 - (value / most) * (HEIGHT - 8)).toFixed(1);
    const path = known.map(({ time, value }, i) => `${i ? "L" : "M"}${x(time)} ${y(value)}h0.1`).join("");
    this.drawing.replaceChildren(
      svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT - 2, y2: HEIGHT - 2 }),
      svg("path", { class: "area", d: last ? `${path}V${HEIGHT - 2}H${x(known[0].time)}Z` : "" }),
      svg("path", { class: "line", d: path }),
    );
  }
}
