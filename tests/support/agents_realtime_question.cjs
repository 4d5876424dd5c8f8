// Spoken questions asked by @openai/agents-realtime, with its default session: URL FOLDER. FOLDER has first.pcm and
// second.pcm; the second is asked into the answer to the first. Of each answer its sound goes to FOLDER/answer-N.pcm; the
// words go out as one JSON object.
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession } = require("@openai/agents-realtime");

const [url, folder] = process.argv.slice(2);
const PIECE = 1920; // 40 ms of 24 kHz
const AFTER = 500; // ms of an answer that are heard before somebody speaks into it

const transport = new OpenAIRealtimeWebSocket({ url, useInsecureApiKey: true });
const session = new RealtimeSession(new RealtimeAgent({ name: "Wren" }), { transport });
const sounds = new Map(); // of items
const said = new Map();
const told = { responses: [], truncated: [], interrupted: 0, errors: [] };

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function until(emitter, name, wanted = () => true) {
  return new Promise((resolve) => {
    const look = (event) => {
      if (!wanted(event)) return;
      emitter.off(name, look);
      resolve(event);
    };
    emitter.on(name, look);
  });
}

async function speak(name) {
  const data = fs.readFileSync(path.join(folder, name));
  for (let at = 0; at < data.length; at += PIECE) {
    session.sendAudio(new Uint8Array(data.subarray(at, at + PIECE)).buffer);
    await pause(20); // twice as fast as it is said
  }
}

transport.on("*", (event) => {
  if (event.type === "response.output_audio.delta") {
    sounds.set(event.item_id, [...(sounds.get(event.item_id) ?? []), Buffer.from(event.delta, "base64")]);
  } else if (event.type === "response.output_audio_transcript.done") said.set(event.item_id, event.transcript);
  else if (event.type === "conversation.item.truncated") told.truncated.push(event.audio_end_ms);
  else if (event.type === "response.done") told.responses.push(event.response.status);
});
session.on("audio_interrupted", () => told.interrupted++);
session.on("error", (error) => told.errors.push(String(error.error?.message ?? error.error)));

async function main() {
  const ready = until(transport, "*", (event) => event.type === "session.updated");
  await session.connect({ apiKey: "none" });
  await ready;
  const heard = until(transport, "*", (event) => event.type === "response.output_audio.delta");
  speak("first.pcm");
  const first = (await heard).item_id;
  await pause(AFTER);
  const over = until(
    transport,
    "*",
    (event) => event.type === "response.done" && event.response.output.some((item) => item.id !== first),
  );
  await speak("second.pcm");
  await over;
  [...sounds.values()].forEach((parts, n) => fs.writeFileSync(path.join(folder, `answer-${n + 1}.pcm`), Buffer.concat(parts)));
  process.stdout.write(JSON.stringify({ ...told, said: [...said.values()] }));
  session.close();
  process.exit(0);
}

main().catch((error) => {
  process.stderr.write(String(error.stack ?? error));
  process.exit(1);
});
