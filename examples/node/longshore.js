// A cell from Node: ask, read an answer whole whatever happens on the way, cancel, submit, read the result.
//
// A cell shows every position of an answer at least once, as core messages: they repeat, overlap, and are lost while a
// connection is down. docs/subjects.md says what a reader has to do about that; `read` below does it.

import { createHash, randomUUID } from "node:crypto";
import { createInbox } from "@nats-io/transport-node";
import { jetstream } from "@nats-io/jetstream";

const SILENCE_MS = 2_000; // ask again after so long without a word
const FIRST_WAIT_MS = 50; // ask again for something that is known to be missing; doubles while nothing new comes
const LONGEST_WAIT_MS = 30_000;
const PATIENCE_MS = 60_000; // give up after so long without a word
const UNREAD_LIMIT = 4096; // chunks kept for a slow reader; what finds no room is asked for again

/** A request that did not end well. `code` is a name of the contract, `retryMs` when to come again (0: no use). */
export class RequestFailed extends Error {
  constructor({ code, message, retry_ms: retryMs = 0 }) {
    super(message);
    this.code = code;
    this.retryMs = retryMs;
  }
}

export class Longshore {
  /** `nc` is a connection of @nats-io/transport-node. Keys are unique within the name of a client. */
  constructor(nc, { cell = "main", client = "anonymous" } = {}) {
    this.nc = nc;
    this.client = client;
    this.prefix = `longshore.${cell}`;
    this.reading = new Set(); // what waits for messages, to be told of reconnects
    this.watchConnection();
  }

  async watchConnection() {
    for await (const status of this.nc.status()) {
      if (status.type === "reconnect") this.reading.forEach((unread) => unread.put(RECONNECTED));
    }
  }

  /** The id of the request that this client asks under `key`: it is known before anything is sent. */
  requestId(key) {
    return createHash("sha256").update(`${this.client}\0${key}`).digest("hex").slice(0, 32);
  }

  /**
   * Ask, and read the answer: an async iterator of chunks, every position once and in order.
   *
   * The key makes the request idempotent: asked again, now or by another process, it gives the same answer and computes
   * nothing twice. Without one, two calls are two requests.
   */
  infer(model, fields, { key = randomUUID(), from = 0 } = {}) {
    const body = { ...fields, client: this.client, key };
    const first = (position) => [`${this.prefix}.infer.${escapeModel(model)}`, { ...body, from: position }];
    return this.read(this.requestId(key), from, first);
  }

  /** Read a request that exists, from a position on. */
  resume(request, from = 0) {
    return this.read(request, from, undefined);
  }

  /** Have a request ended; its answer then ends as `cancelled`, unless it ended before. */
  async cancel(request) {
    return this.ask(`cancel.${request}`);
  }

  /** Leave a request with the cell. Once this returns it will run, whatever is restarted. Returns its id. */
  async submit(model, fields, { key = randomUUID() } = {}) {
    const body = JSON.stringify({ ...fields, client: this.client, key });
    const subject = `${this.prefix}.submit.${escapeModel(model)}`;
    // No acknowledgement means nothing: the request is published again, and the key keeps it one request.
    await patiently(() => jetstream(this.nc).publish(subject, body));
    return this.requestId(key);
  }

