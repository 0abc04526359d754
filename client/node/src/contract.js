/**
 * The contract: loaded from its .proto files, and its messages to and from plain values.
 *
 * In plain values enums have no prefix, a Timestamp is a Date, a Tensor holds a typed array, and what is unset is not there.
 */
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

import { loadPackageDefinition } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

import { RequestError } from './errors.js';
import { tensorFromMessage, tensorOf, tensorToMessage } from './tensor.js';

/** @typedef {{name: string, label: string, type: string, typeName: string}} Field */
/** @typedef {{[key: string]: any}} Message */
/** @typedef {import('@grpc/proto-loader').MessageTypeDefinition<Message, Message>} MessageDefinition */

const PACKAGE = 'optserve.v1.';
const published = fileURLToPath(new URL('../protos', import.meta.url)); // What `npm pack` copied here.
const repository = fileURLToPath(new URL('../../../protos', import.meta.url));

const definitions = loadSync('optserve/v1/optimizer_service.proto', {
  includeDirs: [existsSync(published) ? published : repository],
  longs: Number,
  enums: String,
  defaults: true,
});

/** Constructor of stubs. */
export const OptimizerService = /** @type {import('@grpc/grpc-js').ServiceClientConstructor} */ (
  /** @type {any} */ (loadPackageDefinition(definitions)).optserve.v1.OptimizerService
);

/** @type {Map<string, {fields: Map<string, Field>, choices: Set<string>}>} */
const messages = new Map();
/** @type {Map<string, {prefix: string, values: Set<string>}>} */
const enums = new Map();
for (const [name, definition] of Object.entries(definitions)) {
  if (definition.format === 'Protocol Buffer 3 DescriptorProto') {
    messages.set(name, describe(/** @type {MessageDefinition} */ (definition)));
  } else if (definition.format === 'Protocol Buffer 3 EnumDescriptorProto') {
    const { value } = /** @type {{value: {name: string}[]}} */ (definition.type);
    const values = value.map((each) => each.name);
    enums.set(name, {
      prefix: values[0]?.replace(/UNSPECIFIED$/, '') ?? '',
      values: new Set(values),
    });
  }
}

/**
 * Turn plain values into a message, and refuse what the message cannot carry: protobuf's own conversion would drop it
 * without a word.
 *
 * @param {string} type Name of the message: `SessionSpec`.
 * @param {unknown} value
 * @param {string} path Where the value stands: `spec`.
 * @returns {Message}
 * @throws {RequestError} UNKNOWN_FIELD, or INVALID_FIELD; names the field.
 */
export function encode(type, value, path) {
  return encodeMessage(PACKAGE + type, value, path);
}

/**
 * Turn a message into plain values.
 *
 * @param {string} type
 * @param {Message} message
 * @returns {any}
 */
export function decode(type, message) {
  return decodeMessage(PACKAGE + type, message);
}

/** @param {string} type @param {unknown} value @param {string} path @returns {Message} */
function encodeMessage(type, value, path) {
  if (type === PACKAGE + 'Tensor') {
    return tensorToMessage(tensorOf(/** @type {any} */ (value), { path }));
  }
  if (
    typeof value !== 'object' ||
    value === null ||
    Array.isArray(value) ||
    ArrayBuffer.isView(value)
  ) {
    throw invalid(path, 'an object', value);
  }
  const { fields, choices } = descriptionOf(type);
  /** @type {Message} */
  const message = {};
  for (const [key, member] of Object.entries(value)) {
    if (member === undefined) continue;
    const field = fields.get(key);
    if (field === undefined) {
      throw new RequestError(
        `${path} has no field '${key}'; there are ${[...fields.keys()].join(', ')}`,
        {
          reason: 'UNKNOWN_FIELD',
          field: `${path}.${key}`,
          expected: [...fields.keys()].join(', '),
          actual: key,
        },
      );
    }
    message[key] = encodeField(field, member, `${path}.${key}`);
  }
  const chosen = Object.keys(message).filter((key) => choices.has(key));
  if (chosen.length > 1) throw invalid(path, 'one of them', chosen.join(' and '));
  return message;
}

