/** A way to the server that can be cut or blocked. */
import { createServer, connect as dial } from 'node:net';

export class Proxy {
  /** @type {Set<import('node:net').Socket>} */ #sockets = new Set();
  #server;
  #blocked = false;
  /** Bytes of answers after which the way is cut, once. */ answerBytesMax = Infinity;
  /** How often the way has been cut. */ cuts = 0;

  /** @param {string} target `host:port` of the server. */
  constructor(target) {
    const [host, port] = target.split(':');
    this.#server = createServer((client) => {
      const server = dial(Number(port), host);
      for (const [from, to] of /** @type {const} */ ([
        [client, server],
        [server, client],
      ])) {
        this.#sockets.add(from);
        from.on('error', () => to.destroy());
        from.on('close', () => to.destroy());
        from.on('data', (bytes) => this.#forward(bytes, to, from === server));
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

  close() {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
  }

  /** @param {Buffer} bytes @param {import('node:net').Socket} to @param {boolean} isAnswer */
  #forward(bytes, to, isAnswer) {
    if (this.#blocked) return;
    if (isAnswer && bytes.length > this.answerBytesMax) {
      this.answerBytesMax = Infinity;
      this.cuts += 1;
      for (const socket of this.#sockets) socket.destroy();
      return;
    }
    if (isAnswer) this.answerBytesMax -= bytes.length;
    to.write(bytes);
  }
}
