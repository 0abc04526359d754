// Fits a line to points. The server keeps the parameters and Adam's moments, and computes the loss and its gradient.
import { connect } from 'optserve-client';

const client = connect(process.argv[2] ?? '127.0.0.1:50051');
const x = Float32Array.from({ length: 64 }, (_, i) => i / 32 - 1);
const targets = x.map((value) => 3 * value - 1);

let parameters = { slope: Float32Array.of(0), intercept: Float32Array.of(0) };
const session = await client.createSession({
  parameters,
  optimizer: { adam: { lr: 0.1 } },
  loss: { mseLoss: {} },
});
for (let step = 1; step <= 100; step += 1) {
  const predictions = x.map((value) => parameters.slope[0] * value + parameters.intercept[0]);
  const { loss, gradient } = await session.evaluateLoss({ predictions, targets, split: 'TRAIN' });
  const slope = gradient.data.reduce((sum, share, i) => sum + share * x[i], 0);
  const intercept = gradient.data.reduce((sum, share) => sum + share, 0);
  const gradients = { slope: Float32Array.of(slope), intercept: Float32Array.of(intercept) };
  await session.step(gradients, { into: parameters });
  if (step % 20 === 0) console.log(`step ${step}: loss ${loss.toFixed(6)}`);
}
await session.delete();
await client.close();
