/**
 * A worker that takes the steps that it is told to take: node node_worker.js HOST:PORT SESSION WORKER stream|unary.
 *
 * It says where the session stands, and then answers each line of JSON, a step and its gradients, with the parameters after
 * it. Tensors are FP32, in Base64.
 */
import { createInterface } from 'node:readline';

import { connect, UnavailableError } from '../../../client/node/src/index.js';

const [target, sessionId, worker, via] = process.argv.slice(2);
const client = connect(target, { retry: { backoffS: 0.01, backoffMaxS: 0.1 } });
const session = await met();
const seat = via === 'stream' ? await session.join(Number(worker)) : undefined;
console.log(JSON.stringify({ steps: session.status.steps }));

for await (const line of createInterface({ input: process.stdin })) {
  const { step, gradients } = JSON.parse(line);
  const named = mapped(gradients, decoded);
  const result = seat
    ? await seat.step(named, { step })
    : await session.stepUnary(named, { step, worker: Number(worker) });
  const parameters = mapped(result.parameters, ({ data }) => encoded(data));
  console.log(JSON.stringify({ step: result.step, parameters }));
}
await client.close();

/** Nothing is tried again before the server has answered for the first time: it may be the wrong one. This one is right. */
async function met() {
  for (;;) {
    try {
      return await client.getSession(sessionId);
    } catch (error) {
      if (!(error instanceof UnavailableError)) throw error;
    }
  }
}

function mapped(object, change) {
  return Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));
}

function decoded(text) {
  return new Float32Array(Uint8Array.from(Buffer.from(text, 'base64')).buffer);
}

function encoded(data) {
  return Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64');
}
