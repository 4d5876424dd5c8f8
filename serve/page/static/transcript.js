// What is said and written, as a list of turns.

/** Make an element: its class, its text. */
export function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** One turn in the list. Nothing of it is read as markup. */
class Turn {
  text = "";

  constructor(who) {
    this.row = element("li", `turn ${who}`);
    this.said = element("p", "said");
    this.row.append(element("span", "who", who === "user" ? "You" : "Model"), this.said);
    this.row.setAttribute("aria-busy", "true"); // read aloud when it is complete
  }

  write(text) {
    this.text = text;
    this.said.textContent = text;
  }

  append(text) {
    this.write(this.text + text);
  }

  /** Stands where there is no text yet, or none will come. */
  placeholder(text) {
    if (!this.text) this.said.replaceChildren(element("i", "", text));
  }

  /** Only `heard` was; what follows of the text is shown as cut off. */
  cut(heard) {
    let n = 0;
    while (n < heard.length && heard[n] === this.text[n]) n++;
    if (n === this.text.length) return;
    const rest = element("del", "unheard");
    rest.append(element("span", "unseen", "Cut off, not heard: "), this.text.slice(n));
    this.said.replaceChildren(this.text.slice(0, n), rest);
    this.note("interrupted");
  }

  /** A small line below. */
  note(text) {
    this.row.querySelector(".note")?.remove();
    this.row.append(element("span", "note", text));
  }

  attach(node) {
    this.row.append(node);
  }

  done() {
    this.row.removeAttribute("aria-busy");
  }
}

export class Transcript {
  turns = new Map();

  constructor(list) {
    this.list = list;
    new MutationObserver(() => this.follow()).observe(list, { childList: true, subtree: true, characterData: true });
    new ResizeObserver(() => this.follow()).observe(list);
    list.addEventListener("scroll", () => (this.away = list.scrollHeight - list.scrollTop - list.clientHeight > 60));
  }

  /** The turn of that id; made if there is none. */
  turn(id, who) {
    if (!this.turns.has(id)) {
      const made = new Turn(who);
      this.turns.set(id, made);
      this.list.append(made.row);
    }
    return this.turns.get(id);
  }

  get(id) {
    return this.turns.get(id);
  }

  remove(id) {
    this.turns.get(id)?.row.remove();
    this.turns.delete(id);
  }

  clear() {
    this.turns.clear();
    this.list.replaceChildren();
  }

  /** Keep the end in sight, unless the user has scrolled away from it. */
  follow() {
    if (!this.away) this.list.scrollTop = this.list.scrollHeight;
  }
}
