import { Metadata, status as Code } from '@grpc/grpc-js';
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import {
  CLASS_OF,
  DeadlineError,
  errorFromRefusal,
  errorFromStatus,
  LimitError,
  OptserveError,
  ProtocolError,
  RequestError,
  UnauthenticatedError,
  UnavailableError,
} from '../src/errors.js';

/**
 * A google.rpc.Status as the server sends it, made with googleapis-common-protos: an ErrorInfo (MEMORY_EXHAUSTED, at
 * `spec`), a QuotaFailure, of which this client knows nothing, and a RetryInfo of 1.5 s.
 */
const DETAILS =
  'CAgSBWxhdGVyGlcKKHR5cGUuZ29vZ2xlYXBpcy5jb20vZ29vZ2xlLnJwYy5FcnJvckluZm8SKwoQTUVNT1JZX0VYSE' +
  'FVU1RFRBIIb3B0c2VydmUaDQoFZmllbGQSBHNwZWMaOgordHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlF1' +
  'b3RhRmFpbHVyZRILCgkKBHNwZWMSAXgaNgoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlJldHJ5SW5mbx' +
  'IKCggIARCAyrXuAQ==';

/** @param {number} code @param {string} [details] @returns {import('@grpc/grpc-js').ServiceError} */
function serviceError(code, details) {
  const metadata = new Metadata();
  if (details) metadata.set('grpc-status-details-bin', Buffer.from(details, 'base64'));
  return Object.assign(new Error('text'), { code, details: 'text', metadata });
}

test('every reason of the contract has a class', () => {
  const proto = readFileSync(new URL('../../../protos/optserve/v1/error.proto', import.meta.url));
  const reasons = [...proto.toString().matchAll(/^ {2}REASON_(\w+) = [1-9]/gm)].map(
    ([, name]) => name,
  );
  assert.ok(reasons.length > 30);
  assert.deepEqual([...CLASS_OF.keys()].sort(), reasons.sort());
});

test('a refused call becomes an error with its facts', () => {
  const error = errorFromStatus(serviceError(Code.RESOURCE_EXHAUSTED, DETAILS));
  assert.ok(error instanceof LimitError);
  assert.equal(error.reason, 'MEMORY_EXHAUSTED');
  assert.equal(error.field, 'spec');
  assert.equal(error.expected, '');
  assert.equal(error.retryAfterS, 1.5);
  assert.equal(error.name, 'LimitError');
});

test('a call that no optserve has answered is classed by its code', () => {
  for (const [code, type] of /** @type {const} */ ([
    [Code.UNAUTHENTICATED, UnauthenticatedError],
    [Code.UNAVAILABLE, UnavailableError],
    [Code.DEADLINE_EXCEEDED, DeadlineError],
    [Code.UNIMPLEMENTED, ProtocolError],
  ])) {
    const error = errorFromStatus(serviceError(code));
    assert.ok(error instanceof type);
    assert.equal(error.reason, undefined);
  }
});

test('details that cannot be read do no harm', () => {
  const error = errorFromStatus(serviceError(Code.UNAVAILABLE, 'bm9uc2Vuc2U='));
  assert.ok(error instanceof UnavailableError);
});

test('a refused step becomes an error with its facts', () => {
  const error = errorFromRefusal({
    code: Code.INVALID_ARGUMENT,
    reason: 'REASON_SHAPE_MISMATCH',
    message: 'it has another shape',
    field: 'gradients[2].shape',
    expected: '(3, 4)',
    actual: '(4, 3)',
    retryAfter: null,
  });
  assert.ok(error instanceof RequestError);
  assert.equal(error.reason, 'SHAPE_MISMATCH');
  assert.equal(error.actual, '(4, 3)');
  assert.equal(error.retryAfterS, undefined);
});

test('a reason of a newer server is kept', () => {
  const reason = /** @type {any} */ ('REASON_FROM_THE_FUTURE');
  const facts = { code: 3, message: '', field: '', expected: '', actual: '', retryAfter: null };
  const error = errorFromRefusal({ ...facts, reason });
  assert.ok(error instanceof OptserveError);
  assert.equal(error.reason, 'FROM_THE_FUTURE');
});
