// The live figures, from one look at the server after the other.

import { Chart } from "./chart.js";

const MINUTE = 60;
const number = new Intl.NumberFormat("en-GB");
const short = new Intl.NumberFormat("en-GB", { maximumSignificantDigits: 3 });

export class Figures {
  constructor() {
    this.seen = []; // States of the last minute, oldest first.
    this.tokens = new Chart(byId("token-chart"), { what: "Tokens per second", lines: 1, format: rate });
    this.latency = new Chart(byId("latency-chart"), { what: "Latency, p50 and p99", lines: 2, format: seconds });
  }

  show(state) {
    if (state.uptime_seconds < this.seen.at(-1)?.uptime_seconds) this.restarted();
    this.seen.push(state);
    while (state.uptime_seconds - this.seen[0].uptime_seconds > MINUTE) this.seen.shift();

    say("model", state.model);
    document.title = `${state.model} · LoRA-XS server`;
    this.tokens.add([state.tokens_per_second]);
    say("token-rate", rate(state.tokens_per_second));
    this.latency.add([state.latency_p50, state.latency_p99]);
    say("latency-p50", seconds(state.latency_p50));
    say("latency-p99", seconds(state.latency_p99));
    this.showHits(state);
    showSlots(state);
    showStore(state.store);
    say("requests", `${number.format(state.running)} running`);
    say("waiting", `${number.format(state.waiting)} waiting, ${number.format(state.queue_limit)} at most`);
    say("uptime", `up for ${duration(state.uptime_seconds)}`);
  }

  showHits({ hits, misses }) {
    const oldest = this.seen[0];
    say("hit-rate", share(hits, misses));
    say("hit-recent", `${share(hits - oldest.hits, misses - oldest.misses)} in the last minute`);
    say("hit-note", `${number.format(hits)} hits, ${number.format(misses)} misses`);
  }

  restarted() {
    this.seen = [];
    this.tokens.clear();
    this.latency.clear();
  }
}

function showSlots({ slots: { slots, resident, in_use, pinned }, evictions }) {
  say("slots", `${number.format(resident)} of ${number.format(slots)}`);
  byId("slots-used").style.width = `${(100 * in_use) / slots}%`;
  byId("slots-idle").style.width = `${(100 * (resident - in_use)) / slots}%`;
  say("slots-note", `${number.format(in_use)} in use, ${number.format(pinned)} pinned`);
  say("evictions", `${number.format(evictions)} ${plural(evictions, "eviction")}`);
}

function showStore({ adapters, bytes }) {
  say("adapters", `${number.format(adapters)} ${plural(adapters, "adapter")}`);
  say("store-size", `${size(bytes)} on disk`);
  say("store-note", adapters ? `${size(bytes / adapters)} each` : "");
}

const byId = (id) => document.getElementById(id);

function say(id, text) {
  byId(id).textContent = text || "\u00a0"; // A line that is empty for now keeps its height.
}

export const plural = (count, noun) => (count === 1 ? noun : `${noun}s`);

const rate = (value) => short.format(value);

function share(part, rest) {
  return part + rest > 0 ? `${((100 * part) / (part + rest)).toFixed(1)} %` : "–";
}

export function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${short.format(value * 1000)} ms` : `${short.format(value)} s`;
}

function duration(value) {
  const parts = [
    [Math.floor(value / 86400), "d"],
    [Math.floor(value / 3600) % 24, "h"],
    [Math.floor(value / 60) % 60, "min"],
    [Math.floor(value) % 60, "s"],
  ];
  const first = parts.findIndex(([count]) => count > 0);
  return parts.slice(first < 0 ? -1 : first).slice(0, 2).map(([count, unit]) => `${count} ${unit}`).join(" ");
}

function size(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${short.format(value)} ${units[unit]}`;
}
