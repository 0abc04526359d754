/** A session on the server: one model being trained. */
import { status as Code } from '@grpc/grpc-js';
import { setTimeout as delay } from 'node:timers/promises';

import { decode, encode } from './contract.js';
import { CallerError, DrainingError, OptserveError } from './errors.js';
import { Assembly, MESSAGE_DATA_BYTES_MAX, split } from './framing.js';
import {
  arrived,
  emptyTensor,
  headerFromMessage,
  headerToMessage,
  memoryOf,
  tensorFromMessage,
  tensorOf,
  tensorToMessage,
  wireBytes,
} from './tensor.js';
import { ratesOf, stepResultOf, Worker } from './worker.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./types.js').LossInput} LossInput */
/** @typedef {import('./types.js').LossOutcome} LossOutcome */
/** @typedef {import('./types.js').LossPoint} LossPoint */
/** @typedef {import('./types.js').Named<import('./types.js').TensorLike>} NamedTensors */
/** @typedef {import('./types.js').SessionChange} SessionChange */
/** @typedef {import('./types.js').SessionSpec} SessionSpec */
/** @typedef {import('./types.js').SessionStatus} SessionStatus */
/** @typedef {import('./types.js').Split} Split */
/** @typedef {import('./types.js').StepOptions} StepOptions */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */
/** @typedef {import('./types.js').UnaryStepOptions} UnaryStepOptions */

const BACKOFF_S = 0.2; // Before the second attempt; doubles with each further one.

/** Made by `Client.createSession` and `Client.getSession`. */
export class Session {
  #calls;
  #retries;
  /** @type {Map<number, Worker>} */ #workers = new Map();
  /** @type {Map<string, TensorHeader>} */ #headers = new Map();

  /** @param {Calls} calls @param {any} message A Session. @param {number} retries */
  constructor(calls, message, retries) {
    this.#calls = calls;
    this.#retries = retries;
    /** @type {SessionStatus} Where the session stood when it last answered. */
    this.status = statusOf(message.status);
    /** @type {SessionSpec} What is in force. */
    this.spec = decode('SessionSpec', message.spec);
    this.#headers = new Map(message.spec.parameters.map((/** @type {any} */ h) => [h.name, headerFromMessage(h)]));
  }

  get id() {
    return this.status.sessionId;
  }

  /** Steps that have been applied, as far as this client knows. */
  get steps() {
    return this.status.steps;
  }

  /** Ask where the session stands, and what is in force. @returns {Promise<this>} */
  async refresh() {
    return this.#take(await this.#calls.unary('getSession', { sessionId: this.id }));
  }

  /**
   * Change what may change in a running session: all of it, or nothing.
   *
   * @param {SessionChange} change
   * @returns {Promise<this>}
   */
  async update(change) {
    const request = encode('UpdateSessionRequest', change, 'update');
    return this.#take(await this.#calls.unary('updateSession', { ...request, sessionId: this.id }));
  }

  /**
   * Set values of parameters: all that are given, or none.
   *
   * @param {NamedTensors} values
   * @returns {Promise<SessionStatus>}
   */
  async upload(values) {
    const tensors = this.#tensorsOf(values, 'parameters');
    const parameters = [...tensors].map(([name, tensor]) => headerToMessage(tensor, name));
    const begin = { sessionId: this.id, parameters };
    const answer = await this.#calls.upload(eventsOf({ begin }, tensors.values()));
    return this.noteStatus(answer.status);
  }

