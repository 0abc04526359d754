/** One worker's steps over its long-lived Train stream. */
import { Answer } from './answer.js';
import { ParameterTargets } from './encoded.js';
import { ClosedError, UnavailableError } from './errors.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./calls.js').Stream} Stream */
/** @typedef {import('./contribution.js').Contribution} Contribution */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./types.js').StepOptions} StepOptions */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./view.js').SessionView} SessionView */

/** A worker of a session. Made by `Session.join`; it takes one step at a time. */
export class Worker {
  #calls;
  #view;
  /** @type {TrainStream | undefined} */ #stream;
  /** @type {Promise<unknown>} */ #turn = Promise.resolve();
  #closed = false;

  /** @param {Calls} calls @param {SessionView} view @param {number} worker */
  constructor(calls, view, worker) {
    this.#calls = calls;
    this.#view = view;
    /** Number of the worker, from 0. */
    this.worker = worker;
  }

  /** Open the stream, unless it is open. @returns {Promise<void>} */
  async open() {
    await this.#calls.persevere(() => this.#opened());
  }

  /**
   * Contribute gradients to a step and return what the step did, once every worker has contributed.
   *
   * When the connection breaks the stream is opened anew, and the step goes on from what the server has of it: it is applied
   * once.
   *
   * @param {import('./types.js').Named<import('./types.js').TensorLike>} gradients By the names of their parameters. Must
   *     not change until the step has ended. A parameter that is not here has no gradient, which is not one of zeros.
   * @param {StepOptions} [options]
   * @returns {Promise<StepResult>}
   * @throws {import('./errors.js').OptserveError} Nothing was changed; after a StepUnknownError it is not known.
   */
  step(gradients, { step, into } = {}) {
    const turn = this.#turn.then(() => {
      const seat = this.#view.seatOf(this.worker);
      const number = step ?? this.#view.nextStep;
      const contribution = this.#view.contributionOf(seat, number, gradients);
      const targets = this.#view.targetsOf(into ?? {});
      return contribution.take(this.#calls, async () => {
        const stream = await this.#opened();
        const timeoutS = this.#calls.timeoutS + this.#view.roundTimeoutS;
        const result = await stream.step(contribution, targets, timeoutS);
        seat.answered(number);
        return result;
      });
    });
    this.#turn = turn.catch(() => {});
    return turn.then((result) => this.#view.noteStep(result));
  }

  /** Close the stream; a step that is under way fails. @returns {Promise<void>} */
  async close() {
    this.#closed = true;
    await this.#stream?.close();
  }

  async [Symbol.asyncDispose]() {
    await this.close();
  }

  async #opened() {
    if (this.#closed) throw new ClosedError('the worker has been closed');
    if (this.#stream === undefined || this.#stream.isOver) {
      this.#stream = new TrainStream(this.#calls, this.#view);
      const { status } = await this.#stream.open(this.#view.id, this.worker);
      this.#view.noteRestored(status, this.#view.seatOf(this.worker));
    }
    return this.#stream;
  }
}

/** A call of Train. */
class TrainStream {
  #stream;
  #headers;
  #parameters;
  #calls;
  /** @type {any} The worker's last Contribution that the server had when the stream was opened. */ #known;
  /** @type {Answer | undefined} */ #answer;

  /** @param {Calls} calls @param {SessionView} view */
  constructor(calls, view) {
    this.#headers = view.headers;
    this.#parameters = new ParameterTargets(view.spec.wire?.parameters);
    this.#calls = calls;
    this.#stream = calls.open('train', (response) => this.#receive(response));
    this.#stream.ended.then(
      () => this.#answer?.reject(new UnavailableError('the server ended the stream')),
      (error) => this.#answer?.reject(error),
    );
  }

  get isOver() {
    return this.#stream.isOver;
  }

  /** @param {string} sessionId @param {number} worker @returns {Promise<any>} The TrainOpened. */
  async open(sessionId, worker) {
    const { clientId, timeoutS } = this.#calls;
    const opened = await this.#ask(
      [{ open: { sessionId, worker, clientId } }],
      new Map(),
      timeoutS,
    );
    this.#known = opened.contribution;
    return opened;
  }

  /**
   * @param {Contribution} contribution
   * @param {ReadonlyMap<string, Elements>} into
   * @param {number} timeoutS
   * @returns {Promise<StepResult>}
   */
  step(contribution, into, timeoutS) {
    return this.#ask(contribution.events(this.#known), into, timeoutS);
  }

  /** @returns {Promise<void>} */
  async close() {
    this.#answer?.reject(new ClosedError('the worker was closed'));
    await this.#stream.leave();
  }

  /** @param {Iterable<any>} events @param {ReadonlyMap<string, Elements>} into @param {number} timeoutS */
  async #ask(events, into, timeoutS) {
    const answer = (this.#answer = new Answer(this.#headers, into, this.#parameters));
    this.#stream.expectWithin(timeoutS);
    try {
      for (const event of events) {
        if (answer.isSettled) break; // Refused: what was still to come would be ignored.
        await this.#stream.write(event);
      }
      return await answer.settled;
    } finally {
      this.#answer = undefined;
      this.#stream.expectWithin(undefined);
    }
  }

  /** @param {any} response */
  #receive(response) {
    if (this.#answer === undefined) throw new RangeError('it answers what was not asked');
    this.#answer.add(response);
  }
}
