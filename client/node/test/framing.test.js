import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Assembly, CHUNK_BYTES_MAX, Memory, split, whole } from '../src/framing.js';

/** @param {Buffer[]} buffers */
const memories = (buffers) => buffers.map((each) => new Memory(each));

test('chunks are views of the buffers, and no message holds more than allowed', () => {
  const buffers = [Buffer.alloc(3, 1), Buffer.alloc(0), Buffer.alloc(10, 2), Buffer.alloc(1, 3)];
  const messages = [...split(memories(buffers), 4)];
  const sizes = messages.map(({ chunks }) => chunks.map(({ data }) => data.length));
  assert.deepEqual(sizes, [[3, 1], [4], [4], [1, 1]]);
  assert.equal(messages[1]?.chunks[0]?.data.buffer, buffers[2]?.buffer);
});

test('a buffer of a whole number of chunks leaves no empty message behind', () => {
  const messages = [...split(memories([Buffer.alloc(2 * CHUNK_BYTES_MAX)]))];
  assert.deepEqual(
    messages.map(({ chunks }) => chunks.map(({ offset }) => offset)),
    [[0], [CHUNK_BYTES_MAX]],
  );
});

test('nothing at all makes no message', () => {
  assert.deepEqual([...split([]), ...split(memories([Buffer.alloc(0)]))], []);
});

test('an assembly puts together what was split', () => {
  const sent = [Buffer.from('tensors'), Buffer.alloc(0), Buffer.from('of'), Buffer.from('bytes')];
  const received = sent.map(({ length }) => Buffer.alloc(length));
  const assembly = new Assembly(memories(received));
  for (const { chunks } of split(memories(sent), 3)) assembly.add(chunks);
  assembly.finish();
  assert.deepEqual(received, sent);
});

for (const [what, chunk] of /** @type {[string, import('../src/framing.js').Chunk][]} */ ([
  ['leaves a gap', { tensor: 0, offset: 3, data: Buffer.alloc(1) }],
  ['overlaps', { tensor: 0, offset: 1, data: Buffer.alloc(1) }],
  ['is empty', { tensor: 0, offset: 2, data: Buffer.alloc(0) }],
  ['runs past the end', { tensor: 0, offset: 2, data: Buffer.alloc(3) }],
  ['belongs nowhere', { tensor: 1, offset: 0, data: Buffer.alloc(1) }],
])) {
  test(`a chunk that ${what} is refused`, () => {
    const assembly = new Assembly(memories([Buffer.alloc(4)]));
    assembly.add([{ tensor: 0, offset: 0, data: Buffer.alloc(2) }]);
    assert.throws(() => assembly.add([chunk]), RangeError);
  });
}

test('a tensor that is not complete is noticed', () => {
  const assembly = new Assembly(memories([Buffer.alloc(4)]));
  assembly.add([{ tensor: 0, offset: 0, data: Buffer.alloc(2) }]);
  assert.throws(() => assembly.finish(), RangeError);
});

test('a whole tensor is what its source gives, however it gives it', () => {
  const bytes = Buffer.from('a tensor');
  const inPairs = {
    byteCount: bytes.length,
    /** @param {number} offset */
    read: (offset) => bytes.subarray(offset, offset + 2),
  };
  assert.deepEqual(whole(inPairs), bytes);
  assert.deepEqual(whole(new Memory(bytes)), bytes);
  assert.equal(whole(new Memory(Buffer.alloc(0))).length, 0);
});
