/** Tensor framing: how the bytes of tensors become chunks, and how chunks fill tensors again. */

/** @typedef {{tensor: number, offset: number, data: Buffer}} Chunk */

/**
 * The bytes of a tensor as they go onto the wire; `read` returns from 1 to `limit` of them, from `offset`.
 *
 * @typedef {{byteCount: number, read: (offset: number, limit: number) => Buffer}} Source
 */

/**
 * Where the bytes of a tensor go as they come off the wire: in order, without gaps, cut anywhere.
 *
 * @typedef {{byteCount: number, write: (offset: number, data: Buffer) => void}} Target
 */

export const CHUNK_BYTES_MAX = 1 << 20; // 1 MiB: a quarter of gRPC's default limit of 4 MiB.
const MESSAGE_BYTES_MAX = 4 << 20; // gRPC's default limit in every language.
const HEADROOM_BYTES = 64 << 10; // What a message may hold beside the data of tensors.

/** Bytes of tensors that travel in one message; more goes as chunks. */
export const MESSAGE_DATA_BYTES_MAX = MESSAGE_BYTES_MAX - HEADROOM_BYTES;

/** Memory that holds a tensor's bytes exactly as they travel: a source, and a target. */
export class Memory {
  #bytes;

  /** @param {Buffer} bytes */
  constructor(bytes) {
    this.#bytes = bytes;
    this.byteCount = bytes.length;
  }

  /** @param {number} offset @param {number} limit @returns {Buffer} A view. */
  read(offset, limit) {
    return this.#bytes.subarray(offset, offset + limit);
  }

  /** @param {number} offset @param {Buffer} data */
  write(offset, data) {
    data.copy(this.#bytes, offset); // copy: message to tensor.
  }
}

/** Return all of a source's bytes, for a message that holds a tensor at once. @param {Source} source @returns {Buffer} */
export function whole(source) {
  const parts = [];
  for (let offset = 0; offset < source.byteCount;) {
    const part = source.read(offset, source.byteCount - offset);
    parts.push(part);
    offset += part.length;
  }
  return parts.length === 1 ? /** @type {Buffer} */ (parts[0]) : Buffer.concat(parts);
}

/**
 * Yield the sources' bytes as messages of at most `chunkBytesMax` bytes of data, small tensors packed together.
 *
 * @param {Iterable<Source>} sources One for each tensor, in the announced order. Read when their message is asked for.
 * @param {number} [chunkBytesMax]
 * @returns {Generator<{chunks: Chunk[]}, void, void>}
 */
export function* split(sources, chunkBytesMax = CHUNK_BYTES_MAX) {
  /** @type {Chunk[]} */
  let chunks = [];
  let room = chunkBytesMax;
  let tensor = 0;
  for (const source of sources) {
    let offset = 0;
    while (offset < source.byteCount) {
      const data = source.read(offset, room);
      chunks.push({ tensor, offset, data });
      offset += data.length;
      room -= data.length;
      if (room === 0) {
        yield { chunks };
        chunks = [];
        room = chunkBytesMax;
      }
    }
    tensor += 1;
  }
  if (chunks.length > 0) yield { chunks };
}

/** Tensors that are being filled by chunks. */
export class Assembly {
  #targets;
  #received;

  /** @param {Target[]} targets One for each announced tensor. */
  constructor(targets) {
    this.#targets = targets;
    this.#received = targets.map(() => 0);
  }

  /**
   * Write chunks where they belong.
   *
   * @param {Chunk[]} chunks
   * @throws {RangeError} A chunk leaves a gap, overlaps or belongs nowhere. Those before it have been written.
   */
  add(chunks) {
    for (const { tensor, offset, data } of chunks) {
      const target = this.#targets[tensor];
      if (target === undefined)
        throw new RangeError(`a chunk belongs to tensor ${tensor}, which was not announced`);
      if (
        offset !== this.#received[tensor] ||
        data.length === 0 ||
        offset + data.length > target.byteCount
      ) {
        throw new RangeError(
          `a chunk of tensor ${tensor} has ${data.length} bytes at ${offset};` +
            ` ${this.#received[tensor]} of ${target.byteCount} were there`,
        );
      }
      target.write(offset, data);
      this.#received[tensor] = offset + data.length;
    }
  }

  /**
   * Check that every tensor is complete.
   *
   * @throws {RangeError} One is not.
   */
  finish() {
    for (const [tensor, target] of this.#targets.entries()) {
      if (this.#received[tensor] !== target.byteCount) {
        throw new RangeError(
          `tensor ${tensor} has ${target.byteCount} bytes; ${this.#received[tensor]} came`,
        );
      }
    }
  }
}
