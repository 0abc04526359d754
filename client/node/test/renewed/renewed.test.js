/**
 * Tokens that are exchanged while streams are open. Needs a server that asks for them: OPTSERVE_ADDRESS, and its file of tokens,
 * OPTSERVE_TOKENS, which is written here.
 */
import assert from 'node:assert/strict';
import { createHash, randomUUID } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { after, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';

import { connect, UnauthenticatedError } from '../../src/index.js';
import { setting } from '../setting.js';

const PATIENCE_MS = 30_000;

for (const elements of [8, 1 << 20]) {
  test(`a stream of ${elements} elements goes on with another token, if there is one`, async () => {
    const [old, other] = [randomUUID(), randomUUID()];
    let mine = old;
    await accept(old);
    const source = connected(() => mine);
    const fixed = connected(old);
    const model = {
      parameters: { w: new Float32Array(elements) },
      optimizer: { sgd: { lr: 1 } },
    };
    const [session, stranded] = [
      await source.createSession(model),
      await fixed.createSession(model),
    ];
    const gradients = { w: new Float32Array(elements).fill(1) };
    for (const each of [session, stranded]) assert.equal((await each.step(gradients)).step, 1);

    mine = other;
    await accept(other, old);
    const { step, parameters } = await session.step(gradients);
    assert.equal(step, 2);
    assert.ok(parameters.w?.data.every((value) => value === -2));
    await assert.rejects(stranded.step(gradients), (/** @type {any} */ error) => {
      assert.ok(error instanceof UnauthenticatedError);
      assert.equal(error.retryAfterS, undefined); // It has tried, and was not let in.
      return true;
    });

    const left = await source.getSession(stranded.id);
    assert.equal(left.status.steps, 1);
    for (const each of [left, session]) await each.delete();
  });
}

/**
 * Have the server accept one token, and wait until it does, and accepts another one no more.
 *
 * @param {string} token
 * @param {string} [gone]
 */
async function accept(token, gone) {
  const sha256 = createHash('sha256').update(token).digest('hex');
  writeFileSync(setting('TOKENS'), `[[token]]\ntenant = "one"\nsha256 = "${sha256}"\n`);
  const deadline = performance.now() + PATIENCE_MS;
  while (!(await isAccepted(token)) || (gone !== undefined && (await isAccepted(gone)))) {
    assert.ok(performance.now() < deadline);
    await delay(100);
  }
}

/** @param {string} token */
async function isAccepted(token) {
  const client = connected(token);
  try {
    await client.serverInfo();
    return true;
  } catch (error) {
    assert.ok(error instanceof UnauthenticatedError);
    return false;
  } finally {
    await client.close();
  }
}

/** @param {import('../../src/index.js').ClientOptions['token']} token */
function connected(token) {
  const client = connect(setting('ADDRESS'), { token });
  after(() => client.close());
  return client;
}
