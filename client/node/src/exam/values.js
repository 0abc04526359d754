/** Values of a scenario to values of the client, and back. */

/** @typedef {{[key: string]: any}} Json */
/** @typedef {import('../index.js').Session} Session */
/** @typedef {import('../index.js').Tensor} Tensor */

/** @type {Record<string, any>} The array that holds the elements of each data type. */
const ARRAYS = {
  BOOL: Uint8Array,
  UINT8: Uint8Array,
  INT8: Int8Array,
  INT16: Int16Array,
  INT32: Int32Array,
  INT64: BigInt64Array,
  FP16: Uint16Array,
  FP32: Float32Array,
  FP64: Float64Array,
  BF16: Uint16Array,
};

/** Make what the client takes of what a scenario says. @param {any} value @returns {any} */
export function fromScenario(value) {
  if (Array.isArray(value)) return value.map(fromScenario);
  if (!isPlain(value)) return numberFrom(value);
  if ('data_type' in value) return tensorFrom(value);
  return renamed(value, camelCase, fromScenario);
}

/** Make a tensor, or its header where it has no elements. @param {Json} given @returns {any} */
export function tensorFrom({ data_type: dataType, shape, data, pattern }) {
  const type = ARRAYS[dataType];
  if (pattern !== undefined)
    return { dataType, shape, data: patterned(new type(product(shape)), pattern) };
  if (data === undefined) return { dataType, shape };
  const bytes = Uint8Array.from(Buffer.from(data, 'base64')); // Memory of its own: any element may begin there.
  return {
    dataType,
    shape,
    data: new type(bytes.buffer, 0, bytes.length / type.BYTES_PER_ELEMENT),
  };
}

/** @param {Json[]} tensors @returns {Map<string, any>} By name. */
export function namedTensors(tensors) {
  return new Map(tensors.map((tensor) => [tensor.name, tensorFrom(tensor)]));
}

/** The double that a scenario has no JSON number for. @param {any} value */
export function numberFrom(value) {
  return ['NaN', 'Infinity', '-Infinity'].includes(value) ? Number(value) : value;
}

/** Make what a scenario expects of what the client gave. @param {any} value @returns {any} */
export function toScenario(value) {
  if (Array.isArray(value)) return value.map(toScenario);
  if (!isPlain(value)) return value;
  if (ArrayBuffer.isView(value.data)) return tensorDocument('', /** @type {any} */ (value));
  const { rates, ...others } = value; // Keys of rates are names of groups.
  return { ...renamed(others, snakeCase, toScenario), ...(rates && { rates }) };
}

/** @param {Session} session */
export function sessionDocument({ status, spec }) {
  return toScenario({ status, spec });
}

/** @param {Session} session @param {import('../index.js').StepResult} result */
export function stepDocument(session, { parameters, ...result }) {
  const tensors = session.spec.parameters.map(({ name }) => tensorDocument(name, parameters[name]));
  return { ...toScenario(result), parameters: tensors };
}

/**
 * @param {Session} session
 * @param {string[] | undefined} names Those that were asked for; undefined: all.
 * @param {{steps: number, parameters: Record<string, Tensor>}} download
 */
export function downloadDocument(session, names, { steps, parameters }) {
  const order = names ?? session.spec.parameters.map(({ name }) => name);
  return { steps, parameters: order.map((name) => tensorDocument(name, parameters[name])) };
}

/** @param {string} name @param {Tensor | undefined} tensor @returns {Json} */
export function tensorDocument(name, tensor) {
  if (tensor === undefined) return { name };
  const { dataType, shape, data } = tensor;
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return { name, data_type: dataType, shape, data: bytes.toString('base64') };
}

/** @param {any} elements @param {Json} pattern */
function patterned(elements, { multiply, add, modulo, subtract, divide }) {
  const element = elements instanceof BigInt64Array ? BigInt : Number;
  for (let i = 0; i < elements.length; i += 1) {
    elements[i] = element((((i * multiply + add) % modulo) - subtract) / divide);
  }
  return elements;
}

/** @param {number[]} shape */
function product(shape) {
  return shape.reduce((count, size) => count * size, 1);
}

/** @param {unknown} value @returns {value is Json} */
function isPlain(value) {
  return typeof value === 'object' && value !== null && !(value instanceof Date);
}

/** @param {Json} value @param {(name: string) => string} name @param {(value: any) => any} convert */
function renamed(value, name, convert) {
  return Object.fromEntries(
    Object.entries(value).map(([key, member]) => [name(key), convert(member)]),
  );
}

/** @param {string} name */
function camelCase(name) {
  return name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());
}

/** @param {string} name */
function snakeCase(name) {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
