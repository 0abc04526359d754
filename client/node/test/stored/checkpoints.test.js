/** Checkpoints. Needs a server with a data directory: OPTSERVE_ADDRESS=host:port node --test test/stored/ */
import assert from 'node:assert/strict';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';

import { connect } from '../../src/index.js';
import { setting } from '../setting.js';

/** @typedef {import('../../src/index.js').Client} Client */

const ELEMENTS = 1 << 20; // 4 MiB, and its state twice that: more than a message holds.
const gradients = { w: new Float32Array(ELEMENTS).fill(1) };

const client = connect(setting('ADDRESS'));
const folder = await mkdtemp(join(tmpdir(), 'optserve-'));
after(async () => {
  await client.close();
  await rm(folder, { recursive: true });
});

async function stepped() {
  const session = await client.createSession({
    parameters: { w: new Float32Array(ELEMENTS) },
    optimizer: { adam: { lr: 0.1 } },
  });
  await session.step(gradients);
  return session;
}

test('a session goes on from its checkpoint as it did itself', async () => {
  const session = await stepped();
  const saved = await session.saveCheckpoint('first');
  assert.deepEqual([saved.sessionId, saved.name, saved.steps], [session.id, 'first', 1]);
  assert.ok(saved.createTime && saved.createTime.getTime() > 0);
  assert.deepEqual(await session.saveCheckpoint('first'), saved);
  const expected = (await session.step(gradients)).parameters.w?.data;
  await assert.rejects(session.saveCheckpoint('first'), { reason: 'CHECKPOINT_EXISTS' });
  await session.delete();

  const fork = await client.restoreCheckpoint(session.id, 'first', { displayName: 'fork' });
  assert.notEqual(fork.id, session.id);
  assert.deepEqual([fork.status.steps, fork.status.displayName], [1, 'fork']);
  assert.deepEqual((await fork.step(gradients)).parameters.w?.data, expected);
  await fork.delete();

  const listed = [];
  for await (const each of client.checkpoints({ sessionId: session.id })) listed.push(each);
  assert.deepEqual(listed, [saved]);
  assert.deepEqual(await client.deleteCheckpoint(session.id, 'first'), saved);
  const gone = { reason: 'CHECKPOINT_NOT_FOUND' };
  await assert.rejects(client.deleteCheckpoint(session.id, 'first'), gone);
  await assert.rejects(client.restoreCheckpoint(session.id, 'first'), gone);
});

test('a checkpoint is downloaded whole, or not at all', async () => {
  const session = await stepped();
  const saved = await session.saveCheckpoint('first');
  const path = join(folder, 'first.safetensors');
  assert.deepEqual(await client.downloadCheckpoint(session.id, 'first', path), saved);
  const file = await readFile(path);
  const end = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.subarray(8, end).toString());
  const { dtype, shape, data_offsets: offsets } = header['parameters/w'];
  assert.deepEqual([dtype, shape], ['F32', [ELEMENTS]]);
  const bytes = file.subarray(end + offsets[0], end + offsets[1]);
  const { parameters } = await session.download();
  assert.deepEqual(bytes, Buffer.from(/** @type {any} */ (parameters.w?.data).buffer));
  assert.equal(JSON.parse(header.__metadata__.checkpoint).name, 'first');
  assert.ok('optimizer/w/exp_avg' in header);

  const other = join(folder, 'other.safetensors');
  const gone = { reason: 'CHECKPOINT_NOT_FOUND' };
  await assert.rejects(client.downloadCheckpoint(session.id, 'second', other), gone);
  assert.deepEqual(await readdir(folder), ['first.safetensors']);
  await session.delete();
});
