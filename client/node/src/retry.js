/** When what has failed is tried again: for so long, after waits that grow and are drawn at random. */
import { setTimeout as delay } from 'node:timers/promises';

import { ClosedError, OptserveError, RequestError, UnavailableError } from './errors.js';

/** @typedef {import('./types.js').RetryOptions} RetryOptions */

const TOTAL_S = 60; // A restart of the server fits in, with the sessions that it finds on its disk.
const FIRST_WAIT_S = 0.1;
const WAIT_S_MAX = 5;

/** Tries again what may be tried again. */
export class Retry {
  #totalS;
  #firstWaitS;
  #waitSMax;
  #closing = new AbortController();

  /** @param {RetryOptions} [options] @throws {RequestError} A time is none. */
  constructor({ totalS = TOTAL_S, firstWaitS = FIRST_WAIT_S, waitSMax = WAIT_S_MAX } = {}) {
    for (const [name, seconds] of Object.entries({ totalS, firstWaitS, waitSMax })) {
      if (Number.isFinite(seconds) && seconds >= 0) continue;
      throw new RequestError(`retry.${name} is ${seconds}; it must be a number of seconds`, {
        reason: 'INVALID_FIELD',
        field: `retry.${name}`,
        actual: String(seconds),
      });
    }
    this.#totalS = totalS;
    this.#firstWaitS = firstWaitS;
    this.#waitSMax = waitSMax;
  }

  /**
   * Do what may be done again until it has been answered, or the time is up.
   *
   * @template T
   * @param {(attempt: number) => Promise<T>} act
   * @param {(error: OptserveError, attempt: number) => boolean} [mayPass] Whether the same may work later.
   * @returns {Promise<T>}
   * @throws {OptserveError} The last failure.
   */
  async persevere(act, mayPass = isPassing) {
    let since = Infinity; // When it first failed.
    for (let attempt = 0; ; attempt += 1) {
      try {
        return await act(attempt);
      } catch (error) {
        if (!(error instanceof OptserveError && mayPass(error, attempt))) throw error;
        since = Math.min(since, performance.now());
        const waitS = this.#waitS(error, attempt);
        if ((performance.now() - since) / 1e3 + waitS >= this.#totalS) throw error;
        await this.#wait(waitS);
      }
    }
  }

  /** Wait no more: whoever waits is refused. */
  close() {
    this.#closing.abort();
  }

  /**
   * Draw how long to wait: as long as the server asks for, and then anything up to a time that doubles. Clients that were
   * cut off together would otherwise come back together.
   *
   * @param {OptserveError} error
   * @param {number} attempt
   */
  #waitS({ retryAfterS = 0 }, attempt) {
    return retryAfterS + Math.random() * Math.min(this.#waitSMax, this.#firstWaitS * 2 ** attempt);
  }

  /** @param {number} seconds */
  async #wait(seconds) {
    try {
      await delay(seconds * 1e3, undefined, { signal: this.#closing.signal });
    } catch (cause) {
      throw new ClosedError('the client has been closed', { cause });
    }
  }
}

/**
 * Whether the same may work later: nothing answered, or the server asks to come back. A round that the other workers did not
 * come to has its own time, which the session says; whether to wait longer is for the caller to say.
 *
 * @param {OptserveError} error
 * @returns {boolean}
 */
export function isPassing(error) {
  if (error.reason === 'ROUND_TIMEOUT') return false;
  return error instanceof UnavailableError || error.retryAfterS !== undefined;
}
