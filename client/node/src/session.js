/** A session on the server: one model being trained. */
import { checkpointOf } from './checkpoint.js';
import { decode, encode } from './contract.js';
import { decodedFromMessage, encodingOf } from './encoded.js';
import { SessionError } from './errors.js';
import { Assembly, Memory, MESSAGE_DATA_BYTES_MAX, split } from './framing.js';
import { isPassing } from './retry.js';
import {
  arrived,
  emptyTensor,
  headerFromMessage,
  headerToMessage,
  memoryOf,
  tensorOf,
  tensorToMessage,
  wireBytes,
} from './tensor.js';
import { contributionOf, stepResultOf } from './view.js';
import { Worker } from './worker.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./types.js').Checkpoint} Checkpoint */
/** @typedef {import('./types.js').Contribution} Contribution */
/** @typedef {import('./types.js').LossInput} LossInput */
/** @typedef {import('./types.js').LossOutcome} LossOutcome */
/** @typedef {import('./types.js').LossPoint} LossPoint */
/** @typedef {import('./types.js').Named<import('./types.js').TensorLike>} NamedTensors */
/** @typedef {import('./errors.js').OptserveError} OptserveError */
/** @typedef {import('./types.js').SessionChange} SessionChange */
/** @typedef {import('./types.js').SessionStatus} SessionStatus */
/** @typedef {import('./types.js').Split} Split */
/** @typedef {import('./types.js').StepOptions} StepOptions */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./view.js').SessionView} SessionView */
/** @typedef {import('./types.js').UnaryStepOptions} UnaryStepOptions */

/** Made by `Client.createSession` and `Client.getSession`. */
export class Session {
  #calls;
  #view;
  /** @type {Map<number, Worker>} */ #workers = new Map();

  /** @param {Calls} calls @param {SessionView} view */
  constructor(calls, view) {
    this.#calls = calls;
    this.#view = view;
  }

  get id() {
    return this.#view.id;
  }

  /** Where the session stood when it last answered. */
  get status() {
    return this.#view.status;
  }

  /** What is in force, every default filled in. */
  get spec() {
    return this.#view.spec;
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
    const tensors = this.#view.tensorsOf(values, 'parameters');
    const parameters = [...tensors].map(([name, tensor]) => headerToMessage(tensor, name));
    const begin = { sessionId: this.id, parameters };
    const answer = await this.#calls.upload(() => eventsOf({ begin }, tensors.values()));
    return this.#view.noteStatus(answer.status);
  }

