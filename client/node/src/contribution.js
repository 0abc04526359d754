/** What a worker contributes to a step, and how it is sent until it has been answered. */
import { StepDigest } from './digest.js';
import {
  ClosedError,
  DeadlineError,
  InternalError,
  OptserveError,
  ProtocolError,
  RequestError,
  SessionError,
  StepUnknownError,
  UnavailableError,
} from './errors.js';
import { CHUNK_BYTES_MAX, split, whole } from './framing.js';
import { isPassing } from './retry.js';
import { headerToMessage } from './tensor.js';

/** @typedef {import('./calls.js').Calls} Calls */
/** @typedef {import('./encoded.js').GradientSources} GradientSources */
/** @typedef {import('./framing.js').Source} Source */
/** @typedef {import('./types.js').Tensor} Tensor */

/** The gradients of one worker for one step. Whenever they are sent, they are sent with the same bytes and digest. */
export class Contribution {
  #gradients;
  #complete;
  #sources;
  /** @type {Buffer | undefined} Of the content, once all of it has been read. */ #digest;
  #unanswered = false;
  /** Whether the server has it, and nobody here has its gradients. */ isHeld = false;

  /**
   * @param {{step: number, worker: number}} place
   * @param {Map<string, Tensor>} gradients In the order of their parameters.
   * @param {boolean} complete Whether there is one for every parameter, of its data type and shape.
   * @param {GradientSources} sources
   */
  constructor({ step, worker }, gradients, complete, sources) {
    this.step = step;
    this.worker = worker;
    this.#gradients = gradients;
    this.#complete = complete;
    this.#sources = sources;
  }

  /**
   * Return one that the server has and that waits for the other workers, known by its digest alone.
   *
   * @param {{step: number, worker: number, digest: Buffer}} place
   * @param {GradientSources} sources
   * @returns {Contribution}
   */
  static held({ digest, ...place }, sources) {
    const contribution = new Contribution(place, new Map(), true, sources);
    contribution.#digest = digest;
    contribution.isHeld = true;
    return contribution;
  }

  /**
   * Send it until it has been answered, or there is no use in it any more.
   *
   * @template T
   * @param {Calls} calls
   * @param {(reached: () => void) => Promise<T>} attempt See `Retry.persevere`.
   * @param {(error: OptserveError, attempt: number) => boolean} [mayPass]
   * @returns {Promise<T>}
   * @throws {OptserveError} A StepUnknownError if it was sent, and its fate is not known.
   */
  async take(calls, attempt, mayPass = isPassing) {
    try {
      return await calls.persevere(async (_, reached) => {
        try {
          return await attempt(reached);
        } catch (error) {
          this.#unanswered ||= this.#digest !== undefined && isSilence(error);
          throw error;
        }
      }, mayPass);
    } catch (error) {
      if (!this.#unanswered || this.#digest === undefined || isAnswer(error)) throw error;
      const { step, worker } = this;
      throw new StepUnknownError(/** @type {any} */ (error), {
        step,
        worker,
        digest: this.#digest,
      });
    }
  }

  /**
   * Whether the server has it, and need only be asked what came of it.
   *
   * @param {{step: number, digest: Buffer} | null | undefined} known The worker's last contribution that the server has.
   * @returns {boolean}
   */
  isKnown(known) {
    if (this.isHeld) return true;
    return known?.step === this.step && this.#digest?.equals(known.digest) === true;
  }

  /**
   * Return the events that make the step on a stream. If there is a gradient for every parameter both sides know what comes:
   * nothing is announced, and a small model takes one message each way.
   *
   * @param {boolean} isKnown Whether the server has it: then nothing is sent again.
   * @returns {Iterable<any>}
   */
  events(isKnown) {
    if (!this.#complete) {
      const headers = [...this.#gradients].map(([name, tensor]) => headerToMessage(tensor, name));
      return this.#inChunks({ gradients: headers }, isKnown);
    }
    const bytes = [...this.#gradients.values()].reduce((sum, { data }) => sum + data.byteLength, 0);
    if (isKnown || bytes > CHUNK_BYTES_MAX) {
      return this.#inChunks({ everyParameter: true }, isKnown);
    }
    return [{ packed: { step: this.step, gradients: this.#inFull(), digest: this.#digest } }];
  }

  /** Return what a StepRequest holds of it. */
  get message() {
    const data = this.#inFull();
    const gradients = [...this.#gradients].map(([name, tensor], i) => ({
      header: headerToMessage(tensor, name),
      data: data[i],
    }));
    return { worker: this.worker, step: this.step, gradients, digest: this.#digest };
  }

  /** @param {any} announced @param {boolean} isKnown @returns {Generator<any, void, void>} */
  *#inChunks(announced, isKnown) {
    yield { begin: { step: this.step, ...announced, digest: this.#digest } };
    if (!isKnown) {
      const { sources, digest } = this.#read();
      for (const chunks of split(sources)) yield { chunks };
      this.#digest = digest.end();
    }
    yield { end: { digest: this.#digest } };
  }

  /** @returns {Buffer[]} The bytes of each gradient. */
  #inFull() {
    const { sources, digest } = this.#read();
    const data = sources.map(whole);
    this.#digest = digest.end();
    return data;
  }

  /** Begin to read the gradients, and to calculate their digest on the way. */
  #read() {
    const digest = new StepDigest(this.#complete ? [] : [...this.#gradients.keys()]);
    return { sources: this.#sources.of(this.step, this.#gradients, digest), digest };
  }
}

/** Whether an error leaves open what became of a step that was sent. @param {unknown} error */
function isSilence(error) {
  if (error instanceof SessionError) return error.reason === 'STALLED';
  return error instanceof UnavailableError || error instanceof DeadlineError;
}

/**
 * Whether an error is for the caller as it is, though an attempt before it was not answered: it says what became of the step,
 * or that there is nothing left to become of it, or must not be hidden.
 *
 * @param {unknown} error
 */
function isAnswer(error) {
  if (error instanceof SessionError) return !isSilence(error) && error.reason !== 'WORKER_BUSY';
  if (!(error instanceof OptserveError)) return true;
  const types = [RequestError, ClosedError, ProtocolError, InternalError];
  return types.some((type) => error instanceof type);
}
