// A conversation by @openai/agents-realtime, with its default session. One JSON object a line goes out at each step; a
// line that comes in lets it go on. Every event of the server has to pass the package's own schema.
"use strict";

const path = require("node:path");
const readline = require("node:readline");
const { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession, tool } = require("@openai/agents-realtime");
const { z } = require("zod");

const folder = path.dirname(require.resolve("@openai/agents-realtime"));
const { parseRealtimeEvent } = require(path.join(folder, "openaiRealtimeEvents.js"));

const RATE = 24000;
const seen = [];
const unknown = [];
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function step(name, more = {}) {
  process.stdout.write(JSON.stringify({ step: name, seen: [...new Set(seen.splice(0))], ...more }) + "\n");
  await lines.next();
}

function until(type) {
  return new Promise((resolve) => {
    const look = (event) => {
      if (event.type === type) {
        session.transport.off("*", look);
        resolve(event);
      }
    };
    session.transport.on("*", look);
  });
}

function sound(seconds, level) {
  const samples = new Int16Array(RATE * seconds);
  for (let i = 0; i < samples.length; i++) samples[i] = level * 32767 * Math.sin(i / 7);
  return samples.buffer;
}

const weather = tool({
  name: "weather",
  description: "Now.",
  parameters: z.object({ city: z.string() }),
  execute: async ({ city }) => `Rain in ${city}.`,
});
const agent = new RealtimeAgent({ name: "Assistant", instructions: "Answer in one sentence.", tools: [weather] });
const transport = new OpenAIRealtimeWebSocket({ url: process.argv[2], useInsecureApiKey: true });
const session = new RealtimeSession(agent, { transport });
const calls = [];

transport.on("*", (event) => {
  seen.push(event.type);
  if (parseRealtimeEvent({ data: JSON.stringify(event) }).isGeneric) unknown.push(event);
});
session.on("agent_tool_end", (_context, _agent, _tool, result) => calls.push(result));
session.on("audio_interrupted", () => seen.push("(audio_interrupted)"));
session.on("error", (error) => process.stdout.write(JSON.stringify({ step: "error", error: String(error.error?.message ?? error.error) }) + "\n"));

async function main() {
  let done = until("session.updated");
  await session.connect({ apiKey: "none" });
  await done;
  await step("connected");
  done = until("response.done");
  session.sendMessage("Hello");
  await done;
  await step("answered");
  const cut = until("conversation.item.retrieved"); // asked for after every truncation
  session.sendAudio(sound(0.5, 0.3));
  await cut;
  await step("interrupted");
  done = until("response.done");
  session.sendAudio(sound(1, 0));
  await done;
  await step("heard");
  transport.sendEvent({ type: "session.update", session: { type: "realtime", max_output_tokens: 100 } }); // a call is long
  const second = until("response.function_call_arguments.done");
  session.sendMessage("Is it raining?");
  await second;
  await step("called");
  await until("response.done");
  await step("ended", { calls, unknown, history: session.history });
  session.close();
  process.exit(0);
}

main().catch((error) => {
  process.stderr.write(String(error.stack ?? error));
  process.exit(1);
});
