import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { Server, ServerCredentials } from '@grpc/grpc-js';

import { isOnThisHost } from '../src/access.js';
import { OptimizerService } from '../src/contract.js';
import { connect, RequestError, UnauthenticatedError } from '../src/index.js';

/** @type {unknown[]} What calls have shown. */
const shown = [];
const server = new Server();
let target = '';

before(async () => {
  const note = (/** @type {any} */ { metadata }) => shown.push(...metadata.get('authorization'));
  server.addService(OptimizerService.service, {
    getServerInfo: (/** @type {any} */ call, /** @type {any} */ callback) => {
      note(call);
      callback(null, { version: '1' });
    },
    getSession: (/** @type {any} */ call, /** @type {any} */ callback) => {
      note(call);
      callback(null, { session: { status: { sessionId: 'a' }, spec: { workers: 1 } } });
    },
    train: (/** @type {any} */ call) => {
      note(call);
      call.on('data', () => call.write({ opened: { status: {} } }));
      call.on('end', () => call.end());
    },
  });
  target = await new Promise((resolve, reject) => {
    server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) =>
      error ? reject(error) : resolve(`127.0.0.1:${port}`),
    );
  });
});
after(() => server.forceShutdown());

test('every call shows the token, which is asked for anew', async () => {
  let count = 0;
  const client = connect(target, { token: async () => `secret-${(count += 1)}` });
  await client.serverInfo();
  await (await client.getSession('a')).join();
  await client.close();
  assert.deepEqual(shown.splice(0), ['Bearer secret-1', 'Bearer secret-2', 'Bearer secret-3']);
});

test('a token may be a text', async () => {
  const client = connect(target, { token: 'secret' });
  await client.serverInfo();
  await client.close();
  assert.deepEqual(shown.splice(0), ['Bearer secret']);
});

test('a call without the token that it should have is not made', async () => {
  const failure = new Error('the provider is away');
  const client = connect(target, { token: () => Promise.reject(failure) });
  await assert.rejects(client.serverInfo(), (/** @type {any} */ error) => {
    assert.ok(error instanceof UnauthenticatedError);
    assert.match(error.message, /the provider is away/);
    return true;
  });
  await client.close();
  assert.deepEqual(shown, []);
});

test('a token goes to no other host where anybody could read it', async () => {
  const options = { token: 'secret' };
  assert.throws(() => connect('example.org:50051', options), {
    name: 'RequestError',
    field: 'token',
  });
  await connect('example.org:50051', { ...options, tls: true }).close();
  await connect('example.org:50051', { ...options, allowPlaintextToken: true }).close();
});

for (const [name, isLocal] of /** @type {[string, boolean][]} */ ([
  ['localhost:50051', true],
  ['127.0.0.1:50051', true],
  ['127.8.9.10:1', true],
  ['[::1]:50051', true],
  ['dns:///localhost:50051', true],
  ['ipv4:127.0.0.1:50051', true],
  ['ipv6:[::1]:50051', true],
  ['unix:/run/optserve.sock', true],
  ['localhost', true],
  ['localhost.example.org:50051', false],
  ['127.0.0.1.example.org:50051', false],
  ['10.0.0.1:50051', false],
  ['ipv4:127.0.0.1:1,10.0.0.1:1', false],
  ['dns://127.0.0.1/example.org:50051', false],
  ['[::2]:50051', false],
])) {
  test(`${name} is ${isLocal ? '' : 'not '}on this host`, () => {
    assert.equal(isOnThisHost(name), isLocal);
  });
}

for (const [field, tls] of /** @type {const} */ ([
  ['tls.key', { certificate: 'pem' }],
  ['tls.certificate', { key: 'pem' }],
])) {
  test(`without ${field} the other is of no use`, () => {
    assert.throws(
      () => connect(target, { tls }),
      (/** @type {any} */ error) => {
        assert.ok(error instanceof RequestError);
        assert.deepEqual([error.reason, error.field], ['MISSING_FIELD', field]);
        return true;
      },
    );
  });
}
