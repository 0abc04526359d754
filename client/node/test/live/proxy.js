/** A way to the server that can be cut, stalled, or gone for a while. */
import { createServer, connect as dial } from 'node:net';

const FRAME_HEAD_BYTES = 9; // Of HTTP/2: three of the length, one of the type, and what does not matter here.
const DATA = 0;

export class Proxy {
  /** @type {Set<import('node:net').Socket>} */ #sockets = new Set();
  #server;
  /** @type {Set<import('node:net').Socket>} */ #stalled = new Set();
  #blocked = false;
  #down = false;
  /** Bytes of requests after which the way is cut, once. */ sentBytesMax = Infinity;
  /** Bytes of answers after which the way is cut, once. */ answerBytesMax = Infinity;
  /** How often the way has been cut. */ cuts = 0;
  /** Whether nothing answers after the next cut, until `restore`. */ staysCut = false;
  /** Bytes of requests that have passed. */ sentBytes = 0;
  /** @type {Gate | undefined} On the next connection. */ #gate;

  /** @param {string} target `host:port` of the server. */
  constructor(target) {
    const [host, port] = target.split(':');
    this.#server = createServer((client) => {
      if (this.#down) return client.destroy();
      const server = dial(Number(port), host);
      const gate = this.#gate;
      this.#gate = undefined;
      gate?.lead((bytes) => this.#forward(bytes, client, true));
      for (const [from, to] of /** @type {const} */ ([
        [client, server],
        [server, client],
      ])) {
        this.#sockets.add(from);
        from.on('error', () => {}); // It is closed then.
        from.on('close', () => this.#stalled.has(from) || to.destroy());
        from.on('data', (bytes) => {
          if (this.#stalled.has(from)) return;
          if (gate && from === server) gate.take(bytes);
          else this.#forward(bytes, to, from === server);
        });
      }
    });
  }

  /** @returns {Promise<string>} The address to connect to. */
  async open() {
    await new Promise((/** @type {(value: void) => void} */ resolve) =>
      this.#server.listen(0, '127.0.0.1', resolve),
    );
    return `127.0.0.1:${/** @type {import('node:net').AddressInfo} */ (this.#server.address()).port}`;
  }

  /** Let nothing through any more. */
  block() {
    this.#blocked = true;
  }

  /** Let nothing through on the connections that there are, not even their end; new ones work. */
  stall() {
    this.#stalled = new Set(this.#sockets);
  }

  /** Keep back, on the next connection, the first message that the server answers, and what follows. @returns {Gate} */
  withhold() {
    return (this.#gate = new Gate());
  }

  /** Cut the way. */
  cut() {
    this.sentBytesMax = this.answerBytesMax = Infinity;
    this.cuts += 1;
    this.#down = this.staysCut;
    for (const socket of this.#sockets) socket.destroy();
    this.#sockets.clear();
  }

  /** Let connections through again. */
  restore() {
    this.staysCut = this.#down = false;
  }

  close() {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
  }

  /** @param {Buffer} bytes @param {import('node:net').Socket} to @param {boolean} isAnswer */
  #forward(bytes, to, isAnswer) {
    if (this.#blocked) return;
    if (!isAnswer) this.sentBytes += bytes.length;
    const which = isAnswer ? 'answerBytesMax' : 'sentBytesMax';
    if (bytes.length > this[which]) return this.cut();
    this[which] -= bytes.length;
    to.write(bytes);
  }
}

/** Lets the beginning of a connection pass, and the first message only when it is opened. */
class Gate {
  #bytes = Buffer.alloc(0);
  #isOpen = false;
  /** @type {(bytes: Buffer) => void} */ #pass = () => {};
  /** @type {(value: void) => void} */ #come = () => {};
  /** Resolves when the message has come. @type {Promise<void>} */
  come = new Promise((resolve) => (this.#come = resolve));

  /** @param {(bytes: Buffer) => void} pass Where to. */
  lead(pass) {
    this.#pass = pass;
  }

  /** @param {Buffer} bytes */
  take(bytes) {
    this.#bytes = Buffer.concat([this.#bytes, bytes]);
    const end = this.#isOpen ? this.#bytes.length : this.#beforeMessage();
    this.#pass(this.#bytes.subarray(0, end));
    this.#bytes = this.#bytes.subarray(end);
  }

  /** Let everything pass. */
  open() {
    this.#isOpen = true;
    this.take(Buffer.alloc(0));
  }

  /** Where the first message begins; what may pass, if it has not come. */
  #beforeMessage() {
    let end = 0;
    while (end + FRAME_HEAD_BYTES <= this.#bytes.length) {
      if (this.#bytes[end + 3] === DATA) {
        this.#come();
        break;
      }
      const next = end + FRAME_HEAD_BYTES + this.#bytes.readUIntBE(end, 3);
      if (next > this.#bytes.length) break;
      end = next;
    }
    return end;
  }
}
