// The page: its screens, its settings, its messages to the user.

import { Chat } from "./chat.js";
import { call, getKey, setKey } from "./server.js";
import { Status } from "./status.js";
import { Talk } from "./talk.js";

const $ = (id) => document.getElementById(id);
const SCREENS = ["talk", "chat", "status"];
const RETRY = 3000; // ms between questions to a server that is loading

const page = {
  model: { modalities: ["text"], input: ["text"], voices: [] },

  settings: () => ({ voice: $("voice").value, instructions: $("instructions").value.trim() }),

  /** Tell the user of an error, or of nothing: `kind` clears its own messages only. */
  notice(told, kind = "") {
    const box = $("notice");
    if (!told) {
      if (!kind || box.dataset.kind === kind) box.hidden = true;
      return;
    }
    box.dataset.kind = kind;
    box.querySelector("p").textContent = told.message ?? told;
    box.hidden = false;
    if (told.status === 401) openSettings(getKey() ? told.message : "");
  },
};

const screens = { talk: new Talk(page), chat: new Chat(page), status: new Status(page) };

function showScreen() {
  const name = SCREENS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "talk";
  for (const other of SCREENS) {
    $(other).hidden = other !== name;
    const link = document.querySelector(`nav a[href="#${other}"]`);
    if (other === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name !== "talk") screens.talk.leave();
  screens.status.watch(name === "status");
}

function openSettings(told = "") {
  if ($("settings").open) return;
  $("key-told").textContent = told;
  $("key").value = getKey();
  $("settings").showModal();
}

/** Learn what the model can do, as soon as the server answers. */
async function learn() {
  try {
    const { data } = await (await call("v1/models")).json();
    page.model = data[0].omniport;
    describe(data[0].id, page.model);
    await call("ready");
    page.notice(null, "server");
  } catch (error) {
    if (error.status === 401) $("key-row").hidden = false;
    else setTimeout(learn, RETRY);
    page.notice(error, "server");
  }
}

function describe(name, { voices, modalities, input }) {
  const speaks = modalities.includes("audio");
  $("model").textContent = name;
  if ($("voice").options.length !== voices.length) $("voice").replaceChildren(...voices.map((voice) => new Option(voice)));
  $("voice-row").hidden = $("aloud-row").hidden = !speaks;
  $("camera-row").hidden = !input.includes("image");
}

$("settings-open").onclick = () => openSettings();
$("settings").onclose = () => {
  if ($("key-row").hidden || $("key").value === getKey()) return;
  setKey($("key").value.trim());
  page.notice(null);
  learn();
  showScreen();
};
$("notice").querySelector("button").onclick = () => page.notice(null);
window.addEventListener("hashchange", showScreen);
if (getKey()) $("key-row").hidden = false;
showScreen();
learn();
