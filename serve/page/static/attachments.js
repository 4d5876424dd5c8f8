// Files for the chat, as parts of a message.

import { Told } from "./server.js";
import { element } from "./transcript.js";

const LARGEST = 24 << 20; // bytes of one file, as the server takes them
const SIDE = 1280; // pixels of a picture's longer side: more costs time, and the model sees little more

export class Attachments {
  files = [];

  constructor(list) {
    this.list = list;
  }

  /** Add a file that the user has chosen. Throws Told if it cannot be sent. */
  async add(file) {
    const kind = file.type.split("/")[0];
    if (!["image", "audio", "video", "text"].includes(kind)) {
      throw new Told(`${file.name} is no picture, sound, video or text: the model can take nothing else.`);
    }
    const content = kind === "image" ? await shrunk(file) : file;
    if (content.size > LARGEST) throw new Told(`${file.name} has more than 24 MiB. Send a shorter or smaller one.`);
    this.files.push({ name: file.name, kind, content });
    this.draw();
  }

  replace(files) {
    this.files = files;
    this.draw();
  }

  draw() {
    this.list.replaceChildren(...this.files.map((file) => this.row(file)));
  }

  row(file) {
    const row = element("li", "attachment");
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.onclick = () => {
      this.replace(this.files.filter((other) => other !== file));
    };
    row.append(preview(file), remove);
    return row;
  }

  /** Take them all, as [{part, preview}]. */
  async take() {
    const { files } = this;
    this.replace([]);
    return Promise.all(files.map(async (file) => ({ part: await asPart(file), preview: preview(file) })));
  }
}

function preview({ name, kind, content }) {
  if (kind !== "image") return element("span", "name", name);
  const picture = element("img");
  picture.src = URL.createObjectURL(content);
  picture.alt = name;
  picture.onload = () => URL.revokeObjectURL(picture.src);
  return picture;
}

async function asPart({ name, kind, content }) {
  const url = await dataUrl(content);
  if (kind === "image") return { type: "image_url", image_url: { url } };
  return { type: "file", file: { file_data: url, filename: name } };
}

function dataUrl(content) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Told("The file cannot be read any more. Add it again."));
    reader.readAsDataURL(content);
  });
}

async function shrunk(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Told(`${file.name} is a picture that this browser cannot read. Send JPEG, PNG or WebP.`);
  });
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1) return file;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.85));
}