  /**
   * Read values of parameters as they are between two steps.
   *
   * @param {string[]} [names] Left out: all.
   * @returns {Promise<{steps: number, parameters: Record<string, Tensor>}>}
   */
  async download(names = []) {
    const request = { sessionId: this.id, names };
    const { first, tensors } = await this.#calls.persevere(() =>
      this.#receive('downloadParameters', 'begin', 'parameters', request),
    );
    return { steps: first.steps, parameters: Object.fromEntries(tensors) };
  }

  /**
   * Open a worker's stream, over which it steps.
   *
   * @param {number} [worker] From 0 to the session's workers - 1.
   * @returns {Promise<Worker>}
   */
  async join(worker = 0) {
    const joined = new Worker(this.#calls, this.#view, worker);
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
    return this.#workerOf(0).step(gradients, options);
  }

  /**
   * Take a step in one message each way: for small models, and where streams do not pass.
   *
   * @param {NamedTensors} gradients
   * @param {UnaryStepOptions} [options]
   * @returns {Promise<StepResult>}
   */
  async stepUnary(gradients, { step = this.#view.nextStep, worker = 0 } = {}) {
    const seat = this.#view.seatOf(worker);
    const contribution = this.#view.contributionOf(seat, step, gradients);
    const timeoutS = this.#calls.timeoutS + this.#view.roundTimeoutS;
    const answer = await seat.take(
      this.#calls,
      contribution,
      () => this.#calls.once('step', { sessionId: this.id, ...contribution.message }, timeoutS),
      mayPassUnary,
    );
    const encoding = encodingOf(answer.encoding);
    const named = answer.parameters.map((/** @type {any} */ t) => [
      t.header.name,
      decodedFromMessage(t, encoding),
    ]);
    return this.#view.noteStep(stepResultOf(answer.result, named));
  }

  /**
   * Ask what became of the last step that a worker has sent, from whatever client.
   *
   * @param {number} [worker]
   * @returns {Promise<Contribution>}
   */
  async getContribution(worker = 0) {
    const request = { sessionId: this.id, worker };
    const answer = await this.#calls.unary('getContribution', request);
    return contributionOf(answer);
  }

  /**
   * Go on from where the session stands, whatever was known of it here: for a worker that steps were lost of, and for one that
   * takes the place of another. A step that waits for the other workers, and has this worker's gradients, is waited for.
   *
   * @param {number} [worker]
   * @returns {Promise<{steps: number, parameters: Record<string, Tensor>}>} The newest parameters: the next step is `steps` + 1.
   */
  async resume(worker = 0) {
    const result = await this.#workerOf(worker).resume();
    return result ? { steps: result.step, parameters: result.parameters } : this.download();
  }

  /**
   * End an epoch: a scheduler that counts epochs advances.
   *
   * @param {{epoch?: number}} [options] `epoch`: its number, from 1. Left out: the next one.
   * @returns {Promise<SessionStatus>}
   */
  async endEpoch({ epoch = this.status.epochs + 1 } = {}) {
    const request = { sessionId: this.id, epoch };
    const answer = await this.#calls.unary('endEpoch', request);
    return this.#view.noteStatus(answer.status);
  }

  /**
   * Compute the session's loss and its gradient with respect to the predictions. It is computed again when its answer is lost,
   * and then stands twice in the history.
   *
   * @param {LossInput} input
   * @returns {Promise<LossOutcome>}
   */
  async evaluateLoss({ predictions, targets, via, ...others }) {
    const begin = { ...encode('LossBegin', others, 'evaluateLoss'), sessionId: this.id };
    const sent = [
      tensorOf(predictions, { path: 'predictions' }),
      tensorOf(targets, { path: 'targets' }),
    ];
    const bytes = sent.map(({ data }) => data.byteLength);
    // The answer must fit too: it may hold a gradient and elements, each as large as the predictions.
    const largest = Math.max(Number(bytes[0]) + Number(bytes[1]), 2 * Number(bytes[0]));
    const small = via === undefined ? largest <= MESSAGE_DATA_BYTES_MAX : via === 'unary';
    return this.#calls.persevere(() =>
      small ? this.#evaluateInMessages(begin, sent) : this.#evaluateInStream(begin, sent),
    );
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
      page = await this.#calls.unary('listLossPoints', {
        ...request,
        sessionId: this.id,
        pageToken,
      });
      points.push(...decode('ListLossPointsResponse', page).points);
    } while (page.nextPageToken !== '');
    return { points, forgotten: page.forgotten };
  }

  /**
   * Save the session as it is between two steps, under a name: see `Client.restoreCheckpoint`. Where nothing has changed
   * since it was saved under that name, the answer is the checkpoint that is there.
   *
   * @param {string} name
   * @returns {Promise<Checkpoint>}
   */
  async saveCheckpoint(name) {
    const answer = await this.#calls.unary('saveCheckpoint', { sessionId: this.id, name });
    return checkpointOf(answer.checkpoint);
  }

  /** Forget the session on the server. @returns {Promise<SessionStatus>} Where it stood. */
  async delete() {
    const answer = await this.#calls.persevere(async (attempt) => {
      try {
        return await this.#calls.once('deleteSession', { sessionId: this.id });
      } catch (error) {
        const isGone = error instanceof SessionError && error.reason === 'SESSION_NOT_FOUND';
        if (isGone && attempt > 0) return undefined; // The attempt whose answer was lost has done it.
        throw error;
      }
    });
    await this.close();
    return answer ? this.#view.noteStatus(answer.status) : this.status;
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
  async #evaluateInMessages(request, sent) {
    const [predictions, targets] = sent.map((tensor) => tensorToMessage(tensor));
    const answer = await this.#calls.once('evaluateLoss', { ...request, predictions, targets });
    const { result, ...tensors } = decode('EvaluateLossResponse', answer);
    return { ...result, ...tensors };
  }

  /** @param {any} request @param {Tensor[]} sent @returns {Promise<LossOutcome>} */
  async #evaluateInStream(request, sent) {
    const [predictions, targets] = sent.map((tensor) => headerToMessage(tensor));
    const events = eventsOf({ begin: { ...request, predictions, targets } }, sent);
    const { first, tensors } = await this.#receive(
      'evaluateLossStream',
      'evaluated',
      'tensors',
      undefined,
      events,
    );
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
        tensors = first[announced].map((/** @type {any} */ h) => [
          h.name,
          emptyTensor(headerFromMessage(h)),
        ]);
        assembly = new Assembly(tensors.map(([, tensor]) => new Memory(memoryOf(tensor.data))));
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

  /** @param {number} worker @returns {Worker} */
  #workerOf(worker) {
    const found = this.#workers.get(worker) ?? new Worker(this.#calls, this.#view, worker);
    this.#workers.set(worker, found);
    return found;
  }

  /** @param {any} answer @returns {this} */
  #take({ session }) {
    this.#view.replace(session);
    return this;
  }
}

/** @param {OptserveError} error @param {number} attempt */
function mayPassUnary(error, attempt) {
  // The call that has just broken may not have been noticed yet on the other side.
  return isPassing(error) || (attempt > 0 && error.reason === 'WORKER_BUSY');
}

/** @param {any} begin @param {Iterable<Tensor>} tensors @returns {Generator<any, void, void>} */
function* eventsOf(begin, tensors) {
  yield begin;
  for (const chunks of split([...tensors].map((tensor) => new Memory(wireBytes(tensor)))))
    yield { chunks };
}
