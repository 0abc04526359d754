/**
 * Encodings of FP32 elements: what tensor.proto says of each, and where their bytes may be cut.
 *
 * No tensor is ever there in encoded form as a whole: its elements are encoded when a message is made, and decoded when one
 * arrives.
 */

/** @typedef {import('./types.js').Encoding} Encoding */
/** @typedef {any} Floats A Float32Array. Its elements are there, which the type checker cannot know. */
/** @typedef {any} Bits A Uint32Array. */

/**
 * @typedef {object} Codec
 * @property {number} elements Of a unit, which is what can be encoded on its own.
 * @property {number} bytes Of a unit.
 * @property {(values: Float32Array, data: Buffer) => void} encode Of whole units, the last of which may be shorter.
 * @property {(data: Buffer, values: Float32Array) => void} decode
 */

const BLOCK_ELEMENTS = 256;
const SCALE_BYTES = 4;
const PIECE_ELEMENTS = 1 << 16; // Converted at a time where there is something between: 256 KiB stay in cache.
const BF16_NAN = 0x7fc0;
const FP16_NAN = 0x7e00;
const FP32_NAN = 0x7fc00000;
// Bits of FP32.
const INFINITY = 0x7f800000;
const FP16_OVERFLOW = 0x477ff000; // 65520.
const FP16_NORMAL = 0x38800000; // 2^-14.
const FP16_REBIAS = 0x38000000; // 127 - 15, as an exponent.
// Bits of FP16, 13 to the left.
const FP16_INFINITY = 0x7c00 << 13;
const FP16_LEAST = 0x400 << 13; // The smallest normal number.
const CODE_MAX = 127;
const SCALE_MIN = 2 ** -126; // The smallest normal number: below it a quotient is no code.
// Added and taken away again, it leaves the nearest integer, ties to even: there doubles have no room for fractions.
const ROUND = 3 * 2 ** 51;

/** @type {Record<Encoding, Codec>} */
export const CODECS = {
  BF16: { elements: 1, bytes: 2, encode: encodeBf16, decode: decodeBf16 },
  FP16: { elements: 1, bytes: 2, encode: encodeFp16, decode: decodeFp16 },
  INT8_BLOCKS: {
    elements: BLOCK_ELEMENTS,
    bytes: SCALE_BYTES + BLOCK_ELEMENTS,
    encode: encodeInt8Blocks,
    decode: decodeInt8Blocks,
  },
};

/**
 * Count the bytes of encoded elements.
 *
 * @param {Encoding} encoding
 * @param {number} elementCount From the beginning of a unit.
 */
export function encodedBytes(encoding, elementCount) {
  const { elements, bytes } = CODECS[encoding];
  const rest = elementCount % elements;
  return ((elementCount - rest) / elements) * bytes + (rest > 0 ? SCALE_BYTES + rest : 0);
}

/** Elements that are encoded when they are sent. Read once, from the front. */
export class EncodingSource {
  #encoding;
  #elementCount;
  #encode;
  #begin = 0; // Of what has been encoded and not yet been read to its end, in bytes of the tensor.
  #piece = Buffer.alloc(0);

  /**
   * @param {Encoding} encoding
   * @param {number} elementCount
   * @param {(first: number, last: number, data: Buffer) => void} encode Writes the bytes of a range of elements, which begins
   *     with a unit. Called once for each element, in order.
   */
  constructor(encoding, elementCount, encode) {
    this.#encoding = encoding;
    this.#elementCount = elementCount;
    this.#encode = encode;
    this.byteCount = encodedBytes(encoding, elementCount);
  }

