// Train a classifier with plain arrays: the server has the loss, its gradient, and the optimizer.
//
// node quickstart.js [HOST:PORT]
import { connect } from 'optserve-client';

const client = connect(process.argv[2] ?? 'localhost:50051');

// Two clouds of points, which a straight line parts.
const N = 200;
const labels = BigInt64Array.from({ length: N }, (_, i) => BigInt(i % 2));
const points = Float32Array.from({ length: 2 * N }, (_, i) => Math.sin(i * i) + 2 * ((i >> 1) % 2));

const session = await client.createSession({
  parameters: { w: { data: new Float32Array(4), shape: [2, 2] }, b: new Float32Array(2) },
  optimizer: { adam: { lr: 0.1 } },
  scheduler: { stepLr: { stepSize: 20, gamma: 0.5 } },
  loss: { crossEntropyLoss: {} },
});
const w = new Float32Array(4);
const b = new Float32Array(2);
for (let step = 1; step <= 50; step += 1) {
  const scores = Float32Array.from({ length: 2 * N }, (_, i) => {
    const [n, k] = [i >> 1, i % 2];
    return points[2 * n] * w[k] + points[2 * n + 1] * w[2 + k] + b[k];
  });
  const predictions = { data: scores, shape: [N, 2] };
  const result = await session.evaluateLoss({ predictions, targets: labels, split: 'TRAIN' });
  const gradients = { w: new Float32Array(4), b: new Float32Array(2) };
  result.gradient.data.forEach((share, i) => {
    const [n, k] = [i >> 1, i % 2];
    gradients.w[k] += points[2 * n] * share;
    gradients.w[2 + k] += points[2 * n + 1] * share;
    gradients.b[k] += share;
  });
  await session.step(gradients, { into: { w, b } });
  if (step % 10 === 0) {
    console.log(
      `step ${step}  loss ${result.loss.toFixed(4)}  accuracy ${result.accuracy.toFixed(2)}`,
    );
  }
}
await session.delete();
await client.close();
