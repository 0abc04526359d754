/** What the live tests stand on: sessions of a real server, straight or by a way that can be cut. */
import { after } from 'node:test';

import { connect } from '../../src/index.js';
import { setting } from '../setting.js';
import { Proxy } from './proxy.js';

/** @typedef {import('../../src/index.js').Client} Client */

/** Of the server. */
export const address = setting('ADDRESS');
export const ELEMENTS = 1 << 20; // 4 MiB: more than a message holds.
export const ones = new Float32Array(ELEMENTS).fill(1);

/** @type {(() => unknown)[]} */
const leftovers = [];
after(async () => {
  for (const end of leftovers.reverse()) await end();
});

/**
 * A session whose only parameter, `w`, is minus the number of steps that have been applied.
 *
 * @param {{through?: string, spec?: object, client?: Client} & import('../../src/index.js').ClientOptions} [options]
 */
export async function counted({ through = address, spec = {}, client: given, ...options } = {}) {
  const client = given ?? connected(through, options);
  const session = await client.createSession({
    parameters: { w: new Float32Array(ELEMENTS) },
    optimizer: { sgd: { lr: 1 } },
    ...spec,
  });
  leftovers.push(() => forget(session.id));
  return { client, session };
}

/** @param {string} through @param {import('../../src/index.js').ClientOptions} [options] */
export function connected(through, options) {
  const client = connect(through, options);
  leftovers.push(() => client.close());
  return client;
}

/** @param {string} sessionId */
async function forget(sessionId) {
  const client = connect(address);
  const session = await client.getSession(sessionId).catch(() => undefined);
  await session?.delete();
  await client.close();
}

export async function proxied() {
  const proxy = new Proxy(address);
  leftovers.push(() => proxy.close());
  return { proxy, through: await proxy.open() };
}
