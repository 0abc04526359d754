/** What a worker of a session keeps, whatever stream or call its steps take. */
import { Contribution } from './contribution.js';
import { GradientSources } from './encoded.js';

/** @typedef {import('./types.js').Encoding} Encoding */
/** @typedef {import('./types.js').Tensor} Tensor */

export class Seat {
  #sources;
  #answered = 0;

  /** @param {number} worker @param {Encoding | undefined} encoding Of the session's gradients. */
  constructor(worker, encoding) {
    this.worker = worker;
    this.#sources = new GradientSources(encoding);
  }

  /** The last step that was answered. */
  get lastStep() {
    return this.#answered;
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

  /** Note that a step has been answered. @param {number} step */
  answered(step) {
    this.#sources.answered(step);
    this.#answered = Math.max(step, this.#answered);
  }

  /** Forget the steps after `step`, which the server has lost. @param {number} step */
  rewind(step) {
    this.#sources.rewind(step);
    this.#answered = step;
  }
}