  /** @param {number} offset @param {number} limit @returns {Buffer} From 1 to `limit` bytes from `offset`. */
  read(offset, limit) {
    if (offset === this.#begin + this.#piece.length) this.#advance(offset, limit);
    const begin = offset - this.#begin;
    return this.#piece.subarray(begin, begin + limit);
  }

  /** @param {number} offset @param {number} limit */
  #advance(offset, limit) {
    const { elements, bytes } = CODECS[this.#encoding];
    const first = (offset / bytes) * elements;
    let last = this.#elementCount;
    if (this.byteCount - offset > limit) {
      last = Math.min(first + Math.max(1, Math.floor(limit / bytes)) * elements, last);
    }
    // New memory for each message: gRPC may not have sent the one before.
    this.#piece = Buffer.allocUnsafe(encodedBytes(this.#encoding, last - first));
    this.#begin = offset;
    inPieces(this.#encoding, first, last, this.#piece, this.#encode);
  }
}

/** Elements that are decoded as they arrive. */
export class DecodingTarget {
  #encoding;
  #elementCount;
  #decode;
  #held = Buffer.alloc(0); // The beginning of a unit whose end has not come yet.

  /**
   * @param {Encoding} encoding
   * @param {number} elementCount
   * @param {(first: number, last: number, data: Buffer) => void} decode Takes the bytes of a range of elements, which begins
   *     with a unit. Called once for each element, in order.
   */
  constructor(encoding, elementCount, decode) {
    this.#encoding = encoding;
    this.#elementCount = elementCount;
    this.#decode = decode;
    this.byteCount = encodedBytes(encoding, elementCount);
  }

  /** @param {number} offset @param {Buffer} data Bytes that follow those before; they may end anywhere. */
  write(offset, data) {
    const { elements, bytes } = CODECS[this.#encoding];
    let begin = offset - this.#held.length;
    let rest = data;
    if (this.#held.length > 0) {
      const end = Math.min(begin + bytes, this.byteCount);
      this.#held = Buffer.concat([this.#held, data.subarray(0, end - offset)]); // copy: less than a unit.
      rest = data.subarray(end - offset);
      if (this.#held.length < end - begin) return;
      this.#decodeUnits((begin / bytes) * elements, this.#held);
      begin = end;
    }
    const atEnd = begin + rest.length === this.byteCount;
    const whole = atEnd ? rest.length : rest.length - (rest.length % bytes);
    this.#decodeUnits((begin / bytes) * elements, rest.subarray(0, whole));
    this.#held = Buffer.from(rest.subarray(whole)); // copy: less than a unit.
  }

  /** @param {number} first @param {Buffer} data Whole units. */
  #decodeUnits(first, data) {
    const { elements, bytes } = CODECS[this.#encoding];
    const last = Math.min(first + Math.ceil(data.length / bytes) * elements, this.#elementCount);
    inPieces(this.#encoding, first, last, data, this.#decode);
  }
}

/** @param {Encoding} encoding @param {Float32Array} values @returns {EncodingSource} */
export function encodingSource(encoding, values) {
  const { encode } = CODECS[encoding];
  return new EncodingSource(encoding, values.length, (first, last, data) =>
    encode(values.subarray(first, last), data),
  );
}

/** @param {Encoding} encoding @param {Float32Array} values @returns {DecodingTarget} */
export function decodingTarget(encoding, values) {
  const { decode } = CODECS[encoding];
  return new DecodingTarget(encoding, values.length, (first, last, data) =>
    decode(data, values.subarray(first, last)),
  );
}

/**
 * Receive INT8 differences to what is there.
 *
 * @param {Float32Array} reference Becomes the sum.
 * @param {Float32Array} values Receives the sum, too.
 * @returns {DecodingTarget}
 */
export function differenceTarget(reference, values) {
  return new DecodingTarget('INT8_BLOCKS', values.length, (first, last, data) => {
    const [sum, piece] = [reference.subarray(first, last), values.subarray(first, last)];
    decodeInt8Blocks(data, piece);
    add(sum, piece);
    piece.set(sum);
  });
}

/**
 * @param {Encoding} encoding
 * @param {number} first
 * @param {number} last
 * @param {Buffer} data
 * @param {(first: number, last: number, data: Buffer) => void} convert
 */
function inPieces(encoding, first, last, data, convert) {
  for (let begin = first; begin < last; begin += PIECE_ELEMENTS) {
    const end = Math.min(begin + PIECE_ELEMENTS, last);
    const at = encodedBytes(encoding, begin - first);
    convert(begin, end, data.subarray(at, at + encodedBytes(encoding, end - begin)));
  }
}

/** @param {Floats} values @param {Buffer} data */
function encodeBf16(values, data) {
  const bits = bitsOf(values);
  for (let i = 0; i < bits.length; i += 1) {
    const each = bits[i];
    let half = each >>> 16;
    // Half of what is rounded away, less one; and one more if what stays is odd: ties go to even.
    half = isNan(each) ? BF16_NAN : half + (((each & 0xffff) + 0x7fff + (half & 1)) >>> 16);
    data[2 * i] = half;
    data[2 * i + 1] = half >>> 8;
  }
}

/** @param {any} data @param {Float32Array} values */
function decodeBf16(data, values) {
  const bits = bitsOf(values);
  for (let i = 0; i < bits.length; i += 1) bits[i] = (data[2 * i] << 16) | (data[2 * i + 1] << 24);
}

/** @param {Floats} values @param {Buffer} data */
function encodeFp16(values, data) {
  const bits = bitsOf(values);
  for (let i = 0; i < bits.length; i += 1) {
    const magnitude = bits[i] & 0x7fffffff;
    let half = 0;
    if (magnitude > INFINITY) half = FP16_NAN;
    else if (magnitude >= FP16_OVERFLOW) half = 0x7c00;
    else if (magnitude >= FP16_NORMAL) {
      half = (magnitude - FP16_REBIAS + 0xfff + ((magnitude >>> 13) & 1)) >>> 13;
    } else half = Math.abs(values[i]) * 2 ** 24 + ROUND - ROUND; // In units of the smallest subnormal.
    if (half !== FP16_NAN) half |= (bits[i] >>> 16) & 0x8000;
    data[2 * i] = half;
    data[2 * i + 1] = half >>> 8;
  }
}

/** @param {any} data @param {Floats} values */
function decodeFp16(data, values) {
  const bits = bitsOf(values);
  for (let i = 0; i < bits.length; i += 1) {
    const half = data[2 * i] | (data[2 * i + 1] << 8);
    const sign = (half & 0x8000) << 16;
    const magnitude = (half & 0x7fff) << 13; // Its exponent and fraction, where FP32 has them.
    if (magnitude >= FP16_INFINITY) bits[i] = sign | INFINITY | magnitude;
    else if (magnitude >= FP16_LEAST) bits[i] = sign | (magnitude + FP16_REBIAS);
    else values[i] = (sign === 0 ? magnitude : -magnitude) * 2 ** -37; // Subnormal: 2^13 are worth 2^-24.
  }
}

/** @param {Floats} values @param {Buffer} data */
function encodeInt8Blocks(values, data) {
  let at = 0;
  for (let begin = 0; begin < values.length; begin += BLOCK_ELEMENTS) {
    const end = Math.min(begin + BLOCK_ELEMENTS, values.length);
    const scale = scaleOf(values, begin, end);
    if (Number.isNaN(scale)) data.writeUInt32LE(FP32_NAN, at);
    else data.writeFloatLE(scale, at);
    at += SCALE_BYTES;
    const divisor = scale > 0 ? scale : Infinity; // Of NaN, too: code 0, but for what is not finite.
    for (let i = begin; i < end; i += 1, at += 1) {
      const quotient = Math.fround(values[i] / divisor);
      data[at] = quotient + ROUND - ROUND;
    }
  }
}

/** @param {Floats} values @param {number} begin @param {number} end Of a block. @returns {number} */
function scaleOf(values, begin, end) {
  let largest = 0;
  for (let i = begin; i < end; i += 1) {
    const magnitude = Math.abs(values[i]);
    if (!(magnitude <= largest)) largest = magnitude;
    if (Number.isNaN(largest)) return NaN;
  }
  const scale = Math.fround(largest / CODE_MAX);
  if (Math.fround(scale * CODE_MAX) === Infinity) return NaN;
  return scale < SCALE_MIN ? 0 : scale;
}

/** @param {any} data @param {Floats} values */
function decodeInt8Blocks(data, values) {
  let at = 0;
  for (let begin = 0; begin < values.length; begin += BLOCK_ELEMENTS) {
    const end = Math.min(begin + BLOCK_ELEMENTS, values.length);
    const scale = data.readFloatLE(at);
    at += SCALE_BYTES;
    for (let i = begin; i < end; i += 1, at += 1) values[i] = ((data[at] << 24) >> 24) * scale;
  }
}

/** Add to each element of `sums`. @param {Floats} sums @param {Floats} values */
export function add(sums, values) {
  for (let i = 0; i < sums.length; i += 1) sums[i] += values[i];
}

/** @param {Float32Array} values @returns {Bits} */
function bitsOf(values) {
  return new Uint32Array(values.buffer, values.byteOffset, values.length);
}

/** @param {number} bits */
function isNan(bits) {
  return (bits & 0x7fffffff) > INFINITY;
}
