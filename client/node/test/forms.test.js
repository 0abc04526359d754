/** The forms of a step and of its answer, told to a server that writes down what it is sent. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { after, before, test } from 'node:test';

import { Server, ServerCredentials } from '@grpc/grpc-js';

import { OptimizerService } from '../src/contract.js';
import { connect, ProtocolError, RequestError } from '../src/index.js';

const LARGE = (1 << 18) + 1; // One element more than goes packed.
const MODELS = { small: [2, 3], limit: [(1 << 18) - 3, 3], large: [LARGE - 3, 3] };

/** @type {any[]} What has come: events, chunks as how many bytes they hold. */
let seen = [];
/** @type {(event: any) => any[]} What is answered to the last event of a step. */
let answerTo = () => [];

const server = new Server();
const client = { target: '' };

before(async () => {
  server.addService(OptimizerService.service, {
    getSession: (/** @type {any} */ { request }, /** @type {any} */ callback) => {
      const [w, b] = /** @type {any} */ (MODELS)[request.sessionId];
      const parameters = [header('w', w), header('b', b)];
      const status = { sessionId: request.sessionId, state: 'SESSION_STATE_READY', workers: 1 };
      callback(null, { session: { status, spec: { parameters, workers: 1 } } });
    },
    train: (/** @type {any} */ call) => {
      call.on('end', () => call.end());
      call.on('data', (/** @type {any} */ event) => {
        if (event.open) return call.write({ opened: { status: {} } });
        const { chunks } = event.chunks ?? {};
        seen.push(chunks ? sum(chunks.map((/** @type {any} */ { data }) => data.length)) : event);
        if (event.end || event.packed) for (const each of answerTo(event)) call.write(each);
      });
    },
  });
  client.target = await new Promise((resolve, reject) => {
    server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) =>
      error ? reject(error) : resolve(`127.0.0.1:${port}`),
    );
  });
});
after(() => server.forceShutdown());

/** @param {string} name @param {number} size */
function header(name, size) {
  return { name, dataType: 'DATA_TYPE_FP32', shape: [size] };
}

/** @param {number[]} numbers */
function sum(numbers) {
  return numbers.reduce((total, each) => total + each, 0);
}

/** @param {...number} values */
function bytes(...values) {
  return Buffer.from(Float32Array.from(values).buffer);
}

/** @param {...Buffer} gradients */
function digestOf(...gradients) {
  return createHash('sha256').update(Buffer.concat(gradients)).digest().subarray(0, 16);
}

/** @param {number} tensor @param {Buffer} data @param {number} offset */
function chunk(tensor, data, offset = 0) {
  return { chunks: { chunks: [{ tensor, offset, data }] } };
}

const RESULT = { step: 1, rates: [{ group: 'default', lr: 0.5 }], gradientNorm: 2 };
const PARAMETERS = [chunk(0, bytes(1, 2)), chunk(1, bytes(3, 4, 5))];

/**
 * Take the first step of a session, and return its result.
 *
 * @param {string} id
 * @param {any} gradients
 * @param {any[]} answer
 */
async function taken(id, gradients, answer) {
  const opened = connect(client.target, { timeoutS: 10 });
  seen = [];
  answerTo = () => answer;
  try {
    return await (await opened.getSession(id)).step(gradients);
  } finally {
    await opened.close();
  }
}

/** @param {Record<string, {data: unknown}>} parameters */
function dataOf({ w, b }) {
  return [w?.data, b?.data];
}

const BOTH = [Float32Array.of(1, 2), Float32Array.of(3, 4, 5)];
const PACKED = { packed: { result: RESULT, parameters: [bytes(1, 2), bytes(3, 4, 5)] } };

test('a small step with all gradients is one message each way, in the order of the parameters', async () => {
  const gradients = { b: Float32Array.of(8, 9, 10), w: Float32Array.of(6, 7) };
  const sent = [bytes(6, 7), bytes(8, 9, 10)];
  const result = await taken('small', gradients, [PACKED]);
  assert.deepEqual(
    seen.map(({ packed }) => packed),
    [{ step: 1, gradients: sent, digest: digestOf(...sent) }],
  );
  assert.deepEqual(dataOf(result.parameters), BOTH);
  assert.deepEqual(Object.keys(result.parameters), ['w', 'b']);
  assert.deepEqual([result.step, result.gradientNorm, result.rates], [1, 2, { default: 0.5 }]);
});

test('what has as many bytes as a chunk may have still goes packed', async () => {
  const data = MODELS.limit.map((size) => Buffer.alloc(4 * size));
  const packed = { packed: { result: RESULT, parameters: data } };
  const [w, b] = MODELS.limit.map((size) => new Float32Array(size));
  await taken('limit', { w, b }, [packed]);
  assert.deepEqual(
    seen.map((event) => 'packed' in event),
    [true],
  );
});

