/** What happens when the connection does. Needs a server: OPTSERVE_ADDRESS=host:port node --test test/live/ */
import assert from 'node:assert/strict';
import { test } from 'node:test';

import {
  ClosedError,
  connect,
  DeadlineError,
  SessionError,
  StepUnknownError,
  UnavailableError,
} from '../../src/index.js';
import { connected, counted, ELEMENTS, ones, proxied } from './ground.js';

test('a step does not wait for ever for a server that says nothing', async () => {
  const { proxy, through } = await proxied();
  const { session: made } = await counted();
  const session = await connected(through, { timeoutS: 2 }).getSession(made.id);
  await session.step({ w: ones });
  proxy.block();
  await assert.rejects(session.step({ w: ones }), (/** @type {any} */ error) => {
    assert.ok(error instanceof StepUnknownError);
    assert.ok(error.cause instanceof DeadlineError);
    assert.deepEqual([error.step, error.worker], [2, 0]);
    return true;
  });
});

test('a server that is not there is unavailable', async () => {
  const { proxy, through } = await proxied();
  proxy.close();
  const client = connect(through);
  await assert.rejects(client.serverInfo(), UnavailableError);
  await client.close();
});

test('parameters are written into the arrays that the caller brings', async () => {
  const { session } = await counted();
  const w = new Float32Array(ELEMENTS);
  const { parameters } = await session.step({ w: ones }, { into: { w } });
  assert.equal(parameters.w?.data, w);
  assert.ok(w.every((value) => value === -1));
  await assert.rejects(session.step({ w: ones }, { into: { v: w } }), { reason: 'UNKNOWN_NAME' });
});

test('a step that is refused while its gradients are under way does not end the stream', async () => {
  const { session } = await counted();
  const worker = await session.join();
  const wrong = new Float64Array(4 * ELEMENTS); // 32 MiB, of which the first event is refused.
  await assert.rejects(worker.step({ w: wrong }), { reason: 'DATA_TYPE_MISMATCH' });
  await assert.rejects(worker.step({ w: ones.subarray(1) }), { reason: 'SHAPE_MISMATCH' });
  const { step, parameters } = await worker.step({ w: ones });
  assert.deepEqual([step, parameters.w?.data[0]], [1, -1]);
});

test('steps that are asked for at once are taken one after the other', async () => {
  const { session } = await counted();
  const results = await Promise.all([1, 2, 3].map(() => session.step({ w: ones })));
  assert.deepEqual(
    results.map(({ step, parameters }) => [step, parameters.w?.data[0]]),
    [1, 2, 3].map((step) => [step, -step]),
  );
});

test('a step of a session that is deleted meanwhile is refused', async () => {
  const { client, session } = await counted();
  await session.step({ w: ones });
  await (await client.getSession(session.id)).delete();
  await assert.rejects(session.step({ w: ones }), SessionError);
});

test('a client that has been closed says so', async () => {
  const { client, session } = await counted();
  await session.step({ w: ones });
  await client.close();
  await assert.rejects(client.serverInfo(), ClosedError);
  await assert.rejects(session.step({ w: ones }), ClosedError);
});
