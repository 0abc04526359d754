import assert from 'node:assert/strict';
import { test } from 'node:test';

import { decode, encode } from '../src/contract.js';
import { RequestError } from '../src/errors.js';

/** @param {string} reason @param {string} field */
function refusal(reason, field) {
  return (/** @type {unknown} */ error) =>
    error instanceof RequestError &&
    error.reason === reason &&
    error.field === field &&
    error.message.includes(field.slice(field.lastIndexOf('.') + 1));
}

test('a spec becomes a message, with the full names of enums', () => {
  const message = encode(
    'SessionSpec',
    {
      optimizer: { adam: { lr: 0.1, betas: [0.9, 0.99], amsgrad: undefined } },
      scheduler: { stepLr: { stepSize: 3 }, unit: 'EPOCHS' },
      loss: { nllLoss: { weight: { data: Float32Array.of(1, 2) }, ignoreIndex: -1 } },
      workers: 2,
    },
    'spec',
  );
  assert.deepEqual(message.optimizer, { adam: { lr: 0.1, betas: [0.9, 0.99] } });
  assert.equal(message.scheduler.unit, 'SCHEDULE_UNIT_EPOCHS');
  assert.equal(message.loss.nllLoss.weight.header.dataType, 'DATA_TYPE_FP32');
});

for (const [value, reason, field] of /** @type {[any, string, string][]} */ ([
  [{ optimiser: {} }, 'UNKNOWN_FIELD', 'spec.optimiser'],
  [{ optimizer: { sgd: { momentun: 0.9 } } }, 'UNKNOWN_FIELD', 'spec.optimizer.sgd.momentun'],
  [{ optimizer: { sdg: {} } }, 'UNKNOWN_FIELD', 'spec.optimizer.sdg'],
  [{ optimizer: { sgd: { weight_decay: 1 } } }, 'UNKNOWN_FIELD', 'spec.optimizer.sgd.weight_decay'],
  [{ optimizer: { sgd: { lr: '0.1' } } }, 'INVALID_FIELD', 'spec.optimizer.sgd.lr'],
  [{ optimizer: { sgd: { lr: null } } }, 'INVALID_FIELD', 'spec.optimizer.sgd.lr'],
  [{ optimizer: { sgd: { nesterov: 1 } } }, 'INVALID_FIELD', 'spec.optimizer.sgd.nesterov'],
  [{ optimizer: { adam: { betas: 0.9 } } }, 'INVALID_FIELD', 'spec.optimizer.adam.betas'],
  [{ optimizer: { adam: { betas: ['0'] } } }, 'INVALID_FIELD', 'spec.optimizer.adam.betas[0]'],
  [{ optimizer: 'sgd' }, 'INVALID_FIELD', 'spec.optimizer'],
  [{ loss: { mseLoss: { reduction: 'AVERAGE' } } }, 'INVALID_FIELD', 'spec.loss.mseLoss.reduction'],
  [{ scheduler: { stepLr: { stepSize: 1.5 } } }, 'INVALID_FIELD', 'spec.scheduler.stepLr.stepSize'],
  [{ workers: -1 }, 'INVALID_FIELD', 'spec.workers'],
  [{ displayName: 7 }, 'INVALID_FIELD', 'spec.displayName'],
])) {
  test(`${field} is refused in ${JSON.stringify(value)}`, () => {
    assert.throws(() => encode('SessionSpec', value, 'spec'), refusal(reason, field));
  });
}

test('two members of a oneof are refused, where protobuf would drop one', () => {
  const spec = { optimizer: { sgd: { lr: 0.1 }, adam: { lr: 0.1 } } };
  assert.throws(
    () => encode('SessionSpec', spec, 'spec'),
    refusal('INVALID_FIELD', 'spec.optimizer'),
  );
});

test('what is unset in an answer is not there, and enums lose their prefix', () => {
  const point = decode('LossPoint', {
    sequence: 1,
    split: 'SPLIT_TRAIN',
    steps: 2,
    epochs: 0,
    loss: Number.NaN,
    time: { seconds: 1, nanos: 500_000_000 },
  });
  assert.deepEqual(point, {
    sequence: 1,
    split: 'TRAIN',
    steps: 2,
    epochs: 0,
    loss: Number.NaN,
    time: new Date(1500),
  });
  assert.deepEqual(decode('LossPoint', { split: 'SPLIT_UNSPECIFIED' }), {});
});