  /**
   * Read values of parameters as they are between two steps.
   *
   * @param {string[]} [names] Left out: all.
   * @returns {Promise<{steps: number, parameters: Record<string, Tensor>}>}
   */
  async download(names = []) {
    const { first, tensors } = await this.#receive('downloadParameters', 'begin', 'parameters', {
      sessionId: this.id,
      names,
    });
    return { steps: first.steps, parameters: Object.fromEntries(tensors) };
  }

  /**
   * Open a worker's stream, over which it steps.
   *
   * @param {number} [worker] From 0 to the session's workers - 1.
   * @returns {Promise<Worker>}
   */
  async join(worker = 0) {
    const joined = new Worker(this.#calls, this, worker);
    await joined.open();
    this.#workers.set(worker, joined);
    return joined;
  }

  /**
   * Take a step as worker 0, over its stream, which the first step opens. See `Worker.step`.
   *
   * @param {NamedTensors} gradients
   * @param {StepOptions} [options]
   * @returns {Promise<StepResult>}
   */
  step(gradients, options) {
    const worker = this.#workers.get(0) ?? new Worker(this.#calls, this, 0);
    this.#workers.set(0, worker);
    return worker.step(gradients, options);
  }

  /**
   * Take a step in one message each way: for small models, and where streams do not pass.
   *
   * @param {NamedTensors} gradients
   * @param {UnaryStepOptions} [options]
   * @returns {Promise<StepResult>}
   */
  async stepUnary(gradients, { step = this.steps + 1, worker = 0 } = {}) {
    const tensors = [...this.gradientsOf(gradients)].map(([name, tensor]) => tensorToMessage(tensor, name));
    const request = { sessionId: this.id, worker, step, gradients: tensors };
    const { result, parameters } = await this.persevere(() =>
      this.#calls.unary('step', request, this.stepTimeoutS),
    );
    const named = parameters.map((/** @type {any} */ t) => [t.header.name, tensorFromMessage(t)]);
    return this.noteStep(stepResultOf(result, named));
  }

  /**
   * End an epoch: a scheduler that counts epochs advances.
   *
   * @param {{epoch?: number}} [options] `epoch`: its number, from 1. Left out: the next one.
   * @returns {Promise<SessionStatus>}
   */
  async endEpoch({ epoch = this.status.epochs + 1 } = {}) {
    const request = { sessionId: this.id, epoch };
    const answer = await this.persevere(() => this.#calls.unary('endEpoch', request));
    return this.noteStatus(answer.status);
  }

  /**
   * Compute the session's loss and its gradient with respect to the predictions.
   *
   * @param {LossInput} input
   * @returns {Promise<LossOutcome>}
   */
  async evaluateLoss({ predictions, targets, split: part, gradient, stream }) {
    const request = encode('LossBegin', { split: part, gradient }, 'evaluateLoss');
    request.sessionId = this.id;
    const sent = [tensorOf(predictions, { path: 'predictions' }), tensorOf(targets, { path: 'targets' })];
    const [given, wanted] = sent.map((tensor) => tensor.data.byteLength);
    // Question and answer must fit: the answer may hold a gradient and the elements, each of the predictions' size.
    const largest = Math.max(Number(given) + Number(wanted), 2 * Number(given));
    return (stream ?? largest > MESSAGE_DATA_BYTES_MAX)
      ? this.#evaluateLossStream(request, sent)
      : this.#evaluateLossUnary(request, sent);
  }

  /**
   * Read the session's history: its curves.
   *
   * @param {{split?: Split, pageSize?: number}} [options] `split`: left out, both.
   * @returns {Promise<{points: LossPoint[], forgotten: number}>} `forgotten`: how many older points are no longer kept.
   */
  async lossPoints(options = {}) {
    const request = encode('ListLossPointsRequest', options, 'lossPoints');
    /** @type {LossPoint[]} */
    const points = [];
    let page = { forgotten: 0, nextPageToken: '' };
    do {
      const pageToken = page.nextPageToken;
      page = await this.#calls.unary('listLossPoints', { ...request, sessionId: this.id, pageToken });
      points.push(...decode('ListLossPointsResponse', page).points);
    } while (page.nextPageToken !== '');
    return { points, forgotten: page.forgotten };
  }

  /** Forget the session on the server. @returns {Promise<SessionStatus>} Where it stood. */
  async delete() {
    const answer = await this.#calls.unary('deleteSession', { sessionId: this.id });
    await this.close();
    return this.noteStatus(answer.status);
  }

  /** Close the streams of this session's workers; the session stays on the server. @returns {Promise<void>} */
  async close() {
    const workers = [...this.#workers.values()];
    this.#workers.clear();
    await Promise.all(workers.map((worker) => worker.close()));
  }

  async [Symbol.asyncDispose]() {
    await this.close();
  }

  /** @param {any} request @param {Tensor[]} sent @returns {Promise<LossOutcome>} */
  async #evaluateLossUnary(request, sent) {
    const [predictions, targets] = sent.map((tensor) => tensorToMessage(tensor));
    const answer = await this.#calls.unary('evaluateLoss', { ...request, predictions, targets });
    const { result, ...tensors } = decode('EvaluateLossResponse', answer);
    return { ...result, ...tensors };
  }

  /** @param {any} request @param {Tensor[]} sent @returns {Promise<LossOutcome>} */
  async #evaluateLossStream(request, sent) {
    const [predictions, targets] = sent.map((tensor) => headerToMessage(tensor));
    const events = eventsOf({ begin: { ...request, predictions, targets } }, sent);
    const { first, tensors } = await this.#receive('evaluateLossStream', 'evaluated', 'tensors', undefined, events);
    return { ...decode('LossResult', first.result), ...Object.fromEntries(tensors) };
  }

  /**
   * Receive the tensors with which a call answers.
   *
   * @param {'downloadParameters' | 'evaluateLossStream'} method
   * @param {string} opening Name of the event that announces them.
   * @param {string} announced Name of its list of headers.
   * @param {any} request The only one, of a method that does not take a stream.
   * @param {Iterable<any>} [events] What to send, to a method that does.
   * @returns {Promise<{first: any, tensors: [string, Tensor][]}>}
   */
  async #receive(method, opening, announced, request, events) {
    /** @type {any} */ let first;
    /** @type {[string, Tensor][]} */ let tensors = [];
    let assembly = new Assembly([]);
    const stream = this.#calls.open(
      method,
      (message) => {
        if (message.chunks) return assembly.add(message.chunks.chunks);
        first = message[opening];
        tensors = first[announced].map((/** @type {any} */ h) => [h.name, emptyTensor(headerFromMessage(h))]);
        assembly = new Assembly(tensors.map(([, tensor]) => memoryOf(tensor.data)));
      },
      request,
    );
    stream.expectWithin(this.#calls.timeoutS);
    if (events !== undefined) {
      await stream.writeAll(events);
      stream.end();
    }
    await stream.ended;
    assembly.finish();
    for (const [, tensor] of tensors) arrived(tensor);
    return { first, tensors };
  }

  /** Seconds without progress after which a step has failed: the other workers may take their time. @internal */
  get stepTimeoutS() {
    return this.#calls.timeoutS + (this.spec.limits?.roundTimeoutS ?? 0);
  }

  /** @internal @param {NamedTensors} gradients @returns {Map<string, Tensor>} */
  gradientsOf(gradients) {
    return this.#tensorsOf(gradients, 'gradients');
  }

  /**
   * @internal
   * @param {import('./types.js').Named<import('./types.js').Elements>} into
   * @returns {Map<string, import('./types.js').Elements>}
   */
  targetsOf(into) {
    const targets = new Map(into instanceof Map ? into : Object.entries(into));
    for (const [name, elements] of targets) {
      const header = this.#headers.get(name);
      if (header === undefined) {
        throw new CallerError(`into has '${name}', which is no parameter of the session`, {
          reason: 'UNKNOWN_NAME',
          field: `into.${name}`,
          actual: name,
        });
      }
      emptyTensor(header, elements);
    }
    return targets;
  }

  /**
   * Take notice of a status. Answers to several workers may overtake each other: the counts never go back.
   *
   * @internal
   * @param {any} message A SessionStatus.
   * @returns {SessionStatus}
   */
  noteStatus(message) {
    const { steps, epochs } = this.status;
    this.status = statusOf(message);
    return this.noteCounts(steps, epochs);
  }

  /** @internal @param {StepResult} result @returns {StepResult} */
  noteStep(result) {
    this.noteCounts(result.step, result.epochs);
    return result;
  }

  /** @internal @param {number} steps @param {number} epochs @returns {SessionStatus} */
  noteCounts(steps, epochs) {
    const { status } = this;
    this.status = { ...status, steps: Math.max(steps, status.steps), epochs: Math.max(epochs, status.epochs) };
    return this.status;
  }

  /**
   * Do what may be done again, because it carries its number, until it has been answered.
   *
   * @internal
   * @template T
   * @param {() => Promise<T>} act
   * @returns {Promise<T>}
   */
  async persevere(act) {
    for (let attempt = 0; ; attempt += 1) {
      try {
        return await act();
      } catch (error) {
        if (attempt >= this.#retries || !mayPass(error, attempt)) throw error;
        await delay(BACKOFF_S * 2 ** attempt * 1e3);
      }
    }
  }

  /** @param {any} answer @returns {this} */
  #take({ session }) {
    this.spec = decode('SessionSpec', session.spec);
    this.status = statusOf(session.status);
    return this;
  }

  /** @param {NamedTensors} given @param {string} path @returns {Map<string, Tensor>} */
  #tensorsOf(given, path) {
    const entries = given instanceof Map ? [...given] : Object.entries(given);
    return new Map(
      entries.map(([name, value]) => [
        name,
        tensorOf(value, { header: this.#headers.get(name), path: `${path}.${name}` }),
      ]),
    );
  }
}

/** @param {any} message A SessionStatus. @returns {SessionStatus} */
export function statusOf(message) {
  return { ...decode('SessionStatus', message), rates: ratesOf(message.rates) };
}

/** @param {any} begin @param {Iterable<Tensor>} tensors @returns {Generator<any, void, void>} */
function* eventsOf(begin, tensors) {
  yield begin;
  for (const chunks of split([...tensors].map(wireBytes))) yield { chunks };
}

/** @param {unknown} error @param {number} attempt @returns {boolean} */
function mayPass(error, attempt) {
  if (!(error instanceof OptserveError) || error instanceof CallerError) return false;
  if (error instanceof DrainingError || error.code === Code.UNAVAILABLE) return true;
  // The stream that has just broken may not have been noticed yet on the other side.
  return attempt > 0 && error.reason === 'WORKER_BUSY';
}
