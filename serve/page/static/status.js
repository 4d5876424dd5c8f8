// The status screen: how much is free, how long replies take, and both over time.

import { Plot } from "./plots.js";
import { call } from "./server.js";
import { element } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const INTERVAL = 2000;

const seconds = (value) => `${value.toFixed(2)} s`;
const factor = (value) => value.toFixed(2);
const whole = (value) => String(Math.round(value));
const mebibytes = (value) => `${Math.round(value / 2 ** 20)} MiB`;

export class Status {
  constructor(page) {
    this.page = page;
    this.plots = {
      first: new Plot("First sound", seconds),
      rate: new Plot("Work for a second of speech", seconds),
      active: new Plot("Replies under way and waiting", whole),
      memory: new Plot("Memory of the server", mebibytes),
    };
    $("plots").append(...Object.values(this.plots).map((plot) => plot.box));
    document.addEventListener("visibilitychange", () => this.watch(this.shown));
  }

  /** Ask every two seconds while the screen is in sight. */
  watch(shown) {
    this.shown = shown;
    clearInterval(this.timer);
    if (!shown || document.hidden) return;
    this.timer = setInterval(() => this.ask(), INTERVAL);
    this.ask();
  }

  async ask() {
    try {
      const [capacity, metrics] = await Promise.all([call("v1/omniport/capacity"), call("metrics")]);
      this.draw(await capacity.json(), parse(await metrics.text()));
      this.page.notice(null, "status");
    } catch (error) {
      if (error.status === 401) clearInterval(this.timer); // until there is a key
      this.page.notice(error, "status");
    }
  }

  draw(capacity, metrics) {
    this.tiles(capacity, metrics);
    this.stages(metrics);
    const now = performance.now() / 1000;
    const since = (name) => mean(metrics, this.before ?? metrics, name);
    this.plots.first.add(now, since("first_audio_seconds"));
    this.plots.rate.add(now, since("real_time_factor"));
    this.plots.active.add(now, capacity.active + capacity.waiting);
    this.plots.memory.add(now, metrics.value("process_resident_memory_bytes") || null);
    this.before = metrics;
  }

  tiles(capacity, metrics) {
    const average = (name, write) => {
      const value = mean(metrics, null, name);
      return value === null ? "–" : write(value);
    };
    const shown = {
      State: capacity.state,
      "Places free": `${capacity.free} of ${capacity.sessions}`,
      Waiting: capacity.waiting,
      Conversations: `${capacity.realtime.open} of ${capacity.realtime.sessions}`,
      "Replies so far": metrics.value("omniport_first_token_seconds_count"),
      "First token": average("first_token_seconds", seconds),
      "First sound": average("first_audio_seconds", seconds),
      "Real-time factor": average("real_time_factor", factor),
      Interruptions: metrics.sum("omniport_interruptions_total"),
    };
    $("tiles").replaceChildren(...Object.entries(shown).map(([name, value]) => tile(name, value)));
  }

  stages(metrics) {
    const replies = metrics.value("omniport_first_token_seconds_count");
    const all = metrics.labelled("omniport_stage_seconds_total", "stage");
    const most = Math.max(...Object.values(all), 1e-9);
    const rows = Object.entries(all).map(([name, total]) => stage(name, total / Math.max(1, replies), total / most));
    $("stages").tBodies[0].replaceChildren(...rows);
    $("stages").hidden = !rows.length;
  }
}

function tile(name, value) {
  const box = element("div", "tile");
  box.append(element("dt", "", name), element("dd", "", String(value)));
  return box;
}

function stage(name, value, share) {
  const row = element("tr");
  const head = element("th", "", name.replaceAll("_", " "));
  head.scope = "row";
  const bar = element("span", "bar");
  bar.style.width = `${100 * share}%`;
  const cell = element("td", "wide");
  cell.append(bar);
  row.append(head, element("td", "number", value.toFixed(3)), cell);
  return row;
}

/** A histogram's mean, of what came since `before` if that is given; null if nothing did. */
function mean(metrics, before, name) {
  const delta = (part) => {
    const key = `omniport_${name}_${part}`;
    return metrics.value(key) - (before?.value(key) ?? 0);
  };
  return delta("count") > 0 ? delta("sum") / delta("count") : null;
}

/** Prometheus' text format: {value(name), sum(name), labelled(name, label)}. */
export function parse(text) {
  const lines = text.split("\n").filter((line) => line && !line.startsWith("#"));
  const entries = lines.map((line) => {
    const [, name, labels = "", value] = /^(\w+)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    return { name, labels, value: Number(value) };
  });
  const of = (name) => entries.filter((entry) => entry.name === name);
  const label = ({ labels }, wanted) => new RegExp(`${wanted}="([^"]*)"`).exec(labels)?.[1];
  return {
    value: (name) => of(name)[0]?.value ?? 0,
    sum: (name) => of(name).reduce((sum, { value }) => sum + value, 0),
    labelled: (name, wanted) => Object.fromEntries(of(name).map((entry) => [label(entry, wanted), entry.value])),
  };
}
