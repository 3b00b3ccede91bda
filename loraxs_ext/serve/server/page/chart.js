// A small line chart of the last minutes: one SVG, lines over a shared scale that starts at zero.

const WIDTH = 240;
const HEIGHT = 56;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  /**
   * @param host the element that shows it
   * @param what it shows, for those who do not see it
   * @param lines how many
   * @param format of a value of the scale
   * @param length how many values are kept per line; one is added a second
   */
  constructor(host, { what, lines, format, length = 120 }) {
    this.what = what;
    this.format = format;
    this.length = length;
    this.rows = Array.from({ length: lines }, () => []);
    this.svg = element("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": what,
    });
    this.area = this.svg.appendChild(element("path", { class: "area" }));
    this.paths = this.rows.map((_, line) => this.svg.appendChild(element("path", { class: `line line-${line}` })));
    this.top = document.createElement("span");
    const span = document.createElement("span");
    span.textContent = `last ${length / 60} min`;
    const scale = document.createElement("p");
    scale.className = "scale";
    scale.append(this.top, span);
    host.append(scale, this.svg);
  }

  clear() {
    for (const row of this.rows) row.length = 0;
  }

  /** Add one value per line, null for none. */
  add(values) {
    this.rows.forEach((row, line) => {
      row.push(values[line]);
      if (row.length > this.length) row.shift();
    });
    const top = ceiling(Math.max(0, ...this.rows.flat().filter((value) => value !== null)));
    this.rows.forEach((row, line) => this.paths[line].setAttribute("d", this.outline(row, top).line));
    this.area.setAttribute("d", this.outline(this.rows[0], top).area);
    this.top.textContent = this.format(top);
    const now = values.map((value) => (value === null ? "none" : this.format(value))).join(" and ");
    this.svg.setAttribute("aria-label", `${this.what}: now ${now}; scale from 0 to ${this.format(top)}`);
  }

  /** The line through the values, broken where there is none, and the area below it. */
  outline(row, top) {
    let line = "";
    let area = "";
    let from = null;
    let last = null;
    const close = () => {
      if (from !== null) area += `L${last} ${HEIGHT}L${from} ${HEIGHT}Z`;
      from = null;
    };
    row.forEach((value, index) => {
      if (value === null) return close();
      last = (((index + this.length - row.length) / (this.length - 1)) * WIDTH).toFixed(1);
      const point = `${from === null ? "M" : "L"}${last} ${(HEIGHT - (value / top) * (HEIGHT - 2) - 1).toFixed(1)}`;
      from ??= last;
      line += point;
      area += point;
    });
    close();
    return { line, area };
  }
}

/** The next of 1, 2, 5, 10, 20, 50 … that is not below the value. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.9999) * power;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}
