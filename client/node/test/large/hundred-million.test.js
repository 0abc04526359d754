/** A large model through gRPC's default message limits. OPTSERVE_ADDRESS=host:port node --test test/large/ */
import assert from 'node:assert/strict';
import { test } from 'node:test';

import { connect } from '../../src/index.js';
import { setting } from '../setting.js';

const PARAMETERS = 100_000_000;
const TENSOR_BYTES = 4 * PARAMETERS;

test('a session of 100 million parameters trains, in the memory of parameters and gradients', async () => {
  const client = connect(setting('ADDRESS'));
  const weight = new Float32Array(PARAMETERS - 1000);
  const bias = new Float32Array(1000);
  const session = await client.createSession({
    parameters: { weight: { data: weight, shape: [PARAMETERS / 1000 - 1, 1000] }, bias },
    optimizer: { sgd: { lr: 1 } },
  });
  try {
    const gradients = { weight: new Float32Array(weight.length).fill(1), bias };
    for (const step of [1, 2]) {
      await session.step(gradients, { into: { weight, bias: new Float32Array(1000) } });
      assert.ok(weight.every((value) => value === -step));
    }
    assert.equal(session.status.steps, 2);
    const { rss } = process.memoryUsage();
    assert.ok(rss < 2.5 * TENSOR_BYTES, `${rss} bytes are resident`);
  } finally {
    await session.delete();
    await client.close();
  }
});
