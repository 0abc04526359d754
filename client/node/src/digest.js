/** What identifies the content of a worker's contribution to a step. */
import { createHash } from 'node:crypto';

/** @typedef {import('./framing.js').Source} Source */

// Of SHA-256, the fastest that node:crypto has: some 70 ms for 100 MB. It tells mistakes apart; it need not resist forgers.
const DIGEST_BYTES = 16;

/**
 * The digest of a step's gradients: of their own bytes, whatever encoding they travel in. INT8 rounds the same gradients to
 * other codes if they come after other steps; they are the same content all the same.
 */
export class StepDigest {
  #hash = createHash('sha256');

  /** @param {string[]} names Of the gradients, unless every parameter has one. */
  constructor(names) {
    for (const name of names) this.#hash.update(`${name}\0`);
  }

  /** @param {Buffer} bytes The next ones, of the gradients one after the other. */
  add(bytes) {
    this.#hash.update(bytes);
  }

  /** Return the digest of all that was added. @returns {Buffer} */
  end() {
    return this.#hash.digest().subarray(0, DIGEST_BYTES);
  }
}

/** A source whose bytes are added to a digest when they are read: once, from the front. */
export class DigestedSource {
  #source;
  #digest;

  /** @param {Source} source @param {StepDigest} digest */
  constructor(source, digest) {
    this.#source = source;
    this.#digest = digest;
    this.byteCount = source.byteCount;
  }

  /** @param {number} offset @param {number} limit @returns {Buffer} */
  read(offset, limit) {
    const data = this.#source.read(offset, limit);
    this.#digest.add(data);
    return data;
  }
}
