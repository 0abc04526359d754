/** Tensor framing: how the bytes of tensors become chunks, and how chunks fill tensors again. */

/** @typedef {{tensor: number, offset: number, data: Buffer}} Chunk */

export const CHUNK_BYTES_MAX = 1 << 20; // 1 MiB: a quarter of gRPC's default limit of 4 MiB.
const MESSAGE_BYTES_MAX = 4 << 20; // gRPC's default limit in every language.
const HEADROOM_BYTES = 64 << 10; // What a message may hold beside the data of tensors.

/** Bytes of tensors that travel in one message; more goes as chunks. */
export const MESSAGE_DATA_BYTES_MAX = MESSAGE_BYTES_MAX - HEADROOM_BYTES;

/**
 * Yield the buffers' bytes as messages of at most `chunkBytesMax` bytes of data, small tensors packed together.
 *
 * @param {Iterable<Buffer>} buffers One for each tensor, in the announced order. The chunks are views of them.
 * @param {number} [chunkBytesMax]
 * @returns {Generator<{chunks: Chunk[]}, void, void>}
 */
export function* split(buffers, chunkBytesMax = CHUNK_BYTES_MAX) {
  /** @type {Chunk[]} */
  let chunks = [];
  let room = chunkBytesMax;
  let tensor = 0;
  for (const buffer of buffers) {
    let offset = 0;
    while (offset < buffer.length) {
      const data = buffer.subarray(offset, offset + room);
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

  /** @param {Buffer[]} targets Memory of each announced tensor. */
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
        offset + data.length > target.length
      ) {
        throw new RangeError(
          `a chunk of tensor ${tensor} has ${data.length} bytes at ${offset};` +
            ` ${this.#received[tensor]} of ${target.length} were there`,
        );
      }
      data.copy(target, offset); // copy: message to tensor.
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
      if (this.#received[tensor] !== target.length) {
        throw new RangeError(
          `tensor ${tensor} has ${target.length} bytes; ${this.#received[tensor]} came`,
        );
      }
    }
  }
}
