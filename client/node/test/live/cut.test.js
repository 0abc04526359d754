/** Steps whose connection breaks, wherever it does. Needs a server: OPTSERVE_ADDRESS=host:port node --test test/live/ */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';

import { ClosedError, StepUnknownError, UnavailableError } from '../../src/index.js';
import { address, connected, counted, ELEMENTS, ones, proxied } from './ground.js';

const GRADIENT_BYTES = ones.byteLength;
const SMALL = { parameters: { w: new Float32Array(3) } };
const MESSAGES_BYTES = 64 << 10; // Room for everything that is sent beside gradients.

test('a step that is cut off while it is sent is sent again, and applied once', async () => {
  const { proxy, through } = await proxied();
  const { session } = await counted({ through });
  await session.step({ w: ones });
  proxy.sentBytesMax = GRADIENT_BYTES / 2;
  const second = await session.step({ w: ones });
  assert.equal(proxy.cuts, 1);
  assert.deepEqual([second.step, second.replayed], [2, false]);
  assert.ok(second.parameters.w?.data.every((value) => value === -2));
});

test('a step that is cut off while it is answered is applied once, and not sent again', async () => {
  const { proxy, through } = await proxied();
  const { session } = await counted({ through });
  await session.step({ w: ones });
  const before = proxy.sentBytes;
  proxy.answerBytesMax = 1 << 20;
  const second = await session.step({ w: ones });
  assert.equal(proxy.cuts, 1);
  assert.deepEqual([second.step, second.replayed], [2, true]);
  assert.ok(second.parameters.w?.data.every((value) => value === -2));
  assert.ok(proxy.sentBytes - before < GRADIENT_BYTES + MESSAGES_BYTES);
  assert.ok((await session.step({ w: ones })).parameters.w?.data.every((value) => value === -3));
});

test('a small step that is cut off while it is answered is applied once', async () => {
  const { proxy, through } = await proxied();
  const { session } = await counted({ through, spec: SMALL });
  const gradients = { w: Float32Array.of(1, 1, 1) };
  await session.step(gradients);
  proxy.answerBytesMax = 0;
  const second = await session.step(gradients);
  assert.equal(proxy.cuts, 1);
  assert.deepEqual([second.step, second.replayed], [2, true]);
  assert.deepEqual(second.parameters.w?.data, Float32Array.of(-2, -2, -2));
  proxy.answerBytesMax = 0;
  const third = await session.stepUnary(gradients);
  assert.equal(proxy.cuts, 2);
  assert.deepEqual(third.parameters.w?.data, Float32Array.of(-3, -3, -3));
});

test('what INT8 has rounded away is the same after a cut', async () => {
  const { proxy, through } = await proxied();
  const spec = { wire: { gradients: /** @type {const} */ ('INT8_BLOCKS') } };
  const cut = await counted({ through, spec });
  const whole = await counted({ spec });
  const gradients = { w: ones.map((_, i) => (i % 251) / 250) };
  for (const where of ['nowhere', 'sentBytesMax', 'answerBytesMax', 'sentBytesMax', 'nowhere']) {
    if (where !== 'nowhere') proxy[/** @type {'sentBytesMax'} */ (where)] = ELEMENTS / 2;
    const [mine, expected] = [
      await cut.session.step(gradients),
      await whole.session.step(gradients),
    ];
    assert.deepEqual(mine.parameters.w?.data, expected.parameters.w?.data);
  }
  assert.equal(proxy.cuts, 3);
});

test('a contribution that waits for the other workers goes on waiting after a cut', async () => {
  const { proxy, through } = await proxied();
  const { client, session } = await counted({ through, spec: { workers: 2 } });
  const [first, second] = [await session.join(0), await (await direct(session.id)).join(1)];
  const mine = first.step({ w: ones });
  while (!(await (await direct(session.id)).getContribution(0)).step) await delay(10);
  const before = proxy.sentBytes;
  proxy.cut();
  await client.serverInfo(); // There is a way again.
  const other = second.step({ w: ones.map(() => 3) });
  const [a, b] = await Promise.all([mine, other]);
  assert.deepEqual([a.step, b.step], [1, 1]);
  assert.ok(a.parameters.w?.data.every((value) => value === -2)); // The mean of 1 and 3.
  assert.ok(proxy.sentBytes - before < MESSAGES_BYTES);
});

test('a step whose round is given up just when it is asked for is sent whole', async () => {
  const { proxy, through } = await proxied();
  const { session } = await counted({ through, spec: { workers: 2 } });
  const [first, second] = [await session.join(0), await (await direct(session.id)).join(1)];
  const huge = ones.map(() => 2 ** 127);
  const mine = first.step({ w: huge });
  while (!(await (await direct(session.id)).getContribution(0)).step) await delay(10);
  const before = proxy.sentBytes;
  const gate = proxy.withhold();
  proxy.cut();
  await gate.come; // The server has said that the step waits, and nobody has heard it.
  await assert.rejects(second.step({ w: huge }), { reason: 'NON_FINITE_GRADIENT' }); // Their sum is.
  gate.open();
  const other = second.step({ w: ones });
  const [a, b] = await Promise.all([mine, other]);
  assert.deepEqual([a.step, b.step], [1, 1]);
  assert.ok(a.parameters.w?.data.every((value) => value === -(2 ** 126))); // One is lost in it.
  assert.ok(proxy.sentBytes - before > GRADIENT_BYTES);
});

