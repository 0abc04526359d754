import assert from 'node:assert/strict';
import { test } from 'node:test';

import { StepDigest } from '../src/digest.js';
import {
  decodedFromMessage,
  encodingOf,
  GradientSources,
  ParameterTargets,
} from '../src/encoded.js';
import { decodingTarget, encodedBytes, EncodingSource } from '../src/encodings.js';
import { whole } from '../src/framing.js';

/** @typedef {import('../src/types.js').Tensor} Tensor */

/** @param {number[]} values @returns {Tensor} */
const tensor = (...values) => ({
  dataType: 'FP32',
  shape: [values.length],
  data: Float32Array.from(values),
});

/** @param {GradientSources} sources @param {number} step @param {Tensor} gradient */
function sent(sources, step, gradient) {
  const [source] = sources.of(step, new Map([['w', gradient]]), new StepDigest([]));
  return whole(/** @type {import('../src/framing.js').Source} */ (source));
}

/** @param {Buffer} data @param {number} count */
function decoded(data, count) {
  const values = new Float32Array(count);
  decodingTarget('INT8_BLOCKS', values).write(0, data);
  return values;
}

test('what INT8 rounds away is sent with the next gradient', () => {
  const sources = new GradientSources('INT8_BLOCKS');
  const gradient = tensor(127, 0.3);
  const seen = [1, 2, 3, 4].map((step) => {
    const data = sent(sources, step, gradient);
    sources.answered(step);
    return decoded(data, 2)[1];
  });
  assert.deepEqual(seen, [0, 1, 0, 0]); // Of 0.3, 0.6, -0.1 and 0.2.
});

test('a step that is taken again is sent with the same bytes', () => {
  const sources = new GradientSources('INT8_BLOCKS');
  const gradient = tensor(127, 0.3);
  sent(sources, 1, gradient);
  sources.answered(1);
  const first = sent(sources, 2, gradient);
  assert.deepEqual(sent(sources, 2, gradient), first);
  sources.answered(2);
  sent(sources, 2, tensor(127, 0.45)); // A replay of an answered step: the server does not use it.
  sources.answered(2);
  assert.equal(decoded(sent(sources, 3, gradient), 2)[1], 0);
});

test('a step that was applied though its answer was lost counts once the next one is taken', () => {
  const sources = new GradientSources('INT8_BLOCKS');
  sent(sources, 1, tensor(127, 0.3));
  assert.equal(decoded(sent(sources, 2, tensor(127, 0.3)), 2)[1], 1);
});

test('a step that the server has lost is taken again with what it rounds away', () => {
  const sources = new GradientSources('INT8_BLOCKS');
  for (const step of [1, 2, 3]) {
    sent(sources, step, tensor(127, 0.4));
    sources.answered(step);
  }
  sources.rewind(1);
  assert.equal(decoded(sent(sources, 2, tensor(127, 0.4)), 2)[1], 0);
  assert.equal(decoded(sent(sources, 3, tensor(127, 0.4)), 2)[1], 1);
});

test('a gradient that is not finite is sent as NaN, and leaves nothing behind', () => {
  const sources = new GradientSources('INT8_BLOCKS');
  assert.deepEqual(decoded(sent(sources, 1, tensor(NaN, 1)), 2), Float32Array.of(NaN, NaN));
  sources.answered(1);
  assert.deepEqual(decoded(sent(sources, 2, tensor(127, 1)), 2), Float32Array.of(127, 1));
});

test('what is not FP32 is sent as it is, for the server to refuse', () => {
  const sources = new GradientSources('BF16');
  const data = sent(sources, 1, { dataType: 'BF16', shape: [1], data: Uint16Array.of(0x3f80) });
  assert.equal(data.toString('hex'), '803f');
});

test('differences build on the answer before, and on nothing else', () => {
  const targets = new ParameterTargets('INT8_BLOCKS');
  assert.throws(() => targets.of('INT8_BLOCKS', [['w', tensor(0, 0)]]), RangeError);
  /** @type {[string, Tensor][]} */
  const answer = [['w', tensor(0, 0)]];
  targets.of(undefined, answer)[0]?.write(0, Buffer.from(Float32Array.of(5, 6).buffer));
  targets.answered(undefined, answer);
  const mine = answer[0]?.[1].data;
  mine?.fill(/** @type {never} */ (0)); // An answer is the user's: what it builds on is not.
  const data = sent(new GradientSources('INT8_BLOCKS'), 1, tensor(127, -1));
  targets.of('INT8_BLOCKS', answer)[0]?.write(0, data);
  assert.deepEqual(mine, Float32Array.of(132, 5));
});

test('a message of other bytes than its encoding needs is refused', () => {
  const header = { name: 'w', dataType: 'DATA_TYPE_FP32', shape: [3] };
  assert.throws(() => decodedFromMessage({ header, data: Buffer.alloc(12) }, 'BF16'), RangeError);
  const { data } = decodedFromMessage(
    { header, data: Buffer.alloc(6) },
    encodingOf('ENCODING_BF16'),
  );
  assert.deepEqual(data, new Float32Array(3));
  assert.equal(encodingOf('ENCODING_UNSPECIFIED'), undefined);
});

test('a message is as full as whole blocks allow', () => {
  const source = new EncodingSource('INT8_BLOCKS', 1000, () => {});
  const sizes = [];
  for (let at = 0; at < source.byteCount; at += sizes.at(-1) ?? 0) {
    sizes.push(source.read(at, 600).length);
  }
  assert.deepEqual(sizes, [520, 496]);
  assert.equal(encodedBytes('INT8_BLOCKS', 1000), 1016);
});
