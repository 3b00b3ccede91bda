// An input that finds adapters by the beginning of their names: a combobox with a list below it.

const PAUSE = 150; // Milliseconds after a keystroke before the server is asked.

export class Picker {
  /**
   * @param input, list, note its elements: a combobox, a listbox and a line for remarks
   * @param find (prefix, signal) → names
   * @param pick what to do with a name
   */
  constructor({ input, list, note, find, pick }) {
    Object.assign(this, { input, list, note, find, pick });
    this.names = [];
    this.active = -1;
    input.addEventListener("input", () => this.later());
    input.addEventListener("click", () => this.later());
    input.addEventListener("blur", () => this.close());
    input.addEventListener("keydown", (event) => this.onKey(event));
    // A click would take the focus from the input, which closes the list before the click arrives.
    list.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.choose([...list.children].indexOf(option));
    });
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.search(), PAUSE);
  }

  async search() {
    this.asked?.abort();
    const asked = (this.asked = new AbortController());
    const prefix = this.input.value.trim();
    try {
      const names = await this.find(prefix, asked.signal);
      if (asked.signal.aborted) return;
      this.show(names);
      this.note.textContent = names.length ? "" : prefix ? `No other adapter begins with “${prefix}”.` : "No other adapter.";
    } catch (error) {
      if (asked.signal.aborted) return;
      this.close();
      this.note.textContent = error.message;
    }
  }

  show(names) {
    this.names = names;
    this.list.replaceChildren(
      ...names.map((name, index) => {
        const option = document.createElement("li");
        option.id = `choice-${index}`;
        option.setAttribute("role", "option");
        option.textContent = name;
        return option;
      }),
    );
    this.list.hidden = names.length === 0;
    this.input.setAttribute("aria-expanded", String(names.length > 0));
    this.activate(names.length ? 0 : -1);
  }

  activate(index) {
    this.active = index;
    [...this.list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === index)));
    if (index < 0) return this.input.removeAttribute("aria-activedescendant");
    this.input.setAttribute("aria-activedescendant", `choice-${index}`);
    this.list.children[index].scrollIntoView({ block: "nearest" });
  }

  onKey(event) {
    const count = this.names.length;
    if (event.key === "Enter") {
      event.preventDefault(); // It is not to send the form.
      if (this.active >= 0) this.choose(this.active);
    } else if (event.key === "Escape") {
      this.close();
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && count) {
      event.preventDefault();
      this.activate((this.active + (event.key === "ArrowDown" ? 1 : count - 1)) % count);
    } else if (event.key === "ArrowDown") {
      this.later();
    }
  }

  choose(index) {
    const name = this.names[index];
    this.input.value = "";
    this.close();
    this.pick(name);
  }

  close() {
    clearTimeout(this.timer);
    this.asked?.abort();
    this.show([]);
  }
}
