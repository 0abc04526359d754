/** The tensors of a step as the session's encodings have them: gradients out, parameters in. */
import { add, CODECS, decodingTarget, differenceTarget, EncodingSource } from './encodings.js';
import { DigestedSource } from './digest.js';
import { Memory } from './framing.js';
import {
  arrived,
  emptyTensor,
  headerFromMessage,
  memoryOf,
  tensorFromMessage,
  wireBytes,
} from './tensor.js';

/** @typedef {import('./digest.js').StepDigest} StepDigest */
/** @typedef {import('./framing.js').Source} Source */
/** @typedef {import('./framing.js').Target} Target */
/** @typedef {import('./types.js').Encoding} Encoding */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {any} Floats A Float32Array. Its elements are there, which the type checker cannot know. */

const { INT8_BLOCKS } = CODECS;

/**
 * The gradients of one worker's steps. INT8 rounds much away: it is kept, and added to the next gradient of the same
 * parameter. A step that is taken again, for nobody knows whether it was applied, is sent with the same bytes.
 */
export class GradientSources {
  #encoding;
  /** @type {Map<string, Float32Array>} */ #kept = new Map();
  /** What is kept instead, once the step that is under way has been applied. */
  #next = new Map();
  #step = 0; // The one that is under way.
  #applied = 0; // The last one of which what it rounded away is kept.

  /** @param {Encoding | undefined} encoding Left out: their own data type. */
  constructor(encoding) {
    this.#encoding = encoding;
  }

  /**
   * @param {number} step
   * @param {Map<string, Tensor>} gradients
   * @param {StepDigest} digest Is given the gradients' own bytes as they are read.
   * @returns {Source[]} To be read once, one after the other, from the front.
   */
  of(step, gradients, digest) {
    const encoding = this.#encoding;
    if (encoding === undefined) {
      return [...gradients.values()].map(
        (g) => new DigestedSource(new Memory(wireBytes(g)), digest),
      );
    }
    const compensated = encoding === 'INT8_BLOCKS' && step > this.#applied;
    if (compensated) {
      if (this.#step < step) this.answered(this.#step); // It was applied, or this one could not be taken.
      this.#step = step;
      this.#next = new Map();
    }
    return [...gradients].map(([name, { data }]) => {
      // The server refuses what is not FP32; that is for it to say.
      if (!(data instanceof Float32Array)) {
        return new DigestedSource(new Memory(memoryOf(data)), digest);
      }
      const encode = compensated ? this.#compensation(name, data) : CODECS[encoding].encode;
      return new EncodingSource(encoding, data.length, (first, last, bytes) => {
        const piece = data.subarray(first, last);
        digest.add(memoryOf(piece));
        encode(piece, bytes, first);
      });
    });
  }

  /** Keep what the step has rounded away, for the next one. @param {number} step */
  answered(step) {
    if (step !== this.#step || step <= this.#applied) return;
    for (const [name, lost] of this.#next) this.#kept.set(name, lost);
    this.#next = new Map();
    this.#applied = step;
  }

  /** Forget what steps after `step` have left behind: the server has lost them. @param {number} step */
  rewind(step) {
    this.#kept = new Map();
    this.#next = new Map();
    this.#step = this.#applied = step;
  }

  /**
   * @param {string} name
   * @param {Float32Array} gradient
   * @returns {(piece: Float32Array, data: Buffer, first: number) => void} Encodes the piece of it that begins with `first`.
   */
  #compensation(name, gradient) {
    const kept = this.#kept.get(name);
    const lost = new Float32Array(gradient.length);
    this.#next.set(name, lost);
    return (piece, data, first) => {
      const sums = piece.slice();
      const last = first + piece.length;
      if (kept) add(sums, kept.subarray(first, last));
      INT8_BLOCKS.encode(sums, data);
      const rounded = lost.subarray(first, last);
      INT8_BLOCKS.decode(data, rounded);
      takeFrom(sums, rounded);
    };
  }
}

/** The parameters of the answers on one stream. */
export class ParameterTargets {
  #keeps;
  /** @type {Map<string, Float32Array>} What the last answer has brought, which the next one may be the difference to. */
  #reference = new Map();

  /** @param {Encoding | undefined} encoding Of the session's parameters. */
  constructor(encoding) {
    this.#keeps = encoding === 'INT8_BLOCKS';
  }

  /**
   * @param {Encoding | undefined} encoding Of this answer.
   * @param {[string, Tensor][]} parameters To be filled.
   * @returns {Target[]}
   * @throws {RangeError} There is nothing yet that they could be differences to.
   */
  of(encoding, parameters) {
    if (encoding === undefined) return parameters.map(([, { data }]) => new Memory(memoryOf(data)));
    return parameters.map(([name, { data }]) => {
      const values = /** @type {Float32Array} */ (data);
      if (encoding !== 'INT8_BLOCKS') return decodingTarget(encoding, values);
      const reference = this.#reference.get(name);
      if (reference === undefined) throw new RangeError('differences came before any parameters');
      return differenceTarget(reference, values);
    });
  }

  /** Note that an answer has come to its end. @param {Encoding | undefined} encoding @param {[string, Tensor][]} parameters */
  answered(encoding, parameters) {
    if (encoding !== undefined) return;
    for (const [name, tensor] of parameters) {
      arrived(tensor);
      if (this.#keeps)
        this.#reference.set(name, new Float32Array(/** @type {any} */ (tensor.data)));
    }
  }
}

/** The encoding that the contract calls so; undefined: none. @param {string} name @returns {Encoding | undefined} */
export function encodingOf(name) {
  const short = name.replace(/^ENCODING_/, '');
  return short === 'UNSPECIFIED' ? undefined : /** @type {Encoding} */ (short);
}

/** @param {any} message A Tensor. @param {Encoding | undefined} encoding Of its data. @returns {Tensor} */
export function decodedFromMessage(message, encoding) {
  if (encoding === undefined) return tensorFromMessage(message);
  const tensor = emptyTensor(headerFromMessage(message.header));
  const target = decodingTarget(encoding, /** @type {Float32Array} */ (tensor.data));
  if (message.data.length !== target.byteCount) {
    throw new RangeError(`${target.byteCount} bytes announced, ${message.data.length} came`);
  }
  target.write(0, message.data);
  return tensor;
}

/** @param {Floats} sums @param {Floats} sent Becomes what is lost of `sums`: nothing in a block of NaNs. */
function takeFrom(sums, sent) {
  for (let i = 0; i < sums.length; i += 1) {
    const lost = sums[i] - sent[i];
    sent[i] = Number.isNaN(lost) ? 0 : lost;
  }
}
