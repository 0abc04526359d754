/**
 * Trains while somebody kills the server: node train.js HOST:PORT STEPS DURABILITY.
 *
 * After half of the steps it prints "killable", and goes on when a line comes. Each step brings its number as gradient. What
 * happens is printed as lines of JSON.
 */
import { once } from 'node:events';

import { connect, StepsLostError } from '../../src/index.js';

const [target = '', count, durability = '{}'] = process.argv.slice(2);
const steps = Number(count);
const client = connect(target);
const session = await client.createSession({
  parameters: { w: new Float32Array(8) },
  optimizer: { sgd: { lr: 1, momentum: 0.5 } },
  durability: JSON.parse(durability),
});

let isKillable = true;
for (let step = 1; step <= steps; step += 1) {
  if (step > steps / 2 && isKillable) {
    isKillable = false;
    console.log(JSON.stringify('killable'));
    await once(process.stdin, 'data');
  }
  try {
    const result = await session.step({ w: new Float32Array(8).fill(step) }, { step });
    if (step === steps) console.log(JSON.stringify([...(result.parameters.w?.data ?? [])]));
  } catch (error) {
    if (!(error instanceof StepsLostError)) throw error;
    const again = await session.step({ w: new Float32Array(8).fill(step) }).catch((each) => each);
    const { steps: kept } = await session.resume();
    const { resumesFrom, lost } = error;
    console.log(JSON.stringify({ resumesFrom, lost, kept, again: again.name }));
    step = kept;
  }
}
await session.delete();
await client.close();
process.exit();
