/** Calls on the channel: every one with a deadline, every error one of ours, and no write faster than the wire. */
import { ClosedError, DeadlineError, errorFromStatus, ProtocolError } from './errors.js';
import { isPassing } from './retry.js';

/** @typedef {{[key: string]: any}} Message */
/** @typedef {'createSession' | 'getSession' | 'listSessions' | 'updateSession' | 'deleteSession' | 'step' | 'endEpoch'
 *   | 'getContribution' | 'evaluateLoss' | 'listLossPoints' | 'saveCheckpoint' | 'listCheckpoints' | 'restoreCheckpoint'
 *   | 'deleteCheckpoint' | 'getCatalogue' | 'getServerInfo'} UnaryMethod */
/** @typedef {'downloadParameters' | 'downloadCheckpoint' | 'train' | 'evaluateLossStream'} AnsweringMethod Those that
 *   answer with a stream. */
/** @typedef {import('./errors.js').OptserveError} OptserveError */
/** @typedef {import('./retry.js').Retry} Retry */

const GOODBYE_S = 5; // How long leaving waits for the server to end its side.

/** The methods of the service, called. */
export class Calls {
  #stub;
  #retry;
  #options;
  /** @type {Set<Stream>} */ #open = new Set();
  #closed = false;

  /**
   * @param {import('@grpc/grpc-js').Client} stub
   * @param {{timeoutS: number, retry: Retry, options: import('@grpc/grpc-js').CallOptions}} terms `options` of every call.
   */
  constructor(stub, { timeoutS, retry, options }) {
    this.#stub = /** @type {any} */ (stub);
    this.#retry = retry;
    this.#options = options;
    this.timeoutS = timeoutS;
  }

  /**
   * Call a method that may be called again: it reads, or the contract makes a repetition harmless.
   *
   * @param {UnaryMethod} method
   * @param {Message} request
   * @returns {Promise<any>}
   */
  unary(method, request) {
    return this.persevere(() => this.once(method, request));
  }

  /**
   * Call a method, and try once.
   *
   * @param {UnaryMethod} method
   * @param {Message} request
   * @param {number} [timeoutS]
   * @returns {Promise<any>}
   */
  once(method, request, timeoutS = this.timeoutS) {
    return new Promise((resolve, reject) => {
      this.#refuseClosed();
      const deadline = Date.now() + timeoutS * 1e3;
      this.#stub[method](request, { ...this.#options, deadline }, settle(resolve, reject));
    });
  }

  /**
   * Send the events of an upload and return its answer. May be done again: it sets the same values.
   *
   * @param {() => Iterable<Message>} events
   * @returns {Promise<any>}
   */
  upload(events) {
    return this.persevere(() => this.#uploadOnce(events()));
  }

  /**
   * Open a call that answers with a stream.
   *
   * @param {AnsweringMethod} method
   * @param {(message: any) => void} receive Called for every message of the answer; may throw to end the call.
   * @param {Message} [request] The only one, of a method that does not take a stream.
   * @returns {Stream}
   */
  open(method, receive, request) {
    this.#refuseClosed();
    const given = request === undefined ? [] : [request];
    return this.#opened(new Stream(this.#stub[method](...given, this.#options), receive));
  }

  /**
   * Do what may be done again until it has been answered, or there is no use in it any more.
   *
   * @template T
   * @param {(attempt: number, reached: () => void) => Promise<T>} act See `Retry.persevere`.
   * @param {(error: OptserveError, attempt: number) => boolean} [mayPass] Whether the same may work later.
   * @returns {Promise<T>}
   */
  persevere(act, mayPass = isPassing) {
    return this.#retry.persevere(act, mayPass);
  }

  /** Leave every call that is open, and close the channel. @returns {Promise<void>} */
  async close() {
    this.#closed = true;
    this.#retry.close();
    await Promise.all([...this.#open].map((stream) => stream.leave()));
    this.#stub.close();
  }

  /** @param {Iterable<Message>} events @returns {Promise<any>} */
  async #uploadOnce(events) {
    this.#refuseClosed();
    /** @type {(value?: any) => void} */ let resolve = () => {};
    /** @type {(error: Error) => void} */ let reject = () => {};
    const answer = new Promise((...settlers) => ([resolve, reject] = settlers));
    const call = this.#stub.uploadParameters(this.#options, settle(resolve, reject));
    const stream = this.#opened(new Stream(call, () => {}));
    // Only its callback says how such a call has ended.
    answer.then(
      () => stream.close(),
      (error) => stream.fail(error),
    );
    stream.expectWithin(this.timeoutS);
    await stream.writeAll(events);
    stream.end();
    return answer;
  }

  #refuseClosed() {
    if (this.#closed) throw new ClosedError('the client has been closed');
  }

  /** @param {Stream} stream */
  #opened(stream) {
    this.#open.add(stream);
    const forget = () => this.#open.delete(stream);
    stream.ended.then(forget, forget);
    return stream;
  }
}

/** One call whose messages come and go while it is open. */
export class Stream {
  #call;
  /** @type {NodeJS.Timeout | undefined} */ #timer;
  /** @type {Error | undefined} */ #failure;
  /** @type {(() => void) | undefined} */ #drained;
  /** @type {() => void} */ #resolve = () => {};
  /** @type {(error: Error) => void} */ #reject = () => {};
  #over = false;