  /** The result of a submitted request, once it has ended: `{ end, text, tokens, usage }`. */
  async result(request, { timeoutMs = PATIENCE_MS } = {}) {
    const until = Date.now() + timeoutMs;
    for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, 1_000)) {
      try {
        const found = await this.ask(`result.${request}`);
        if (found.status === "ended" || Date.now() > until) return found;
      } catch (error) {
        // Between its acknowledgement and its acceptance a submitted request is unknown for some milliseconds.
        if (error.code !== "unknown_request" || Date.now() > until) throw error;
      }
      await sleep(wait);
    }
  }

  /** One question, one answer; repeated while nobody answers, as all of these are idempotent. */
  async ask(verb) {
    const answer = await patiently(() => this.nc.request(`${this.prefix}.${verb}`, "", { timeout: 2_000 }));
    const reply = answer.json();
    if (reply.status === "refused") throw new RequestFailed(reply.error);
    return reply;
  }

  async *read(request, from, first) {
    const inbox = createInbox();
    const unread = new Unread(UNREAD_LIMIT);
    const subscription = this.nc.subscribe(inbox, { callback: (_, message) => unread.put(message) });
    this.reading.add(unread);

    const early = new Map(); // chunks behind a hole, by position
    let next = from; // the first position not yet seen
    let accepted = first === undefined;
    let missing = false; // something is known to be missing
    let wait = FIRST_WAIT_MS;
    let asked = 0;
    let heard = Date.now();
    let excuse = { code: "no_answer", message: `the cell said nothing about request ${request}; repeat with its key` };

    const askFor = (position) => {
      const resume = [`${this.prefix}.resume.${request}`, { from: position }];
      const [subject, body] = accepted ? resume : first(position);
      this.nc.publish(subject, JSON.stringify(body), { reply: inbox });
      asked = Date.now();
      missing = false;
    };

    try {
      askFor(next);
      for (;;) {
        const due = asked + (missing || early.size ? wait : Math.max(SILENCE_MS, wait));
        const message = await unread.take(due - Date.now());
        if (message === undefined) {
          if (Date.now() - heard > PATIENCE_MS) throw new RequestFailed(excuse);
          wait = Math.min(2 * wait, LONGEST_WAIT_MS);
          askFor(next);
          continue;
        }
        if (message === RECONNECTED) {
          wait = FIRST_WAIT_MS;
          missing = true; // whatever was shown meanwhile is lost
          continue;
        }
        if (message.data.length === 0) {
          // The end of a stream whose last chunk was lost, or (status 503) nobody listens just now.
          missing = true;
          if (message.headers?.code === 503) excuse = { code: "not_ready", message: "no control of this cell is up" };
          continue;
        }
        const reply = message.json();
        heard = Date.now();
        if (reply.status !== undefined) {
          if (reply.status === "accepted") {
            accepted = true;
          } else if (reply.status === "unknown" || (accepted && reply.error.retry_ms)) {
            excuse = reply.error; // it may stand in the ledger: ask again, under the same key
            missing = true;
          } else {
            throw new RequestFailed(reply.error);
          }
          continue;
        }
        accepted = true; // a chunk may overtake the word that says so
        early.set(reply.position, longer(reply, early.get(reply.position)));
        for (const position of [...early.keys()].sort((a, b) => a - b)) {
          if (position > next) break;
          const chunk = cut(early.get(position), next);
          early.delete(position);
          if (chunk === undefined) continue; // seen already
          next = chunk.position + chunk.tokens.length;
          wait = FIRST_WAIT_MS;
          asked = Date.now(); // something new came: silence begins now
          yield chunk;
          if (chunk.end === "failed" || chunk.end === "quarantined") throw new RequestFailed(chunk.error);
          if (chunk.end) return;
        }
      }
    } finally {
      this.reading.delete(unread);
      subscription.unsubscribe();
    }
  }
}

/** The part of a chunk from position `next` on; undefined where there is none. */
function cut(chunk, next) {
  const skip = next - chunk.position;
  if (skip <= 0) return chunk;
  if (skip > chunk.tokens.length || (skip === chunk.tokens.length && !chunk.end)) return undefined;
  const texts = chunk.texts?.slice(skip) ?? [];
  return { ...chunk, position: next, tokens: chunk.tokens.slice(skip), texts, text: texts.join("") };
}

/** Of two chunks at one position, the one that says more. */
function longer(one, other) {
  if (other === undefined || one.tokens.length > other.tokens.length) return one;
  return one.tokens.length === other.tokens.length && one.end ? one : other;
}

/** A model's name as one subject token: every byte but letters, digits, - and _ as = and two hexadecimal digits. */
export function escapeModel(model) {
  const escape = (byte) => `=${byte.toString(16).toUpperCase().padStart(2, "0")}`;
  return [...Buffer.from(model)]
    .map((byte) => (/[A-Za-z0-9_-]/.test(String.fromCharCode(byte)) ? String.fromCharCode(byte) : escape(byte)))
    .join("");
}

const RECONNECTED = Symbol("reconnected");
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Repeat what nobody answered: while a connection is down, or a control is started anew. */
async function patiently(question) {
  const until = Date.now() + PATIENCE_MS;
  for (;;) {
    try {
      return await question();
    } catch (error) {
      if (Date.now() > until) throw error;
      await sleep(200);
    }
  }
}

/** Messages that wait for a reader; beyond `limit` they are dropped, and the reader notices a hole. */
class Unread {
  constructor(limit) {
    this.limit = limit;
    this.messages = [];
    this.wake = () => {};
  }

  put(message) {
    if (this.messages.length >= this.limit) return;
    this.messages.push(message);
    this.wake();
  }

  /** The next message, or undefined after `ms`. */
  async take(ms) {
    if (this.messages.length === 0) {
      let timer;
      await new Promise((resolve) => {
        this.wake = resolve;
        timer = setTimeout(resolve, Math.max(0, ms));
      });
      clearTimeout(timer);
    }
    return this.messages.shift();
  }
}
