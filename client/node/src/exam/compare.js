/** Whether what came is what must come. */
import { createHash } from 'node:crypto';
import { isDeepStrictEqual } from 'node:util';

import { OptserveError } from '../index.js';
import { numberFrom } from './values.js';

/** @typedef {import('./values.js').Json} Json */

/**
 * Throw where an answer does not match: objects may hold more than is expected, everything else must be equal.
 *
 * @param {any} actual
 * @param {any} expected
 * @param {string} [path]
 */
export function compare(actual, expected, path = '') {
  if (Array.isArray(expected) && Array.isArray(actual) && expected.length === actual.length) {
    expected.forEach((element, i) => compare(actual[i], element, `${path}[${i}]`));
  } else if (isObject(expected) && isObject(actual)) {
    const hashed = 'sha256' in expected ? { ...actual, sha256: sha256(actual.data) } : actual;
    for (const [key, value] of Object.entries(expected)) {
      compare(hashed[key], value, path ? `${path}.${key}` : key);
    }
  } else if (!isDeepStrictEqual(actual ?? null, numberFrom(expected))) {
    throw new Error(`${path}: expected ${shown(expected)}, got ${shown(actual)}`);
  }
}

/** @param {unknown} error @param {Json} expected */
export function compareRefusal(error, { names, ...expected }) {
  if (!(error instanceof OptserveError)) throw error;
  const { reason, field, message } = error;
  compare({ reason, field, expected: error.expected, actual: error.actual }, expected, 'refused');
  if (names !== undefined && !`${field} ${message}`.includes(names)) {
    throw new Error(`refused: neither '${field}' nor '${message}' holds '${names}'`);
  }
}

/** @param {unknown} value @returns {value is Json} */
function isObject(value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** @param {string} data Base64. */
function sha256(data) {
  return createHash('sha256').update(Buffer.from(data, 'base64')).digest('hex');
}

/** @param {any} value */
function shown(value) {
  const text = typeof value === 'number' ? String(value) : (JSON.stringify(value) ?? 'nothing');
  return text.length > 300 ? `${text.slice(0, 300)}…` : text;
}