/** @param {Field} field @param {unknown} value @param {string} path */
function encodeField(field, value, path) {
  if (field.label !== 'LABEL_REPEATED') return encodeValue(field, value, path);
  if (!Array.isArray(value)) throw invalid(path, 'an array', value);
  return value.map((element, i) => encodeValue(field, element, `${path}[${i}]`));
}

/** @param {Field} field @param {unknown} value @param {string} path @returns {unknown} */
function encodeValue(field, value, path) {
  switch (field.type) {
    case 'TYPE_MESSAGE':
      return encodeMessage(qualified(field), value, path);
    case 'TYPE_ENUM': {
      const { prefix, values } = enumOf(field);
      if (values.has(prefix + value)) return prefix + value;
      throw invalid(path, [...values].map((name) => name.slice(prefix.length)).join(', '), value);
    }
    case 'TYPE_DOUBLE':
      if (typeof value === 'number') return value;
      throw invalid(path, 'a number', value);
    case 'TYPE_BOOL':
      if (typeof value === 'boolean') return value;
      throw invalid(path, 'true or false', value);
    case 'TYPE_STRING':
      if (typeof value === 'string') return value;
      throw invalid(path, 'a string', value);
    default: {
      // What is left are integers.
      const least = field.type.startsWith('TYPE_U') ? 0 : -Infinity;
      if (Number.isSafeInteger(value) && Number(value) >= least) return value;
      throw invalid(path, least === 0 ? 'an integer of at least 0' : 'an integer', value);
    }
  }
}

/** @param {string} type @param {Message} message @returns {any} */
function decodeMessage(type, message) {
  if (type === PACKAGE + 'Tensor') return tensorFromMessage(message);
  if (type === 'google.protobuf.Timestamp')
    return new Date(message.seconds * 1e3 + message.nanos / 1e6);
  /** @type {Message} */
  const plain = {};
  for (const [name, field] of descriptionOf(type).fields) {
    const value = message[name];
    if (value === undefined || value === null) continue;
    const decoded =
      field.label === 'LABEL_REPEATED'
        ? value.map((/** @type {unknown} */ element) => decodeValue(field, element))
        : decodeValue(field, value);
    if (decoded !== undefined) plain[name] = decoded;
  }
  return plain;
}

/** @param {Field} field @param {any} value @returns {unknown} */
function decodeValue(field, value) {
  if (field.type === 'TYPE_MESSAGE') return decodeMessage(qualified(field), value);
  if (field.type !== 'TYPE_ENUM') return value;
  const { prefix } = enumOf(field);
  return value === `${prefix}UNSPECIFIED` ? undefined : value.slice(prefix.length);
}

/** @param {MessageDefinition} definition */
function describe({ type, deserialize }) {
  const { field, oneofDecl } = /** @type {{field: Field[], oneofDecl: {name: string}[]}} */ (type);
  // What loadSync says about membership of oneofs is not to be relied on: 0 stands for the first as well as for none. But
  // members have no default, so that an empty message lacks them; and so do `optional` fields, each in a oneof of its own.
  const empty = deserialize(Buffer.alloc(0));
  const alone = new Set(oneofDecl.map(({ name }) => name.replace(/^_/, '')));
  const names = field.map(({ name }) => name);
  return {
    fields: new Map(field.map((each) => [each.name, each])),
    /** Fields of which only one may be set. */
    choices: new Set(names.filter((name) => !(name in empty) && !alone.has(name))),
  };
}

/** @param {string} type */
function descriptionOf(type) {
  const description = messages.get(type);
  if (description === undefined) throw new TypeError(`the contract has no message ${type}`);
  return description;
}

/** @param {Field} field */
function enumOf(field) {
  const found = enums.get(qualified(field));
  if (found === undefined) throw new TypeError(`the contract has no enum ${field.typeName}`);
  return found;
}

/** @param {Field} field */
function qualified({ typeName }) {
  return typeName.includes('.') ? typeName.replace(/^\./, '') : PACKAGE + typeName;
}

/** @param {string} path @param {string} expected @param {unknown} value */
function invalid(path, expected, value) {
  const actual =
    typeof value === 'string'
      ? value
      : value === null
        ? 'null'
        : `${typeof value} ${String(value)}`;
  return new RequestError(`${path} is ${actual}; it must be ${expected}`, {
    reason: 'INVALID_FIELD',
    field: path,
    expected,
    actual,
  });
}
