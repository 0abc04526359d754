/** Checkpoints: sessions as they were once, under a name, on the server's disk. */
import { randomUUID } from 'node:crypto';
import { open, rename, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';

import { decode, encode } from './contract.js';
import { OptserveError, ProtocolError } from './errors.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./types.js').Checkpoint} Checkpoint */

/** @param {any} message @returns {Checkpoint} */
export function checkpointOf(message) {
  return decode('Checkpoint', message);
}

/**
 * @param {Calls} calls
 * @param {{pageSize?: number, sessionId?: string}} options
 * @returns {AsyncGenerator<Checkpoint, void, void>}
 */
export async function* listed(calls, options) {
  const request = encode('ListCheckpointsRequest', options, 'checkpoints');
  let pageToken = '';
  do {
    const page = await calls.unary('listCheckpoints', { ...request, pageToken });
    yield* page.checkpoints.map(checkpointOf);
    pageToken = page.nextPageToken;
  } while (pageToken !== '');
}

/**
 * Write a checkpoint to a file: whole, or not at all.
 *
 * @param {Calls} calls
 * @param {{sessionId: string, name: string}} request
 * @param {string} path
 * @returns {Promise<Checkpoint>}
 */
export function downloaded(calls, request, path) {
  return calls.persevere(async () => {
    const unfinished = join(dirname(path), `.${basename(path)}.${randomUUID()}`);
    const file = await open(unfinished, 'wx');
    try {
      const checkpoint = await received(calls, request, file);
      await file.close();
      await rename(unfinished, path);
      return checkpoint;
    } catch (error) {
      await file.close();
      await rm(unfinished, { force: true });
      throw error;
    }
  });
}

/**
 * Delete a checkpoint; it is deleted also if only the answer to that was lost.
 *
 * @param {Calls} calls
 * @param {{sessionId: string, name: string}} request
 * @returns {Promise<Checkpoint>}
 */
export async function deleted(calls, request) {
  const answer = await calls.persevere(async (attempt) => {
    try {
      return await calls.once('deleteCheckpoint', request);
    } catch (error) {
      const isGone = error instanceof OptserveError && error.reason === 'CHECKPOINT_NOT_FOUND';
      if (attempt === 0 || !isGone) throw error;
      return { checkpoint: request };
    }
  });
  return checkpointOf(answer.checkpoint);
}

/**
 * @param {Calls} calls
 * @param {{sessionId: string, name: string}} request
 * @param {import('node:fs/promises').FileHandle} file
 * @returns {Promise<Checkpoint>}
 */
async function received(calls, request, file) {
  /** @type {any} */ let begin;
  let count = 0;
  let written = Promise.resolve();
  const stream = calls.open(
    'downloadCheckpoint',
    (response) => {
      if (response.begin) {
        begin = response.begin;
        return;
      }
      if (begin === undefined) throw new Error('data come before `begin`');
      const { data } = response;
      const position = count;
      count += data.byteLength;
      stream.pause();
      written = written.then(async () => {
        await file.write(data, 0, data.byteLength, position);
        stream.resume();
      });
      written.catch((error) => stream.fail(error));
    },
    request,
  );
  stream.expectWithin(calls.timeoutS);
  await stream.ended;
  await written;
  if (begin === undefined || count !== begin.byteCount) {
    throw new ProtocolError(`the server's checkpoint has ${count} of ${begin?.byteCount} bytes`);
  }
  return checkpointOf(begin.checkpoint);
}
