/** What came to nothing is tried again: when, and for how long. */
import { setTimeout as delay } from 'node:timers/promises';

import {
  ClosedError,
  LimitError,
  OptserveError,
  RequestError,
  UnauthenticatedError,
  UnavailableError,
} from './errors.js';

/** @typedef {import('./types.js').RetryOptions} RetryOptions */
/** @typedef {Required<RetryOptions>} RetryTerms */

/** @type {RetryTerms} */
const DEFAULTS = {
  giveUpAfterS: 120, // A restart of the server fits in, with the sessions that it finds on its disk.
  backoffS: 0.1,
  backoffFactor: 2,
  backoffMaxS: 5,
  jitter: 0.5,
};

/** Tries again what may be tried again, once the server has answered for the first time: else it may be another address. */
export class Retry {
  #terms;
  #hasMet = false;
  #closing = new AbortController();

  /** @param {RetryTerms} terms */
  constructor(terms) {
    this.#terms = terms;
  }

  /**
   * Do what may be done again until it has been answered, or fails for good, or the time is up.
   *
   * @template T
   * @param {(attempt: number, reached: () => void) => Promise<T>} act Calls `reached` when it has found the server: from
   *     then to its failure there was no outage.
   * @param {(error: OptserveError, attempt: number) => boolean} [mayPass] Whether the same may work later.
   * @returns {Promise<T>}
   * @throws {OptserveError} What the last attempt came to.
   */
  async persevere(act, mayPass = isPassing) {
    /** @type {number | undefined} */
    let begin; // Of the outage, in milliseconds: later by all the time that was none.
    for (let attempt = 0; ; attempt += 1) {
      /** @type {number | undefined} */
      let reachedAt;
      try {
        const answer = await act(attempt, () => (reachedAt = performance.now()));
        this.#hasMet = true;
        return answer;
      } catch (error) {
        if (!(error instanceof OptserveError)) throw error;
        this.#hasMet ||= error.reason !== undefined;
        if (!this.#hasMet || !mayPass(error, attempt)) throw error;
        const now = performance.now();
        begin = begin === undefined ? now : begin + now - (reachedAt ?? now);
        const waitMs = this.#waitS(error, attempt) * 1e3;
        if (now + waitMs >= begin + this.#terms.giveUpAfterS * 1e3) throw error;
        await this.#wait(waitMs);
      }
    }
  }

  /** Wait no more: whoever waits is refused. */
  close() {
    this.#closing.abort();
  }

  /**
   * Say how long to wait: as long as the server asks for, and then a time that grows, and part of which is left to chance.
   * Clients that were cut off together would otherwise come back together.
   *
   * @param {OptserveError} error
   * @param {number} attempt
   */
  #waitS({ retryAfterS = 0 }, attempt) {
    const { backoffS, backoffFactor, backoffMaxS, jitter } = this.#terms;
    const backoff = Math.min(backoffS * backoffFactor ** attempt, backoffMaxS);
    return retryAfterS + backoff * (1 - jitter * Math.random());
  }

  /** @param {number} ms */
  async #wait(ms) {
    try {
      await delay(ms, undefined, { signal: this.#closing.signal });
    } catch (cause) {
      throw new ClosedError('the client has been closed', { cause });
    }
  }
}

/**
 * Complete what was given for a client's patience.
 *
 * @param {RetryOptions} [given]
 * @returns {RetryTerms}
 * @throws {RequestError} A number is not what it must be.
 */
export function retryTerms(given = {}) {
  const terms = { ...DEFAULTS, ...given };
  const least = { giveUpAfterS: 0, backoffS: 0, backoffFactor: 1, backoffMaxS: 0, jitter: 0 };
  for (const [name, value] of Object.entries(terms)) {
    const from = least[/** @type {keyof RetryTerms} */ (name)];
    const to = name === 'jitter' ? 1 : Number.MAX_VALUE;
    if (from !== undefined && value >= from && value <= to) continue;
    const expected = from === undefined ? Object.keys(least).join(', ') : `at least ${from}`;
    throw new RequestError(`retry.${name} must not be ${value}`, {
      reason: from === undefined ? 'UNKNOWN_FIELD' : 'INVALID_FIELD',
      field: `retry.${name}`,
      expected,
      actual: String(value),
    });
  }
  return terms;
}

/**
 * Whether the same may work later: nothing answered, or the server asks to come back. A round that the other workers did not
 * come to is none of these: how long a step waits for them is for the session to say. A call in the middle of which its token
 * has ended may come again with another one; without, it is not let in, for good.
 *
 * @param {OptserveError} error
 * @returns {boolean}
 */
export function isPassing(error) {
  const saysWhen = error instanceof LimitError || error instanceof UnauthenticatedError;
  if (saysWhen) return error.retryAfterS !== undefined;
  return error instanceof UnavailableError || error.reason === 'STALLED';
}
