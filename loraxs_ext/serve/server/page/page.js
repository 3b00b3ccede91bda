// Starts the page: looks at the server once a second, shows the figures, and asks for an API key when one is wanted.

import { getJson, useKey } from "./api.js";
import { Figures } from "./figures.js";
import { Playground } from "./playground.js";

const PERIOD = 1000; // Milliseconds between two looks at the server.
const PATIENCE = 5000; // Milliseconds that one look may take.

const byId = (id) => document.getElementById(id);
const figures = new Figures();
const playground = new Playground(askForKey);
let timer;

async function look() {
  clearTimeout(timer);
  try {
    const state = await getJson("api/state", AbortSignal.timeout(PATIENCE));
    figures.show(state);
    playground.know(state);
    if (state.ready) status("live", "Live");
    else status("lost", "The server is ending: it takes no new requests.");
  } catch (error) {
    if (error.status === 401) {
      askForKey();
      return status("waiting", error.message); // Nothing changes before there is another key.
    }
    status("lost", error.status === undefined ? "The server is slow to answer. Trying again." : `${error.message} Trying again.`);
  }
  if (!document.hidden) timer = setTimeout(look, PERIOD);
}

function status(kind, text) {
  const shown = byId("status");
  byId("figures").dataset.kind = kind;
  if (shown.textContent === text) return; // So that nothing is read out again.
  shown.dataset.kind = kind;
  shown.textContent = text;
}

function showKeyForm(yes) {
  byId("key-form").hidden = !yes;
  byId("key-button").setAttribute("aria-expanded", String(yes));
}

function askForKey() {
  if (!byId("key-form").hidden) return;
  showKeyForm(true);
  byId("key").focus();
}

byId("key-button").addEventListener("click", () => {
  showKeyForm(byId("key-form").hidden);
  if (!byId("key-form").hidden) byId("key").focus();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  showKeyForm(false);
  status("waiting", "Connecting…");
  look();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});

look();
