/** The answer to what a worker has sent on its stream: events that become a result and parameters. */
import { encodingOf } from './encoded.js';
import { errorFromRefusal } from './errors.js';
import { Assembly } from './framing.js';
import { emptyTensor } from './tensor.js';
import { stepResultOf } from './view.js';

/** @typedef {import('./encoded.js').ParameterTargets} ParameterTargets */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./types.js').Encoding} Encoding */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */

/** The answer to one event or one step, as it comes in. */
export class Answer {
  #headers;
  #into;
  #targets;
  /** @type {[string, Tensor][]} */ #parameters = [];
  /** @type {Encoding | undefined} */ #encoding;
  /** @type {Assembly | undefined} */ #assembly;
  /** @type {(value: any) => void} */ #resolve = () => {};
  isSettled = false;

  /**
   * @param {ReadonlyMap<string, TensorHeader>} headers Of the parameters, in their order.
   * @param {ReadonlyMap<string, Elements>} into Arrays for the parameters, by name.
   * @param {ParameterTargets} targets Of the stream's parameters.
   */
  constructor(headers, into, targets) {
    this.#headers = headers;
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
      this.#resolve(response.opened);
    } else if (response.refused) {
      this.reject(errorFromRefusal(response.refused.refusal));
    } else if (response.begin) {
      this.#begin(response.begin); // A second one takes back what came after the first.
    } else if (response.chunks && this.#assembly) {
      this.#assembly.add(response.chunks.chunks);
    } else if (response.result && this.#assembly) {
      this.#finish(this.#assembly, response.result);
    } else if (response.packed && this.#assembly === undefined) {
      this.#unpack(response.packed);
    } else {
      throw new RangeError('an event is empty or came too early');
    }
  }

  /** @param {any} begin Announces the parameters, unless the step announced no gradients. */
  #begin({ encoding, parameters }) {
    const names = [...this.#headers.keys()];
    if (
      parameters.some((/** @type {any} */ { name }, /** @type {number} */ i) => name !== names[i])
    )
      throw new RangeError('other parameters are announced than the session has');
    this.#expect(encoding);
  }

  /** @param {any} packed */
  #unpack({ result, encoding, parameters }) {
    const assembly = this.#expect(encoding);
    const chunks = parameters.map((/** @type {Buffer} */ data, /** @type {number} */ tensor) => ({
      tensor,
      offset: 0,
      data,
    }));
    // A tensor of no bytes has no chunk.
    assembly.add(chunks.filter((/** @type {{data: Buffer}} */ { data }) => data.length > 0));
    this.#finish(assembly, result);
  }

  /** Make room for the parameters. @param {string} encoding @returns {Assembly} */
  #expect(encoding) {
    this.#parameters = [...this.#headers].map(([name, header]) => [
      name,
      emptyTensor(header, this.#into.get(name)),
    ]);
    this.#encoding = encodingOf(encoding);
    return (this.#assembly = new Assembly(this.#targets.of(this.#encoding, this.#parameters)));
  }

  /** @param {Assembly} assembly @param {any} result */
  #finish(assembly, result) {
    assembly.finish();
    this.#targets.answered(this.#encoding, this.#parameters);
    this.#resolve(stepResultOf(result, this.#parameters));
  }
}