test('a large step with all gradients announces nothing, and is answered so', async () => {
  const [w, b] = MODELS.large.map((size) => new Float32Array(size).fill(1));
  const data = [Buffer.alloc(4 * Number(w?.length), bytes(2)), bytes(3, 4, 5)];
  const answer = [
    { begin: { step: 1 } },
    ...data.map((each, tensor) => chunk(tensor, each)),
    { result: RESULT },
  ];
  const { parameters } = await taken('large', { b, w }, answer);
  const [{ begin }, ...rest] = seen;
  assert.deepEqual([begin.step, begin.everyParameter, begin.gradients], [1, true, []]);
  assert.deepEqual(rest.slice(0, -1), [1 << 20, 4 * LARGE - (1 << 20)]);
  assert.deepEqual(
    rest.at(-1).end.digest,
    digestOf(...[w, b].map((each) => Buffer.from(each?.buffer ?? new ArrayBuffer(0)))),
  );
  assert.deepEqual(dataOf(parameters), [w?.map(() => 2), BOTH[1]]);
  assert.deepEqual(Object.keys(parameters), ['w', 'b']);
});

for (const [what, gradients] of /** @type {[string, any][]} */ ([
  ['lacks a gradient', { w: Float32Array.of(1, 2) }],
  ['has a gradient of another shape', { w: new Float32Array(3), b: new Float32Array(3) }],
  ['has a gradient of another type', { w: new Float64Array(2), b: new Float32Array(3) }],
  ['has a gradient of no parameter', { w: new Float32Array(2), v: new Float32Array(3) }],
])) {
  test(`a step that ${what} announces those that it has`, async () => {
    const begin = { step: 1, parameters: [header('w', 2), header('b', 3)] };
    const result = await taken('small', gradients, [{ begin }, ...PARAMETERS, { result: RESULT }]);
    const announced = seen[0].begin;
    assert.equal(announced.everyParameter, false);
    assert.deepEqual(
      announced.gradients.map((/** @type {any} */ { name }) => name),
      Object.keys(gradients),
    );
    assert.deepEqual(dataOf(result.parameters), BOTH);
  });
}

test('a step that is refused for now is taken again when the server says, on the same stream', async () => {
  const retryAfter = { seconds: 0, nanos: 2e8 };
  const refusal = { reason: 'REASON_MEMORY_EXHAUSTED', code: 8, message: 'full', retryAfter };
  const answers = [[{ refused: { step: 1, refusal } }], [PACKED]];
  const opened = connect(client.target);
  const session = await opened.getSession('small');
  await session.join();
  seen = [];
  answerTo = () => answers.shift() ?? [];
  const begin = performance.now();
  const { parameters } = await session.step({ w: new Float32Array(2), b: new Float32Array(3) });
  await opened.close();
  assert.ok(performance.now() - begin >= 199);
  assert.deepEqual(dataOf(parameters), BOTH);
  assert.equal(seen.length, 2);
  assert.deepEqual(seen[0], seen[1]); // The same gradients, and the same digest.
});

const SOME = { w: Float32Array.of(1, 2) };
const BEGIN = { begin: { step: 1 } };

test('an answer that begins twice counts from its second beginning', async () => {
  const other = chunk(0, bytes(7, 7));
  const answer = [BEGIN, other, BEGIN, ...PARAMETERS, { result: RESULT }];
  assert.deepEqual(dataOf((await taken('small', SOME, answer)).parameters), BOTH);
});

test('a refusal in the middle of an answer takes it back', async () => {
  const refusal = { reason: 'REASON_NON_FINITE_GRADIENT', code: 3, message: 'no' };
  const refused = { refused: { step: 1, refusal } };
  for (const answer of [[refused], [BEGIN, PARAMETERS[0], refused]]) {
    await assert.rejects(taken('small', SOME, answer), RequestError);
  }
  const all = { w: new Float32Array(2), b: new Float32Array(3) };
  await assert.rejects(taken('small', all, [refused]), { reason: 'NON_FINITE_GRADIENT' });
});

for (const [what, answer] of /** @type {[string, any[]][]} */ ([
  ['lacks a parameter', [{ packed: { result: RESULT, parameters: [bytes(1, 2)] } }]],
  [
    'has a parameter too many',
    [{ packed: { ...PACKED.packed, parameters: [bytes(1, 2), bytes(3, 4, 5), bytes(6)] } }],
  ],
  [
    'has a parameter of too few bytes',
    [{ packed: { result: RESULT, parameters: [bytes(1, 2), bytes(3, 4)] } }],
  ],
  [
    'has a parameter of too many bytes',
    [{ packed: { result: RESULT, parameters: [bytes(1, 2, 3), bytes(3, 4, 5)] } }],
  ],
  ['begins twice and ends with the first', [BEGIN, ...PARAMETERS, BEGIN, { result: RESULT }]],
  ['announces other parameters', [{ begin: { step: 1, parameters: [header('v', 2)] } }]],
  ['is packed after it has begun', [BEGIN, PACKED]],
  ['begins with chunks', PARAMETERS],
  ['is empty', [{}]],
])) {
  test(`an answer that ${what} is not understood`, async () => {
    const gradients = { w: new Float32Array(2), b: new Float32Array(3) };
    await assert.rejects(taken('small', gradients, answer), ProtocolError);
  });
}
