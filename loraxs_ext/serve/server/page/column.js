// One answer beside others: the name of an adapter, its text as it comes, and how fast it came.

import { plural, seconds } from "./figures.js";

export class Column {
  /**
   * @param adapter its name, or null for the base model
   * @param remove called when its button is pressed; without it there is none
   */
  constructor(adapter, remove) {
    this.adapter = adapter;
    this.text = "";
    this.name = adapter ?? "base model";
    const head = node("header");
    head.append(node("h3", "", this.name));
    if (remove) head.append(this.removal(remove));
    this.output = node("p", "output");
    this.problem = node("p", "problem");
    this.problem.setAttribute("role", "alert");
    this.note = node("p", "note");
    this.element = node("article", "column");
    this.element.setAttribute("aria-label", this.name);
    this.element.dataset.state = "empty";
    this.element.append(head, this.output, this.problem, this.note);
  }

  removal(remove) {
    const button = node("button", "quiet", "×");
    button.type = "button";
    button.setAttribute("aria-label", `Remove ${this.name}`);
    button.addEventListener("click", () => {
      this.abort();
      remove();
    });
    return button;
  }

  /** Show an answer while it comes; true if it came to its end. */
  async run(answer) {
    this.controller = new AbortController();
    const { signal } = this.controller;
    const began = performance.now();
    const elapsed = () => (performance.now() - began) / 1000;
    let first = null;
    let tokens = null;
    this.text = "";
    this.output.textContent = this.problem.textContent = this.note.textContent = "";
    this.state("running");
    try {
      for await (const { piece, reason, count } of answer(this.adapter, signal)) {
        if (piece) {
          first ??= elapsed();
          this.text += piece;
          this.output.append(piece);
        }
        tokens = count ?? tokens;
        if (reason === "length") this.output.append(node("span", "aside", " … cut at the limit"));
      }
    } catch (error) {
      if (signal.aborted) this.note.textContent = `Stopped after ${seconds(elapsed())}.`;
      else this.problem.textContent = error.message;
      this.state(signal.aborted ? "stopped" : "failed");
      return false;
    }
    if (!this.text) this.output.append(node("span", "aside", "an empty answer"));
    const parts = [seconds(elapsed())];
    if (first !== null) parts.push(`first token after ${seconds(first)}`);
    if (tokens !== null) parts.unshift(`${tokens} ${plural(tokens, "token")}`);
    this.note.textContent = parts.join(", ");
    this.state("done");
    return true;
  }

  abort() {
    this.controller?.abort();
  }

  compare(base) {
    if (this.text === base.text) this.note.textContent += "; the same as the base model";
  }

  state(name) {
    this.element.dataset.state = name;
    this.element.setAttribute("aria-busy", String(name === "running"));
  }
}

function node(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text; // Never as HTML: names and answers come from others.
  return made;
}
