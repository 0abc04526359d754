/** What is in the file of a checkpoint, read as anybody would who has no library for it. */
import { readFile } from 'node:fs/promises';

/** @typedef {import('./values.js').Json} Json */

const LENGTH_BYTES = 8;

/** @type {Record<string, string>} The contract's names of data types, by those of the file. */
const DATA_TYPES = { F16: 'FP16', BF16: 'BF16', F32: 'FP32', F64: 'FP64', I64: 'INT64' };

/**
 * @param {string} path
 * @returns {Promise<Json>} The tensors by name, and what the metadata says in numbers.
 */
export async function checkpointFile(path) {
  const content = await readFile(path);
  const begin = LENGTH_BYTES + Number(content.readBigUInt64LE());
  const header = JSON.parse(content.toString('utf8', LENGTH_BYTES, begin));
  const { __metadata__: metadata, ...entries } = header;
  const tensors = Object.keys(entries)
    .sort()
    .map((name) => {
      const { dtype, shape, data_offsets: offsets } = entries[name];
      const [first, last] = offsets.map((/** @type {number} */ offset) => begin + offset);
      const data = content.toString('base64', first, last);
      return { name, data_type: DATA_TYPES[dtype], shape, data };
    });
  return { tensors, rates: JSON.parse(metadata.rates), numbers: JSON.parse(metadata.numbers) };
}
