// The live figures: what the server counts since its start, and the rates between two looks at it.

import { Chart } from "./chart.js";

const MINUTE = 60;
const number = new Intl.NumberFormat("en-GB");
const short = new Intl.NumberFormat("en-GB", { maximumSignificantDigits: 3 });

export class Figures {
  constructor() {
    this.seen = []; // States of the last minute, oldest first.
    this.tokens = new Chart(byId("token-chart"), { what: "Tokens per second", lines: 1, format: rate });
    this.latency = new Chart(byId("latency-chart"), { what: "Latency, median and p99", lines: 2, format: seconds });
  }

  show(state) {
    const before = this.seen.at(-1);
    if (before && state.uptime_seconds < before.uptime_seconds) this.restarted();
    this.seen.push(state);
    while (state.uptime_seconds - this.seen[0].uptime_seconds > MINUTE) this.seen.shift();

    say("model", state.model);
    document.title = `${state.model} · LoRA-XS server`;
    this.showSpeed(state);
    this.showHits(state);
    showSlots(state.slots, state.evictions, state.waits);
    say("adapters", `${number.format(state.adapters)} ${plural(state.adapters, "adapter")}`);
    say("store-size", `${bytes(state.store_bytes)} on disk`);
    say("store-note", state.adapters ? `${bytes(state.store_bytes / state.adapters)} each` : "");
    const { running, queued, finished, failed } = state.requests;
    say("requests", `${number.format(running)} running`);
    say("requests-queue", `${number.format(queued)} waiting for their turn`);
    say("requests-note", `${number.format(finished)} finished, ${number.format(failed)} failed`);
  }

  showSpeed(state) {
    const perSecond = this.between(state, "tokens", this.seen.at(-2));
    const { p50, p99 } = state.latency_seconds;
    const first = state.first_token_seconds;
    if (perSecond !== null) this.tokens.add([perSecond]);
    this.latency.add([p50, p99]);
    say("token-rate", perSecond === null ? "–" : rate(perSecond));
    say("token-note", `${number.format(state.tokens)} tokens in ${duration(state.uptime_seconds)}`);
    say("latency-p50", seconds(p50));
    say("latency-p99", seconds(p99));
    say("latency-note", `first token ${seconds(first.p50)} p50, ${seconds(first.p99)} p99`);
  }

  showHits(state) {
    const oldest = this.seen[0];
    say("hit-rate", share(state.hits, state.misses));
    say("hit-recent", `${share(state.hits - oldest.hits, state.misses - oldest.misses)} in the last minute`);
    say("hit-note", `${number.format(state.hits)} hits, ${number.format(state.misses)} misses`);
  }

  between(state, name, before) {
    const elapsed = before ? state.uptime_seconds - before.uptime_seconds : 0;
    return elapsed > 0 ? (state[name] - before[name]) / elapsed : null;
  }

  restarted() {
    this.seen = [];
    this.tokens.clear();
    this.latency.clear();
  }
}

function showSlots({ total, in_use, pinned, resident }, evictions, waits) {
  say("slots", `${number.format(resident)} of ${number.format(total)} filled`);
  byId("slots-used").style.width = `${(100 * in_use) / total}%`;
  byId("slots-idle").style.width = `${(100 * Math.max(0, resident - in_use)) / total}%`;
  say(
    "slots-note",
    `${number.format(in_use)} in use, ${number.format(pinned)} pinned; ` +
      `${number.format(evictions)} evictions, ${number.format(waits)} waits`,
  );
}

const byId = (id) => document.getElementById(id);

function say(id, text) {
  byId(id).textContent = text || "\u00a0"; // A line that is empty for now keeps its height.
}

const plural = (count, noun) => (count === 1 ? noun : `${noun}s`);

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

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${short.format(value)} ${units[unit]}`;
}
