/** What a worker of a session keeps, whatever stream or call its steps take. */
import { Contribution } from './contribution.js';
import { GradientSources } from './encoded.js';
import { SessionError, StepsLostError } from './errors.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./errors.js').OptserveError} OptserveError */
/** @typedef {import('./types.js').Encoding} Encoding */
/** @typedef {import('./types.js').Tensor} Tensor */

export class Seat {
  #sources;
  #answered;

  /**
   * @param {number} worker
   * @param {Encoding | undefined} encoding Of the session's gradients.
   * @param {number} steps How many are known to have been applied.
   */
  constructor(worker, encoding, steps) {
    this.worker = worker;
    this.#sources = new GradientSources(encoding);
    this.#answered = steps;
  }

  /**
   * @param {number} step
   * @param {Map<string, Tensor>} gradients In the order of their parameters.
   * @param {boolean} complete See `Contribution`.
   * @returns {Contribution}
   */
  contribution(step, gradients, complete) {
    return new Contribution({ step, worker: this.worker }, gradients, complete, this.#sources);
  }

  /**
   * Return the contribution that the server has, and that waits for the other workers.
   *
   * @param {{step: number, digest: Buffer}} known
   * @returns {Contribution}
   */
  held({ step, digest }) {
    return Contribution.held({ step, worker: this.worker, digest }, this.#sources);
  }

  /**
   * Send a contribution until it has been answered.
   *
   * @template T
   * @param {Calls} calls
   * @param {Contribution} contribution
   * @param {(reached: () => void) => Promise<T>} attempt See `Retry.persevere`.
   * @param {(error: OptserveError, attempt: number) => boolean} [mayPass]
   * @returns {Promise<T>}
   * @throws {OptserveError} A StepsLostError if the server has fewer steps than it has answered.
   */
  async take(calls, contribution, attempt, mayPass) {
    try {
      const result = await contribution.take(calls, attempt, mayPass);
      this.#sources.answered(contribution.step);
      this.#answered = Math.max(contribution.step, this.#answered);
      return result;
    } catch (error) {
      if (error instanceof SessionError && error.reason === 'STEP_OUT_OF_ORDER') {
        this.checkKept(Number(error.expected) - 1, error);
      }
      throw error;
    }
  }

  /**
   * Compare what the server has with what it had answered.
   *
   * @param {number} steps How many the server has.
   * @param {OptserveError} [cause]
   * @throws {StepsLostError} They are fewer.
   */
  checkKept(steps, cause) {
    if (steps < this.#answered) throw new StepsLostError({ steps, known: this.#answered, cause });
  }

  /** Go on after `steps` steps, and forget what others have left behind. @param {number} steps */
  resume(steps) {
    this.#sources.rewind(steps);
    this.#answered = steps;
  }
}
