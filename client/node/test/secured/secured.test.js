/**
 * Clients of a server that asks who they are. Needs one, with certificates and tokens: OPTSERVE_ADDRESS, the paths
 * OPTSERVE_CA, OPTSERVE_CERTIFICATE and OPTSERVE_KEY, and the tokens of two tenants, OPTSERVE_TOKENS=one,other.
 */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, test } from 'node:test';

import { connect, UnauthenticatedError, UnavailableError } from '../../src/index.js';
import { setting } from '../setting.js';

const address = setting('ADDRESS');
const [token, foreign] = setting('TOKENS').split(',');
const tls = {
  ca: readFileSync(setting('CA')),
  certificate: readFileSync(setting('CERTIFICATE'), 'utf8'),
  key: readFileSync(setting('KEY')),
};
const model = { parameters: { w: new Float32Array(1 << 20) }, optimizer: { sgd: { lr: 1 } } };

test('who shows what the server asks for trains', async () => {
  const client = connected({ tls, token: () => String(token) });
  const session = await client.createSession(model);
  const ones = new Float32Array(1 << 20).fill(1);
  assert.ok((await session.step({ w: ones })).parameters.w?.data.every((value) => value === -1));
  assert.equal((await session.stepUnary({ w: ones }).catch((error) => error)).code, 8); // Too large.
  assert.equal((await session.getContribution()).step, 1);
  await session.delete();
});

test('another tenant does not find the session', async () => {
  const mine = connected({ tls, token });
  const other = connected({ tls, token: foreign });
  const session = await mine.createSession(model);
  await assert.rejects(other.getSession(session.id), { reason: 'SESSION_NOT_FOUND' });
  for await (const status of other.listSessions()) assert.notEqual(status.sessionId, session.id);
  await session.delete();
});

test('without a token, or with one that nobody knows, nothing is answered', async () => {
  for (const options of [{ tls }, { tls, token: `${token}x` }]) {
    const client = connected(options);
    await assert.rejects(client.createSession(model), UnauthenticatedError);
  }
});

test('a server that nobody vouches for is not talked to', async () => {
  const client = connected({ tls: { ...tls, ca: undefined }, token });
  await assert.rejects(client.serverInfo(), UnavailableError);
});

test('a client that nobody vouches for is not talked to', async () => {
  const client = connected({ tls: { ca: tls.ca }, token });
  await assert.rejects(client.serverInfo(), UnavailableError);
});

test('a server that wants TLS is not talked to without', async () => {
  const client = connected({ token });
  await assert.rejects(client.serverInfo(), UnavailableError);
});

/** @param {import('../../src/index.js').ClientOptions} options */
function connected(options) {
  const client = connect(address, options);
  after(() => client.close());
  return client;
}
