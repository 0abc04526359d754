/** One worker's steps over its long-lived Train stream. */
import { randomBytes } from 'node:crypto';

import { Answer } from './answer.js';
import { ParameterTargets } from './encoded.js';
import { ClosedError, UnavailableError } from './errors.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./calls.js').Stream} Stream */
/** @typedef {import('./contribution.js').Contribution} Contribution */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./seat.js').Seat} Seat */
/** @typedef {import('./types.js').StepOptions} StepOptions */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./view.js').SessionView} SessionView */

const CLIENT_ID_BYTES = 16; // As the contract has it.

/** A worker of a session. Made by `Session.join`; it takes one step at a time. */
export class Worker {
  #calls;
  #view;
  /** @type {TrainStream | undefined} */ #stream;
  /** @type {Promise<unknown>} */ #turn = Promise.resolve();
  #closed = false;
  /**
   * Lets the server end a stream of ours whose connection broke, when we open another one. Of this worker, and not of the
   * client: two that take the same seat are a mistake.
   */
  #clientId = randomBytes(CLIENT_ID_BYTES);

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
    return this.#inTurn((seat) => {
      const number = step ?? this.#view.nextStep;
      const contribution = this.#view.contributionOf(seat, number, gradients);
      return this.#take(seat, contribution, this.#view.targetsOf(into ?? {}));
    });
  }

  /**
   * Go on from where the session stands, whatever was known of it here. A step that waits for the other workers, and has this
   * worker's gradients, is waited for.
   *
   * @returns {Promise<StepResult | undefined>} What that step did; undefined if there is none.
   */
  resume() {
    return this.#inTurn(async (seat) => {
      const request = { sessionId: this.#view.id, worker: this.worker };
      const { contribution, status } = await this.#calls.unary('getContribution', request);
      this.#view.resume(status, seat);
      const waits = contribution?.step > status.steps && contribution.digest.length > 0;
      if (!waits) return undefined;
      try {
        return await this.#take(seat, seat.held(contribution), new Map());
      } catch (error) {
        if (!isGivenUp(error)) throw error;
        return undefined;
      }
    });
  }

  /** Close the stream; a step that is under way fails. @returns {Promise<void>} */
  async close() {
    this.#closed = true;
    await this.#stream?.close();
  }

  async [Symbol.asyncDispose]() {
    await this.close();
  }

  /**
   * Act once what was asked for before has ended.
   *
   * @template T
   * @param {(seat: Seat) => Promise<T>} act
   * @returns {Promise<T>}
   */
  #inTurn(act) {
    const turn = this.#turn.then(() => act(this.#view.seatOf(this.worker)));
    this.#turn = turn.catch(() => {});
    return turn;
  }

  /**
   * @param {Seat} seat
   * @param {Contribution} contribution
   * @param {ReadonlyMap<string, Elements>} into
   * @returns {Promise<StepResult>}
   */
  async #take(seat, contribution, into) {
    const timeoutS = this.#calls.timeoutS + this.#view.roundTimeoutS;
    const result = await seat.take(this.#calls, contribution, async (reached) => {
      const stream = await this.#opened();
      reached();
      return stream.step(contribution, into, timeoutS);
    });
    return this.#view.noteStep(result);
  }

  async #opened() {
    if (this.#closed) throw new ClosedError('the worker has been closed');
    if (this.#stream === undefined || this.#stream.isOver) {
      this.#stream = new TrainStream(this.#calls, this.#view);
      const { worker } = this;
      const place = { sessionId: this.#view.id, worker, clientId: this.#clientId };
      const { status } = await this.#stream.open(place);
      this.#view.seatOf(worker).checkKept(status.steps);
      this.#view.noteStatus(status);
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

  /** @param {{sessionId: string, worker: number, clientId: Buffer}} place @returns {Promise<any>} The TrainOpened. */
  async open(place) {
    const opened = await this.#ask([{ open: place }], new Map(), this.#calls.timeoutS);
    this.#known = opened.contribution;
    return opened;
  }

  /**
   * @param {Contribution} contribution
   * @param {ReadonlyMap<string, Elements>} into
   * @param {number} timeoutS
   * @returns {Promise<StepResult>}
   */
  async step(contribution, into, timeoutS) {
    const isKnown = contribution.isKnown(this.#known);
    try {
      return await this.#ask(contribution.events(isKnown), into, timeoutS);
    } catch (error) {
      if (!isKnown || contribution.isHeld || !isGivenUp(error)) throw error;
      this.#known = undefined;
      return this.#ask(contribution.events(false), into, timeoutS);
    }
  }

  /** @returns {Promise<void>} */
  async close() {
    // The server would end its side only once it has answered: after a round, perhaps.
    if (this.#answer) this.#stream.fail(new ClosedError('the worker was closed'));
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

/**
 * Whether the server has not got any more what it was asked for without its bytes: the round was given up since.
 *
 * @param {any} error
 */
function isGivenUp(error) {
  return error.reason === 'BYTE_COUNT_MISMATCH';
}
