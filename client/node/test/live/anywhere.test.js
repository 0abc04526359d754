/** Connections that are cut anywhere, by a seed: OPTSERVE_SEED=7 plays other cuts. Needs a server, as cut.test.js does. */
import assert from 'node:assert/strict';
import { test } from 'node:test';

import { address, connected, proxied } from './ground.js';

/** @typedef {import('../../src/index.js').NewSession} NewSession */

const SEED = Number(process.env.OPTSERVE_SEED ?? 1);
const STEPS = 8;
const SMALL = [300, 7];
const LARGE = [700_000, 7];

/** Sizes of the parameters, what else the session has, about how many bytes a step sends, and how it is taken. */
const FORMS =
  /** @type {[string, number[], Partial<NewSession>, number, 'step' | 'stepUnary'][]} */ ([
    ['packed', SMALL, {}, 1_500, 'step'],
    ['in chunks', LARGE, {}, 2_800_000, 'step'],
    ['in BF16', LARGE, { wire: { gradients: 'BF16' } }, 1_400_000, 'step'],
    [
      'in INT8',
      LARGE,
      { wire: { gradients: 'INT8_BLOCKS', parameters: 'INT8_BLOCKS' } },
      720_000,
      'step',
    ],
    ['in one message', SMALL, {}, 1_500, 'stepUnary'],
  ]);

for (const [i, [what, sizes, options, byteCount, take]] of FORMS.entries()) {
  test(`steps ${what} that are cut anywhere are applied once`, async () => {
    const random = generator(SEED * FORMS.length + i);
    const { proxy, through } = await proxied();
    const client = connected(through, { retry: { backoffS: 0.01, backoffMaxS: 0.2 } });
    await client.serverInfo();
    const parameters = named(sizes, () => 1);
    const spec = { parameters, optimizer: { sgd: { lr: 0.01, momentum: 0.9 } }, ...options };
    const cut = await client.createSession(spec);
    const whole = await connected(address).createSession(spec);
    for (let step = 1; step <= STEPS; step += 1) {
      const gradients = named(sizes, (at) => ((at * 97 + step * 31) % 251) / 100);
      if (step % 4 === 0) delete gradients.p1; // So that the others are announced.
      const way = random() < 0.5 ? 'sentBytesMax' : 'answerBytesMax';
      proxy[way] = Math.floor(random() * byteCount);
      const [mine, expected] = [await cut[take](gradients), await whole[take](gradients)];
      assert.deepEqual([mine.step, mine.gradientNorm], [step, expected.gradientNorm]);
    }
    assert.ok(proxy.cuts >= STEPS / 2, `${proxy.cuts} cuts`);
    proxy.sentBytesMax = proxy.answerBytesMax = Infinity;
    assert.deepEqual(await cut.download(), await whole.download());
    await Promise.all([cut.delete(), whole.delete()]);
  });
}

/** @param {number[]} sizes @param {(at: number) => number} value @returns {Record<string, Float32Array>} */
function named(sizes, value) {
  const arrays = sizes.map((size) => new Float32Array(size).map((_, at) => value(at)));
  return Object.fromEntries(arrays.map((array, i) => [`p${i}`, array]));
}

/** Xorshift. @param {number} seed Not 0; multiplied, for small ones would begin with small numbers. */
function generator(seed) {
  let state = Math.imul(seed, 0x9e3779b9);
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}
