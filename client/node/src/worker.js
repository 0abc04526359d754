/** One worker's steps over its long-lived Train stream. */
import { Answer } from './answer.js';
import { ParameterTargets } from './encoded.js';
import { ClosedError, UnavailableError } from './errors.js';
import { CHUNK_BYTES_MAX, split, whole } from './framing.js';
import { headerToMessage } from './tensor.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./calls.js').Stream} Stream */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./framing.js').Source} Source */
/** @typedef {import('./types.js').StepOptions} StepOptions */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./types.js').Tensor} Tensor */
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
    await this.#opened();
  }

  /**
   * Contribute gradients to a step and return what the step did, once every worker has contributed.
   *
   * When the server was not to be reached, the stream is opened anew and the step is sent again under its number: it is
   * applied once.
   *
   * @param {import('./types.js').Named<import('./types.js').TensorLike>} gradients By the names of their parameters. Must
   *     not change until the step has ended. A parameter that is not here has no gradient, which is not one of zeros.
   * @param {StepOptions} [options]
   * @returns {Promise<StepResult>}
   * @throws {import('./errors.js').OptserveError} Nothing was changed; after a ServiceError it is not known.
   */
  step(gradients, { step, into } = {}) {
    const turn = this.#turn.then(() => {
      const number = step ?? this.#view.nextStep;
      const given = this.#view.tensorsOf(gradients, 'gradients');
      const complete = this.#view.completeGradients(given);
      const tensors = complete ?? given;
      const targets = this.#view.targetsOf(into ?? {});
      const sources = this.#view.gradientsOf(this.worker);
      return this.#calls.persevere(async () => {
        const stream = await this.#opened();
        const timeoutS = this.#calls.timeoutS + this.#view.roundTimeoutS;
        const events = eventsOf(
          number,
          tensors,
          sources.of(number, tensors),
          complete !== undefined,
        );
        const result = await stream.step(events, targets, timeoutS);
        sources.answered(number);
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
      this.#view.noteStatus(await this.#stream.open(this.#view.id, this.worker));
    }
    return this.#stream;
  }
}

/**
 * The events of a step. If there is a gradient for every parameter both sides know what comes: nothing is announced, and a
 * small model takes one message each way.
 *
 * @param {number} step
 * @param {Map<string, Tensor>} gradients
 * @param {Source[]} sources Of the gradients' bytes.
 * @param {boolean} complete Whether these are all of the session's, in its order.
 * @returns {Iterable<any>}
 */
function eventsOf(step, gradients, sources, complete) {
  if (!complete) {
    const headers = [...gradients].map(([name, tensor]) => headerToMessage(tensor, name));
    return inChunks({ step, gradients: headers }, sources);
  }
  const bytes = [...gradients.values()].reduce((sum, { data }) => sum + data.byteLength, 0);
  if (bytes > CHUNK_BYTES_MAX) return inChunks({ step, everyParameter: true }, sources);
  return [{ packed: { step, gradients: sources.map(whole) } }];
}

/** @param {any} begin @param {Source[]} gradients @returns {Generator<any, void, void>} */
function* inChunks(begin, gradients) {
  yield { begin };
  for (const chunks of split(gradients)) yield { chunks };
  yield { end: {} };
}

/** A call of Train. */
class TrainStream {
  #stream;
  #headers;
  #parameters;
  #timeoutS;
  /** @type {Answer | undefined} */ #answer;

  /** @param {Calls} calls @param {SessionView} view */
  constructor(calls, view) {
    this.#headers = view.headers;
    this.#parameters = new ParameterTargets(view.spec.wire?.parameters);
    this.#timeoutS = calls.timeoutS;
    this.#stream = calls.open('train', (response) => this.#receive(response));
    this.#stream.ended.then(
      () => this.#answer?.reject(new UnavailableError('the server ended the stream')),
      (error) => this.#answer?.reject(error),
    );
  }

  get isOver() {
    return this.#stream.isOver;
  }

  /** @param {string} sessionId @param {number} worker @returns {Promise<any>} The SessionStatus of TrainOpened. */
  open(sessionId, worker) {
    return this.#ask([{ open: { sessionId, worker } }], new Map(), this.#timeoutS);
  }

  /**
   * @param {Iterable<any>} events What makes the step.
   * @param {ReadonlyMap<string, Elements>} into
   * @param {number} timeoutS
   * @returns {Promise<StepResult>}
   */
  step(events, into, timeoutS) {
    return this.#ask(events, into, timeoutS);
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
