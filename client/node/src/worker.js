/** One worker's steps over its long-lived Train stream. */
import { encodingOf, ParameterTargets } from './encoded.js';
import { ClosedError, errorFromRefusal, UnavailableError } from './errors.js';
import { Assembly, split } from './framing.js';
import { emptyTensor, headerFromMessage, headerToMessage } from './tensor.js';
import { stepResultOf } from './view.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./calls.js').Stream} Stream */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./framing.js').Source} Source */
/** @typedef {import('./types.js').Encoding} Encoding */
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
      const tensors = this.#view.tensorsOf(gradients, 'gradients');
      const targets = this.#view.targetsOf(into ?? {});
      const sources = this.#view.gradientsOf(this.worker);
      return this.#calls.persevere(async () => {
        const stream = await this.#opened();
        const timeoutS = this.#calls.timeoutS + this.#view.roundTimeoutS;
        const headers = [...tensors].map(([name, tensor]) => headerToMessage(tensor, name));
        const result = await stream.step(
          number,
          headers,
          sources.of(number, tensors),
          targets,
          timeoutS,
        );
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
      this.#stream = new TrainStream(this.#calls, this.#view.spec.wire?.parameters);
      this.#view.noteStatus(await this.#stream.open(this.#view.id, this.worker));
    }
    return this.#stream;
  }
}

/** A call of Train. */
class TrainStream {
  #stream;
  #parameters;
  #timeoutS;
  /** @type {Answer | undefined} */ #answer;

  /** @param {Calls} calls @param {Encoding | undefined} encoding Of the parameters. */
  constructor(calls, encoding) {
    this.#parameters = new ParameterTargets(encoding);
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
   * @param {number} step
   * @param {any[]} headers Of the gradients.
   * @param {Source[]} gradients
   * @param {ReadonlyMap<string, Elements>} targets
   * @param {number} timeoutS
   * @returns {Promise<StepResult>}
   */
  step(step, headers, gradients, targets, timeoutS) {
    /** @returns {Iterable<any>} */
    function* events() {
      yield { begin: { step, gradients: headers } };
      for (const chunks of split(gradients)) yield { chunks };
      yield { end: {} };
    }
    return this.#ask(events(), targets, timeoutS);
  }

  /** @returns {Promise<void>} */
  async close() {
    this.#answer?.reject(new ClosedError('the worker was closed'));
    await this.#stream.leave();
  }

  /** @param {Iterable<any>} events @param {ReadonlyMap<string, Elements>} targets @param {number} timeoutS */
  async #ask(events, targets, timeoutS) {
    const answer = (this.#answer = new Answer(targets, this.#parameters));
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

/** The answer to one event or one step, as it comes in. */
class Answer {
  #into;
  #targets;
  /** @type {[string, Tensor][]} */ #parameters = [];
  /** @type {Encoding | undefined} */ #encoding;
  /** @type {Assembly | undefined} */ #assembly;
  /** @type {(value: any) => void} */ #resolve = () => {};
  isSettled = false;

  /**
   * @param {ReadonlyMap<string, Elements>} into Arrays for the parameters, by name.
   * @param {ParameterTargets} targets Of the stream's parameters.
   */
  constructor(into, targets) {
    this.#into = into;
    this.#targets = targets;
    /** @type {(error: Error) => void} */
    this.reject = () => {};
    /** @type {Promise<any>} */
    this.settled = new Promise((resolve, reject) => {
      this.#resolve = (value) => {
        this.isSettled = true;
        resolve(value);
      };
      this.reject = (error) => {
        this.isSettled = true;
        reject(error);
      };
    });
    this.settled.catch(() => {}); // It may be refused while its gradients are still being written.
  }

  /** @param {any} response A TrainResponse. @throws {RangeError} It is not one that may come now. */
  add(response) {
    if (response.opened) {
      this.#resolve(response.opened.status);
    } else if (response.refused) {
      this.reject(errorFromRefusal(response.refused.refusal));
    } else if (response.begin && this.#assembly === undefined) {
      this.#begin(response.begin);
    } else if (response.chunks && this.#assembly) {
      this.#assembly.add(response.chunks.chunks);
    } else if (response.result && this.#assembly) {
      this.#assembly.finish();
      this.#targets.answered(this.#encoding, this.#parameters);
      this.#resolve(stepResultOf(response.result, this.#parameters));
    } else {
      throw new RangeError('an event is empty or came too early');
    }
  }

  /** @param {any} begin */
  #begin(begin) {
    this.#parameters = begin.parameters.map((/** @type {any} */ header) => {
      const target = this.#into.get(header.name);
      return [header.name, emptyTensor(headerFromMessage(header), target)];
    });
    this.#encoding = encodingOf(begin.encoding);
    this.#assembly = new Assembly(this.#targets.of(this.#encoding, this.#parameters));
  }
}
