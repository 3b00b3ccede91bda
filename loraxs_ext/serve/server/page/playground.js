// The playground: one prompt to the base model and to several adapters at once.

import { getJson, stream } from "./api.js";
import { Column } from "./column.js";
import { Picker } from "./picker.js";

// A browser opens six connections to a server that speaks HTTP/1.1; the sixth is for the live figures.
const MOST_COLUMNS = 5;
const CHOICES = 20;

const byId = (id) => document.getElementById(id);

export class Playground {
  /** @param refused called when the server wants another API key */
  constructor(refused) {
    this.refused = refused;
    this.model = null;
    this.columns = [];
    this.add(null);
    new Picker({
      input: byId("picker"),
      list: byId("choices"),
      note: byId("picker-note"),
      find: (prefix, signal) => this.find(prefix, signal),
      pick: (name) => this.add(name),
    });
    byId("playground").addEventListener("submit", (event) => {
      event.preventDefault();
      this.answer();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("playground").requestSubmit(byId("answer"));
    });
    byId("stop").addEventListener("click", () => this.columns.forEach((column) => column.abort()));
  }

  /** @param state of the server: its model, whether prompts are chats, how many tokens it takes */
  know({ model, chat, context }) {
    this.model = model;
    byId("max-tokens").max = context;
    this.chat = chat;
  }

  /** Names of adapters that begin with a prefix and have no column yet. */
  async find(prefix, signal) {
    const query = new URLSearchParams({ prefix, limit: CHOICES + MOST_COLUMNS });
    try {
      const { data } = await getJson(`v1/models?${query}`, signal);
      const taken = new Set(this.columns.map((column) => column.adapter));
      const start = `${this.model}:`;
      return data
        .filter(({ id }) => id.startsWith(start))
        .map(({ id }) => id.slice(start.length))
        .filter((name) => !taken.has(name))
        .slice(0, CHOICES);
    } catch (error) {
      if (error.status === 401) this.refused();
      throw error;
    }
  }

  add(adapter) {
    if (this.columns.length >= MOST_COLUMNS) return this.say(`At most ${MOST_COLUMNS} side by side; remove one first.`);
    const column = new Column(adapter, adapter === null ? null : () => this.remove(column));
    this.columns.push(column);
    byId("columns").append(column.element);
    this.say("");
  }

  remove(column) {
    this.columns = this.columns.filter((other) => other !== column);
    column.element.remove();
    this.say("");
    byId("picker").focus();
  }

  async answer() {
    if (this.model === null) return this.say("The server has not said yet which model it has.");
    const asked = {
      prompt: byId("prompt").value,
      most: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
    };
    const columns = this.columns;
    const began = performance.now();
    this.running(true);
    this.say(`Answering: ${columns.length} side by side.`);
    const ended = await Promise.all(columns.map((column) => column.run((name, signal) => this.ask(name, asked, signal))));
    const [base, ...others] = columns.filter((_, at) => ended[at]);
    if (base?.adapter === null) others.forEach((column) => column.compare(base));
    const time = ((performance.now() - began) / 1000).toFixed(1);
    this.say(`${ended.filter(Boolean).length} of ${columns.length} answered in ${time} s.`);
    this.running(false);
  }

  /** The answer of one adapter as {piece, reason, count}: text, why it ended, how many tokens. */
  async *ask(adapter, { prompt, most, temperature }, signal) {
    const model = adapter === null ? this.model : `${this.model}:${adapter}`;
    const body = { model, max_tokens: most, temperature, stream_options: { include_usage: true } };
    const events = this.chat
      ? stream("v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }, signal)
      : stream("v1/completions", { ...body, prompt }, signal);
    try {
      for await (const { choices, usage } of events) {
        const [choice] = choices ?? [];
        yield {
          piece: this.chat ? choice?.delta?.content : choice?.text,
          reason: choice?.finish_reason,
          count: usage?.completion_tokens,
        };
      }
    } catch (error) {
      if (error.status === 401) this.refused();
      throw error;
    }
  }

  running(yes) {
    const [over, next] = yes ? ["answer", "stop"] : ["stop", "answer"];
    byId(next).disabled = false;
    // A button that is disabled loses the focus to nowhere.
    if (document.activeElement === byId(over)) byId(next).focus();
    byId(over).disabled = true;
  }

  say(text) {
    byId("playground-status").textContent = text;
  }
}
