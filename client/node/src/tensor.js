/**
 * Tensors between typed arrays and the wire. On a little-endian machine nothing is copied: bytes and elements are views of
 * the same memory.
 */
import { endianness } from 'node:os';

import { RequestError } from './errors.js';

/** @typedef {import('./types.js').DataType} DataType */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */
/** @typedef {import('./types.js').TensorLike} TensorLike */

const BIG_ENDIAN = endianness() === 'BE'; // The wire is little-endian.

/** @type {Record<DataType, {new (buffer: ArrayBufferLike, offset: number, length: number): Elements, BYTES_PER_ELEMENT: number}>} */
const ARRAY_OF = {
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

/** @type {[Function, DataType][]} What an array holds if nothing else tells. */
const NATURAL = [
  [Float32Array, 'FP32'],
  [Float64Array, 'FP64'],
  [BigInt64Array, 'INT64'],
  [Int32Array, 'INT32'],
  [Int16Array, 'INT16'],
  [Int8Array, 'INT8'],
  [Uint8Array, 'UINT8'],
];

/**
 * Complete what was given for a tensor.
 *
 * @param {TensorLike} given
 * @param {{header?: TensorHeader, path: string}} context `header` of the parameter that the tensor belongs to; `path` for
 *     errors.
 * @returns {Tensor} Shares its elements with `given`.
 * @throws {RequestError} DATA_TYPE_MISMATCH or BYTE_COUNT_MISMATCH: the elements are not of the type, or not as many as the
 *     shape says.
 */
export function tensorOf(given, { header, path }) {
  const { data, shape, dataType } = ArrayBuffer.isView(given) ? { data: given } : (given ?? {});
  if (!ArrayBuffer.isView(data)) {
    throw new RequestError(`${path} must be a typed array, or an object whose data is one`, {
      reason: 'INVALID_FIELD',
      field: path,
      expected: 'a typed array',
      actual: given === null ? 'null' : typeof given,
    });
  }
  const type = dataType ?? dataTypeOf(data, header);
  if (type === undefined || ARRAY_OF[type] === undefined || !(data instanceof ARRAY_OF[type])) {
    const expected =
      type === undefined ? 'a dataType beside it' : (ARRAY_OF[type]?.name ?? 'a known data type');
    throw new RequestError(
      `${path} is a ${data.constructor.name}; ${type ?? 'it'} needs ${expected}`,
      {
        reason: 'DATA_TYPE_MISMATCH',
        field: `${path}.data_type`,
        expected,
        actual: data.constructor.name,
      },
    );
  }
  const alike = header !== undefined && elementCount(header.shape) === data.length;
  const tensor = {
    dataType: type,
    shape: [...(shape ?? (alike ? header.shape : [data.length]))],
    data,
  };
  if (elementCount(tensor.shape) !== data.length) {
    throw new RequestError(
      `${path} has ${data.length} elements; its shape [${tensor.shape}] has others`,
      {
        reason: 'BYTE_COUNT_MISMATCH',
        field: path,
        expected: `${elementCount(tensor.shape)} elements`,
        actual: `${data.length} elements`,
      },
    );
  }
  return tensor;
}

/**
 * Make a tensor to receive into.
 *
 * @param {TensorHeader} header
 * @param {Elements} [elements] To use instead of new memory.
 * @returns {Tensor}
 * @throws {RequestError} DATA_TYPE_MISMATCH or BYTE_COUNT_MISMATCH: `elements` do not fit.
 */
export function emptyTensor({ dataType, shape }, elements) {
  const count = elementCount(shape);
  const Elements = ARRAY_OF[dataType];
  const data =
    elements ?? new Elements(new ArrayBuffer(count * Elements.BYTES_PER_ELEMENT), 0, count);
  return tensorOf({ dataType, shape, data }, { path: 'into' });
}

/**
 * Return the bytes of a tensor as the wire has them.
 *
 * @param {Tensor} tensor
 * @returns {Buffer} A view of its elements; on a big-endian machine a copy.
 */
export function wireBytes({ data }) {
  const bytes = memoryOf(data);
  return BIG_ENDIAN ? swapped(Buffer.from(bytes), data.BYTES_PER_ELEMENT) : bytes;
}

/**
 * Return the memory of a tensor, for bytes that come from the wire; `arrived` must follow.
 *
 * @param {Elements} data
 * @returns {Buffer}
 */
export function memoryOf(data) {
  return Buffer.from(data.buffer, data.byteOffset, data.byteLength);
}

/** Make elements of the bytes that the wire brought into a tensor's memory. @param {Tensor} tensor */
export function arrived({ data }) {
  if (BIG_ENDIAN) swapped(memoryOf(data), data.BYTES_PER_ELEMENT);
}

/** @param {readonly number[]} shape @returns {number} */
export function elementCount(shape) {
  return shape.reduce((count, size) => count * size, 1);
}

/** @param {DataType} dataType @returns {number} */
export function itemBytes(dataType) {
  return ARRAY_OF[dataType].BYTES_PER_ELEMENT;
}

/** @param {TensorHeader} header @param {string} name @returns {{name: string, dataType: string, shape: number[]}} */
export function headerToMessage({ dataType, shape }, name = '') {
  return { name, dataType: `DATA_TYPE_${dataType}`, shape: [...shape] };
}

/** @param {{dataType: string, shape: number[]}} message @returns {TensorHeader} */
export function headerFromMessage({ dataType, shape }) {
  return { dataType: /** @type {DataType} */ (dataType.replace(/^DATA_TYPE_/, '')), shape };
}

/** @param {Tensor} tensor @param {string} name @returns {any} */
export function tensorToMessage(tensor, name = '') {
  return { header: headerToMessage(tensor, name), data: wireBytes(tensor) };
}

/** @param {any} message @returns {Tensor} */
export function tensorFromMessage({ header, data }) {
  const tensor = emptyTensor(headerFromMessage(header));
  const memory = memoryOf(tensor.data);
  if (memory.length !== data.length)
    throw new RangeError(`${memory.length} bytes announced, ${data.length} came`);
  data.copy(memory); // copy: the message's bytes need not lie where an array of wider elements may begin.
  arrived(tensor);
  return tensor;
}

/** @param {Elements} data @param {TensorHeader} [header] @returns {DataType | undefined} */
function dataTypeOf(data, header) {
  if (header !== undefined && data instanceof ARRAY_OF[header.dataType]) return header.dataType;
  return NATURAL.find(([type]) => data instanceof type)?.[1];
}

/** @param {Buffer} bytes @param {number} width @returns {Buffer} */
function swapped(bytes, width) {
  if (width === 2) return bytes.swap16();
  if (width === 4) return bytes.swap32();
  return width === 8 ? bytes.swap64() : bytes;
}
