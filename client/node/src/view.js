/** What a client knows of its session: what is in force, and where the session stood when it last answered. */
import { decode } from './contract.js';
import { RequestError } from './errors.js';
import { Seat } from './seat.js';
import { emptyTensor, headerFromMessage, tensorOf } from './tensor.js';

/** @typedef {import('./contribution.js').Contribution} Contribution */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./types.js').SessionSpec} SessionSpec */
/** @typedef {import('./types.js').SessionStatus} SessionStatus */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */

/** Shared by a session and its workers. */
export class SessionView {
  /** @type {Map<string, TensorHeader>} */ #headers = new Map();
  /** @type {Map<number, Seat>} By worker. */ #seats = new Map();

  /** @param {any} message A Session. */
  constructor(message) {
    /** @type {SessionStatus} */
    this.status = statusOf(message.status);
    /** @type {SessionSpec} */
    this.spec = decode('SessionSpec', message.spec);
    this.#headers = new Map(
      message.spec.parameters.map((/** @type {any} */ h) => [h.name, headerFromMessage(h)]),
    );
  }

  get id() {
    return this.status.sessionId;
  }

  /** What the parameters are, by name, in the session's order. @returns {ReadonlyMap<string, TensorHeader>} */
  get headers() {
    return this.#headers;
  }

  /** Number of the next step. */
  get nextStep() {
    return this.status.steps + 1;
  }

  /** Seconds that a step may spend waiting for the other workers. */
  get roundTimeoutS() {
    const { workers, limits } = this.spec;
    return workers > 1 ? (limits?.roundTimeoutS ?? 0) : 0;
  }

  /** @param {number} worker @returns {Seat} */
  seatOf(worker) {
    const seat = this.#seats.get(worker) ?? this.#newSeat(worker);
    this.#seats.set(worker, seat);
    return seat;
  }

  /** Take a session as it answered. @param {any} message A Session. */
  replace({ status, spec }) {
    this.spec = decode('SessionSpec', spec);
    this.status = statusOf(status);
  }

  /**
   * Take notice of a status. Answers to several workers may overtake each other: counts never go back.
   *
   * @param {any} message A SessionStatus.
   * @returns {SessionStatus}
   */
  noteStatus(message) {
    const { steps, epochs } = this.status;
    this.status = statusOf(message);
    return this.#noteCounts(steps, epochs);
  }

  /**
   * Go on from where the session stands, whatever was known of it.
   *
   * @param {any} message A SessionStatus.
   * @param {Seat} seat
   */
  resume(message, seat) {
    this.status = statusOf(message);
    seat.resume(this.status.steps);
  }

  /** Take notice of a step. @param {StepResult} result @returns {StepResult} */
  noteStep(result) {
    this.#noteCounts(result.step, result.epochs);
    return result;
  }

  /**
   * Make a worker's contribution to a step of what its caller has given.
   *
   * @param {Seat} seat
   * @param {number} step
   * @param {import('./types.js').Named<import('./types.js').TensorLike>} gradients By name.
   * @returns {Contribution}
   */
  contributionOf(seat, step, gradients) {
    const given = this.tensorsOf(gradients, 'gradients');
    // In the order of the parameters, the same content is the same bytes.
    const known = [...this.#headers.keys()].filter((name) => given.has(name));
    const ordered = new Map([...known, ...given.keys()].map((name) => [name, given.get(name)]));
    return seat.contribution(step, /** @type {any} */ (ordered), this.#isComplete(given));
  }

  /**
   * Complete tensors by the parameters that they belong to.
   *
   * @param {import('./types.js').Named<import('./types.js').TensorLike>} given By name.
   * @param {string} path Where they stand, for errors.
   * @returns {Map<string, Tensor>}
   */
  tensorsOf(given, path) {
    const entries = given instanceof Map ? [...given] : Object.entries(given);
    return new Map(
      entries.map(([name, value]) => [
        name,
        tensorOf(value, { header: this.#headers.get(name), path: `${path}.${name}` }),
      ]),
    );
  }

  /**
   * Check arrays into which parameters shall be written.
   *
   * @param {import('./types.js').Named<Elements>} into By name.
   * @returns {Map<string, Elements>}
   * @throws {RequestError} One fits no parameter.
   */
  targetsOf(into) {
    const targets = new Map(into instanceof Map ? into : Object.entries(into));
    for (const [name, elements] of targets) {
      const header = this.#headers.get(name);
      if (header === undefined) {
        throw new RequestError(`into has '${name}', which is no parameter of the session`, {
          reason: 'UNKNOWN_NAME',
          field: `into.${name}`,
          actual: name,
        });
      }
      emptyTensor(header, elements);
    }
    return targets;
  }

  /** @param {number} worker */
  #newSeat(worker) {
    return new Seat(worker, this.spec.wire?.gradients, this.status.steps);
  }

  /** Whether there is one for every parameter, of its data type and shape. @param {Map<string, Tensor>} gradients */
  #isComplete(gradients) {
    if (gradients.size !== this.#headers.size) return false;
    return [...this.#headers].every(([name, { dataType, shape }]) => {
      const gradient = gradients.get(name);
      return (
        gradient?.dataType === dataType &&
        gradient.shape.length === shape.length &&
        gradient.shape.every((size, i) => size === shape[i])
      );
    });
  }

  /** @param {number} steps @param {number} epochs @returns {SessionStatus} */
  #noteCounts(steps, epochs) {
    const { status } = this;
    this.status = {
      ...status,
      steps: Math.max(steps, status.steps),
      epochs: Math.max(epochs, status.epochs),
    };
    return this.status;
  }
}

/** @param {any} message A SessionStatus. @returns {SessionStatus} */
export function statusOf(message) {
  return { ...decode('SessionStatus', message), rates: ratesOf(message.rates) };
}

/**
 * Join a StepResult and the parameters that came with it.
 *
 * @param {any} message
 * @param {[string, Tensor][]} parameters
 * @returns {StepResult}
 */
export function stepResultOf(message, parameters) {
  return { ...outcomeOf(message), parameters: Object.fromEntries(parameters) };
}

/** @param {any} message A StepResult. @returns {import('./types.js').StepOutcome} */
export function outcomeOf({ step, epochs, rates, gradientNorm, replayed }) {
  return { step, epochs, rates: ratesOf(rates), gradientNorm, replayed };
}

/** @param {any} message A GetContributionResponse. @returns {import('./types.js').Contribution} */
export function contributionOf({ contribution, result, status }) {
  const { step, digest, applied } = contribution ?? {
    step: 0,
    digest: new Uint8Array(),
    applied: false,
  };
  const { steps, epochs } = status;
  return { step, digest, applied, ...(result && { result: outcomeOf(result) }), steps, epochs };
}

/** @param {{group: string, lr: number}[]} rates @returns {Record<string, number>} */
function ratesOf(rates) {
  return Object.fromEntries(rates.map(({ group, lr }) => [group, lr]));
}