test('who waits for the step of another goes on when its round is given up', async () => {
  const { session } = await counted({ spec: { ...SMALL, workers: 2 } });
  const huge = { w: new Float32Array(3).fill(2 ** 127) };
  const given = (await session.join(0)).step(huge).catch((error) => error);
  const { proxy, through } = await proxied();
  const heir = await connected(through).getSession(session.id);
  while (!(await heir.getContribution(0)).step) await delay(10);
  await session.close();
  assert.ok((await given) instanceof ClosedError);
  const second = await (await direct(session.id)).join(1);
  const gate = proxy.withhold();
  proxy.cut();
  const resumed = heir.resume(0);
  await gate.come; // Of GetContribution: the step waits.
  await assert.rejects(second.step(huge), { reason: 'NON_FINITE_GRADIENT' });
  gate.open();
  assert.equal((await resumed).steps, 0);
});

test('a connection that has died in silence is left, and so is its seat', async () => {
  const { proxy, through } = await proxied();
  const channel = { 'grpc.keepalive_timeout_ms': 500 };
  const { session } = await counted({ through, keepaliveS: 1, channel });
  await session.step({ w: ones });
  proxy.stall(); // The server does not notice: its side stays open.
  const second = await session.step({ w: ones });
  assert.equal(second.step, 2);
  assert.ok(second.parameters.w?.data.every((value) => value === -2));
});

test('a step without an answer is unknown until somebody asks', async () => {
  const { proxy, through } = await proxied();
  const { session } = await counted({ through, retry: { giveUpAfterS: 0.3 } });
  await session.step({ w: ones });
  proxy.answerBytesMax = 1 << 20;
  proxy.staysCut = true;
  const unknown = await rejection(session.step({ w: ones }));
  assert.ok(unknown instanceof StepUnknownError);
  assert.ok(unknown.cause instanceof UnavailableError);
  assert.deepEqual([unknown.step, unknown.worker], [2, 0]);

  proxy.restore();
  const { step, digest, applied, result, steps } = await session.getContribution();
  assert.deepEqual([step, applied, steps], [2, true, 2]);
  assert.deepEqual(digest, unknown.digest);
  assert.deepEqual([result?.step, result?.rates], [2, { default: 1 }]);
  const again = await session.step({ w: ones });
  assert.deepEqual([again.step, again.replayed], [2, true]);
  assert.equal((await session.step({ w: ones })).step, 3);
});

test('other content under the number of a step that was taken is refused', async () => {
  const { session } = await counted({ spec: SMALL });
  const [content, other] = [{ w: Float32Array.of(1, 1, 1) }, { w: Float32Array.of(1, 1, 2) }];
  await session.step(content);
  await assert.rejects(session.step(other, { step: 1 }), { reason: 'STEP_CONFLICT' });
  assert.equal((await session.step(content, { step: 1 })).replayed, true);
  await session.close();
  await assert.rejects(session.stepUnary(other, { step: 1 }), { reason: 'STEP_CONFLICT' });
  assert.equal((await session.stepUnary(content, { step: 1 })).replayed, true);
});

test('nothing is unknown of a step that was not sent', async () => {
  const { proxy, through } = await proxied();
  const { session } = await counted({ through, retry: { giveUpAfterS: 0.3 } });
  await session.step({ w: ones });
  proxy.staysCut = true;
  proxy.cut();
  await delay(100); // Until it is noticed: what gRPC takes before may have been sent.
  assert.ok((await rejection(session.step({ w: ones }))) instanceof UnavailableError);
  assert.equal((await (await direct(session.id)).getContribution()).step, 1);
});

test('who takes the place of another waits for the step that it had sent', async () => {
  const { session } = await counted({ spec: { workers: 2 } });
  const first = await session.join(0);
  const given = first.step({ w: ones }).catch((error) => error);
  const other = await direct(session.id);
  while (!(await other.getContribution(0)).step) await delay(10);
  await first.close();
  assert.ok((await given) instanceof ClosedError);

  const resumed = other.resume(0);
  await (await (await direct(session.id)).join(1)).step({ w: ones.map(() => 3) });
  const { steps, parameters } = await resumed;
  assert.equal(steps, 1);
  assert.ok(parameters.w?.data.every((value) => value === -2)); // The mean of 1 and 3.
  assert.deepEqual((await other.resume(1)).parameters.w?.data, parameters.w?.data);
});

test('a session whose creation is answered by nobody is made once', async () => {
  const { proxy, through } = await proxied();
  const client = connected(through);
  await client.serverInfo();
  proxy.answerBytesMax = 0;
  const displayName = `cut-${process.pid}`;
  const { session } = await counted({ client, spec: { ...SMALL, displayName } });
  assert.equal(proxy.cuts, 1);
  const found = [];
  for await (const status of client.listSessions()) {
    if (status.displayName === displayName) found.push(status.sessionId);
  }
  assert.deepEqual(found, [session.id]);
});

/** The session of a client of its own, which is not cut off. @param {string} sessionId */
async function direct(sessionId) {
  return connected(address).getSession(sessionId);
}

/** @param {Promise<unknown>} promise @returns {Promise<any>} */
function rejection(promise) {
  return promise.then(
    () => assert.fail('it was not rejected'),
    (error) => error,
  );
}
