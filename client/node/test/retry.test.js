import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';

import {
  ClosedError,
  DeadlineError,
  LimitError,
  OptserveError,
  RequestError,
  SessionError,
  UnavailableError,
} from '../src/errors.js';
import { Retry, retryTerms } from '../src/retry.js';

const AWAY = new UnavailableError('nothing answers');

/** @param {import('../src/types.js').RetryOptions} [terms] */
async function met(terms) {
  const retry = new Retry(retryTerms({ backoffS: 0.02, jitter: 0, ...terms }));
  await retry.persevere(async () => 'hello');
  return retry;
}

/** An act that fails so often, and when it was attempted. @param {number} failures @param {OptserveError} [error] */
function failing(failures, error = AWAY) {
  /** @type {number[]} */
  const times = [];
  const act = async () => {
    times.push(performance.now());
    if (times.length <= failures) throw error;
    return 'done';
  };
  return { act, times };
}

test('what nothing answers is tried again, after waits that grow', async () => {
  const { act, times } = failing(3);
  assert.equal(await (await met()).persevere(act), 'done');
  const waits = times.slice(1).map((time, i) => time - Number(times[i]));
  for (const [i, least] of [20, 40, 80].entries()) {
    assert.ok(Number(waits[i]) > least - 2, `${waits}`); // Timers are early by up to a millisecond.
  }
});

test('a wait is no longer than the longest', async () => {
  const { act, times } = failing(6);
  await (await met({ backoffMaxS: 0.03 })).persevere(act);
  assert.ok(Number(times[6]) - Number(times[0]) < 1000, `${times}`);
});

test('the time after which it is given up is kept', async () => {
  const { act, times } = failing(Infinity);
  const begin = performance.now();
  await assert.rejects((await met({ giveUpAfterS: 0.3 })).persevere(act), AWAY);
  assert.ok(performance.now() - begin < 300 + 100);
  assert.ok(times.length >= 3);
});

test('the time is that of outages, and not of what lay between them', async () => {
  const times = [];
  const act = async (/** @type {number} */ _, /** @type {() => void} */ reached) => {
    times.push(performance.now());
    if (times.length > 4) return 'done';
    reached();
    await delay(200); // The stream was open for so long.
    throw AWAY;
  };
  const retry = await met({ giveUpAfterS: 0.3, backoffFactor: 1 });
  assert.equal(await retry.persevere(act), 'done');
  assert.equal(times.length, 5);
});

test('the server is not asked before the time that it has said', async () => {
  const { act, times } = failing(
    1,
    new LimitError('full', { reason: 'TOO_MANY', retryAfterS: 0.2 }),
  );
  await (await met()).persevere(act);
  assert.ok(Number(times[1]) - Number(times[0]) >= 198);
});

for (const error of [
  new LimitError('too large', { reason: 'LIMIT_EXCEEDED' }),
  new RequestError('wrong', { reason: 'INVALID_FIELD' }),
  new SessionError('they did not come', { reason: 'ROUND_TIMEOUT', retryAfterS: 0 }),
  new DeadlineError('no answer'),
]) {
  test(`${error.name} ${error.reason ?? ''} is not tried again`, async () => {
    const { act, times } = failing(1, error);
    await assert.rejects((await met()).persevere(act), error);
    assert.equal(times.length, 1);
  });
}

test('a server that has never answered may be the wrong one: nothing is tried again', async () => {
  const retry = new Retry(retryTerms({ backoffS: 0.01 }));
  await assert.rejects(retry.persevere(failing(1).act), AWAY);
  const full = new LimitError('full', { reason: 'TOO_MANY', retryAfterS: 0 });
  assert.equal(await retry.persevere(failing(1, full).act), 'done');
  assert.equal(await retry.persevere(failing(1).act), 'done');
});

test('who waits is told when the client is closed', async () => {
  const retry = await met({ backoffS: 60, backoffMaxS: 60 });
  const waiting = retry.persevere(failing(1).act);
  await delay(20);
  retry.close();
  await assert.rejects(waiting, ClosedError);
});

test('no patience is that of nobody', async () => {
  const { act, times } = failing(1);
  await assert.rejects((await met({ giveUpAfterS: 0 })).persevere(act), AWAY);
  assert.equal(times.length, 1);
});

for (const [name, value] of /** @type {const} */ ([
  ['giveUpAfterS', -1],
  ['backoffS', Number.NaN],
  ['backoffFactor', 0.5],
  ['backoffMaxS', Infinity],
  ['jitter', 2],
  ['retries', 4],
])) {
  test(`${name}: ${value} is refused`, () => {
    assert.throws(() => retryTerms({ [name]: value }), { field: `retry.${name}` });
  });
}