  /**
   * @param {any} call
   * @param {(message: any) => void} receive
   */
  constructor(call, receive) {
    this.#call = call;
    /** Settles when the call has ended: rejects with an OptserveError. */
    this.ended = new Promise((/** @type {(value: void) => void} */ resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.ended.catch(() => {}); // Whoever waits for it is told; nobody need.
    call.on('drain', () => this.#resume());
    call.on('error', (/** @type {any} */ error) => this.fail(errorFromStatus(error)));
    call.on('end', () => this.close());
    call.on('data', (/** @type {any} */ message) => {
      if (this.#over) return;
      this.#timer?.refresh();
      try {
        receive(message);
      } catch (error) {
        const text = `the answer does not keep the contract: ${/** @type {Error} */ (error).message}`;
        this.fail(new ProtocolError(text, { cause: error }));
      }
    });
  }

  /** Whether the call has ended. */
  get isOver() {
    return this.#over;
  }

  /** End the call if nothing moves for so long; undefined: do not expect anything. @param {number} [seconds] */
  expectWithin(seconds) {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (seconds === undefined || this.#over) return;
    this.#timer = setTimeout(() => {
      this.fail(new DeadlineError(`nothing has moved for ${seconds} s`));
    }, seconds * 1e3);
  }

  /**
   * Write a message; what is returned resolves when there is room for the next.
   *
   * @param {Message} message
   * @returns {Promise<void>}
   * @throws {import('./errors.js').OptserveError} The call has failed.
   */
  async write(message) {
    if (this.#failure) throw this.#failure;
    if (this.#over) return; // The answer is complete: the rest is not wanted.
    const hasRoom = this.#call.write(message, () => this.#timer?.refresh());
    if (!hasRoom)
      await new Promise(
        (/** @type {(value: void) => void} */ resolve) => (this.#drained = resolve),
      );
    if (this.#failure) throw this.#failure;
  }

  /** @param {Iterable<Message>} messages */
  async writeAll(messages) {
    for (const message of messages) await this.write(message);
  }

  /** Take no more messages until `resume`: there is work to do with the last one. */
  pause() {
    this.#call.pause();
  }

  /** Take messages again. */
  resume() {
    this.#call.resume();
  }

  /** Say that nothing more will be written. */
  end() {
    if (!this.#over) this.#call.end();
  }

  /** Write nothing more, and wait until the call has ended. @returns {Promise<void>} */
  async leave() {
    this.expectWithin(GOODBYE_S);
    this.end();
    await this.ended.catch(() => {}); // There is nothing left to lose.
  }

  /** Take the call as complete. */
  close() {
    this.#finish();
    this.#resolve();
  }

  /** End the call with an error. @param {Error} error */
  fail(error) {
    if (this.#over) return;
    this.#failure = error;
    this.#finish();
    this.#call.cancel();
    this.#reject(error);
  }

  #finish() {
    this.#over = true;
    this.expectWithin(undefined);
    this.#resume();
  }

  #resume() {
    this.#drained?.();
    this.#drained = undefined;
  }
}

/**
 * @param {(value: any) => void} resolve
 * @param {(error: Error) => void} reject
 */
function settle(resolve, reject) {
  return (/** @type {any} */ error, /** @type {any} */ response) =>
    error ? reject(errorFromStatus(error)) : resolve(response);
}
