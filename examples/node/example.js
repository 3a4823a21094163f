// node example.js ask    MODEL PROMPT [--key K] [--max-tokens N] [--cancel-after N] [--json]
// node example.js later  MODEL PROMPT [--key K] [--max-tokens N] [--json]
// node example.js resume REQUEST [--from N] [--json]
//
// The server is LONGSHORE_NATS (nats://127.0.0.1:4222), the cell LONGSHORE_CELL (main).

import { parseArgs } from "node:util";
import { connect } from "@nats-io/transport-node";
import { Longshore, RequestFailed } from "./longshore.js";

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    key: { type: "string" },
    from: { type: "string", default: "0" },
    "max-tokens": { type: "string", default: "32" },
    "cancel-after": { type: "string" },
    json: { type: "boolean", default: false },
  },
});
const [verb, ...rest] = positionals;
const fields = (prompt) => ({ prompt, max_tokens: Number(values["max-tokens"]) });
const show = (chunk) => process.stdout.write(values.json ? `${JSON.stringify(chunk)}\n` : (chunk.text ?? ""));

const nc = await connect({
  servers: process.env.LONGSHORE_NATS ?? "nats://127.0.0.1:4222",
  maxReconnectAttempts: -1, // a client that gives up after a minute is of no use to a service
  reconnectTimeWait: 100,
});
const cell = new Longshore(nc, { cell: process.env.LONGSHORE_CELL ?? "main", client: "example" });

const verbs = {
  async ask(model, prompt) {
    const key = values.key ?? crypto.randomUUID();
    const enough = Number(values["cancel-after"] ?? Infinity);
    let seen = 0;
    for await (const chunk of cell.infer(model, fields(prompt), { key })) {
      show(chunk);
      seen += chunk.tokens.length;
      if (seen >= enough && seen - chunk.tokens.length < enough) await cell.cancel(cell.requestId(key));
    }
  },
  async later(model, prompt) {
    const request = await cell.submit(model, fields(prompt), { key: values.key });
    show(await cell.result(request));
  },
  async resume(request) {
    for await (const chunk of cell.resume(request, Number(values.from))) show(chunk);
  },
};

try {
  if (verbs[verb] === undefined) throw new Error(`use one of ${Object.keys(verbs).join(", ")}: see the head of example.js`);
  await verbs[verb](...rest);
} catch (error) {
  const again = error instanceof RequestFailed && error.retryMs ? ` (come again in ${error.retryMs} ms)` : "";
  console.error(`${error.message}${again}`);
  process.exitCode = 1;
} finally {
  await nc.close();
}
