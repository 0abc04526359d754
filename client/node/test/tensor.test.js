import assert from 'node:assert/strict';
import { test } from 'node:test';

import { RequestError } from '../src/errors.js';
import {
  arrived,
  emptyTensor,
  memoryOf,
  tensorFromMessage,
  tensorOf,
  tensorToMessage,
  wireBytes,
} from '../src/tensor.js';

/** @typedef {import('../src/types.js').TensorLike} TensorLike */
/** @typedef {import('../src/types.js').TensorHeader} TensorHeader */

test('the wire has little-endian bytes', () => {
  const tensor = tensorOf(Float32Array.of(1, -2), { path: 'w' });
  assert.equal(wireBytes(tensor).toString('hex'), '0000803f000000c0');
});

test('what arrives is what was sent, for every width', () => {
  for (const data of [Int8Array, Int16Array, Float32Array, Float64Array].map((a) => a.of(3, -4))) {
    const sent = tensorOf(data, { path: 'w' });
    const received = emptyTensor(sent);
    wireBytes(sent).copy(memoryOf(received.data));
    arrived(received);
    assert.deepEqual(received, sent);
  }
});

test('bytes of a message may lie anywhere', () => {
  const sent = tensorOf(BigInt64Array.of(5n, -6n), { path: 'w' });
  const message = tensorToMessage(sent, 'w');
  const shifted = Buffer.concat([Buffer.alloc(1), message.data]).subarray(1);
  assert.deepEqual(tensorFromMessage({ ...message, data: shifted }), sent);
});

test('a view of a larger buffer sends its own elements only', () => {
  const tensor = tensorOf(Float32Array.of(0, 1, 2, 3).subarray(1, 3), { path: 'w' });
  assert.equal(wireBytes(tensor).length, 8);
});

test('elements alone take shape and data type of their parameter', () => {
  const header = /** @type {const} */ ({ dataType: 'BF16', shape: [2, 2] });
  assert.deepEqual(tensorOf(new Uint16Array(4), { header, path: 'w' }).shape, [2, 2]);
  assert.equal(tensorOf(new Uint16Array(4), { header, path: 'w' }).dataType, 'BF16');
});

test('elements that are not as many stay what they are, so that the server refuses them', () => {
  const header = /** @type {const} */ ({ dataType: 'FP32', shape: [2, 2] });
  assert.deepEqual(tensorOf(new Float32Array(3), { header, path: 'w' }).shape, [3]);
  assert.equal(tensorOf(new Float64Array(4), { header, path: 'w' }).dataType, 'FP64');
});

for (const [what, given, reason] of /** @type {[string, any, string][]} */ ([
  ['an array of numbers', [1, 2], 'INVALID_FIELD'],
  ['null', null, 'INVALID_FIELD'],
  ['16 bits without a data type', new Uint16Array(2), 'DATA_TYPE_MISMATCH'],
  ['a DataView', new DataView(new ArrayBuffer(4)), 'DATA_TYPE_MISMATCH'],
  ['an unknown data type', { data: new Int8Array(1), dataType: 'FP8' }, 'DATA_TYPE_MISMATCH'],
  ['an unfit data type', { data: new Float64Array(1), dataType: 'FP32' }, 'DATA_TYPE_MISMATCH'],
  ['an unfit shape', { data: new Float32Array(3), shape: [2, 2] }, 'BYTE_COUNT_MISMATCH'],
])) {
  test(`${what} is refused as a tensor`, () => {
    assert.throws(
      () => tensorOf(given, { path: 'gradients.w' }),
      (error) =>
        error instanceof RequestError &&
        error.reason === reason &&
        error.message.includes('gradients.w'),
    );
  });
}

test('an array to receive into must fit', () => {
  const header = /** @type {const} */ ({ dataType: 'FP32', shape: [2] });
  assert.throws(() => emptyTensor(header, new Float32Array(3)), RequestError);
  assert.throws(() => emptyTensor(header, new Float64Array(2)), RequestError);
});
