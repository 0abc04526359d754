/** What a client knows of its session: what is in force, and where the session stood when it last answered. */
import { decode } from './contract.js';
import { GradientSources } from './encoded.js';
import { RequestError } from './errors.js';
import { emptyTensor, headerFromMessage, tensorOf } from './tensor.js';

/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./types.js').SessionSpec} SessionSpec */
/** @typedef {import('./types.js').SessionStatus} SessionStatus */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */

/** Shared by a session and its workers. */
export class SessionView {
  /** @type {Map<string, TensorHeader>} */ #headers = new Map();
  /** @type {Map<number, GradientSources>} By worker. */ #gradients = new Map();

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

  /** Where a worker's gradients come from. @param {number} worker @returns {GradientSources} */
  gradientsOf(worker) {
    const gradients = this.#gradients.get(worker) ?? new GradientSources(this.spec.wire?.gradients);
    this.#gradients.set(worker, gradients);
    return gradients;
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

  /** Take notice of a step. @param {StepResult} result @returns {StepResult} */
  noteStep(result) {
    this.#noteCounts(result.step, result.epochs);
    return result;
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
   * Return gradients in the order of their parameters, if there is one for each, of its data type and shape.
   *
   * @param {Map<string, Tensor>} gradients By name.
   * @returns {Map<string, Tensor> | undefined}
   */
  completeGradients(gradients) {
    if (gradients.size !== this.#headers.size) return undefined;
    const ordered = new Map();
    for (const [name, { dataType, shape }] of this.#headers) {
      const gradient = gradients.get(name);
      if (gradient?.dataType !== dataType) return undefined;
      if (gradient.shape.length !== shape.length) return undefined;
      if (gradient.shape.some((size, i) => size !== shape[i])) return undefined;
      ordered.set(name, gradient);
    }
    return ordered;
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
export function stepResultOf({ step, epochs, rates, gradientNorm, replayed }, parameters) {
  return {
    step,
    epochs,
    rates: ratesOf(rates),
    gradientNorm,
    replayed,
    parameters: Object.fromEntries(parameters),
  };
}

/** @param {{group: string, lr: number}[]} rates @returns {Record<string, number>} */
function ratesOf(rates) {
  return Object.fromEntries(rates.map(({ group, lr }) => [group, lr]));
}
