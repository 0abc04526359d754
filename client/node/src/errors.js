/**
 * What can go wrong, and whose mistake it is. Decide by class or by `reason`, never by the text of a message.
 *
 *     OptserveError
 *     ├── RequestError          the caller's mistake: the same again is refused again
 *     ├── SessionError          the session's state: ask where it stands, and go on from there
 *     │   └── StepsLostError        the server has lost steps: resume, and repeat them
 *     └── ServiceError          the server, or the way to it
 *         ├── LimitError            a limit: do what the message says
 *         ├── UnauthenticatedError  it does not know, or not believe, who calls
 *         ├── UnavailableError      nothing answers, or it is about to stop
 *         ├── DeadlineError         no answer in time: what was asked may have been done
 *         ├── StepUnknownError      a step was sent, and no answer came
 *         ├── ClosedError           the client, or the worker, has been closed
 *         ├── ProtocolError         client and server do not understand each other
 *         └── InternalError         a fault of the server
 */
import { status as Code } from '@grpc/grpc-js';
import { fromJSON } from '@grpc/proto-loader';

/** @typedef {import('./types.js').Reason} Reason */
/**
 * @typedef {object} Facts
 * @property {Reason} [reason] Why it was refused. Unset: it was not an optserve that refused it.
 * @property {number} [code] gRPC status code. Unset: no call was made.
 * @property {string} [field] Path of the field at fault: `gradients[2].shape`. Empty: no single field.
 * @property {string} [expected] What would have been right.
 * @property {string} [actual] What came.
 * @property {number} [retryAfterS] Seconds after which the same may work. Unset: not by waiting.
 * @property {string} [requestId] Finds an internal error in the server's log.
 * @property {unknown} [cause] The gRPC error.
 */

export class OptserveError extends Error {
  /** @param {string} message @param {Facts} [facts] */
  constructor(message, facts = {}) {
    super(message, facts.cause === undefined ? undefined : { cause: facts.cause });
    this.name = new.target.name;
    this.reason = facts.reason;
    this.code = facts.code;
    this.field = facts.field ?? '';
    this.expected = facts.expected ?? '';
    this.actual = facts.actual ?? '';
    this.retryAfterS = facts.retryAfterS;
    this.requestId = facts.requestId;
  }
}

/** The caller's mistake: the same again is refused again. */
export class RequestError extends OptserveError {}
/** The session's state does not allow it: ask where it stands, and go on from there. */
export class SessionError extends OptserveError {}
/**
 * The server stands before steps that it had answered: they are lost, with what they learnt. `Session.resume`, and go on with
 * the data of step `resumesFrom`.
 */
export class StepsLostError extends SessionError {
  /** @param {{steps: number, known: number, cause?: OptserveError}} facts */
  constructor({ steps, known, cause }) {
    super(
      `the session stands at ${steps} steps; ${known} had been answered: the server has lost the last ${known - steps};` +
        ` resume, and go on with step ${steps + 1}`,
      { cause },
    );
    /** Number of the step to go on with. */
    this.resumesFrom = steps + 1;
    /** How many answered steps are gone. */
    this.lost = known - steps;
  }
}
/** The server, or the way to it. */
export class ServiceError extends OptserveError {}
/** A limit: do what the message says. */
export class LimitError extends ServiceError {}
/** The server does not know who calls: there is no token, or one that it does not accept. */
export class UnauthenticatedError extends ServiceError {}
/** Nothing answers, or it is about to stop: try again, here or elsewhere. */
export class UnavailableError extends ServiceError {}
/** No answer in time: what was asked may have been done. */
export class DeadlineError extends ServiceError {}
/**
 * A step was sent, and no answer came: it may have been applied, or not. `Session.getContribution` tells; or take the same
 * step again: the server applies it once.
 */
export class StepUnknownError extends ServiceError {
  /**
   * @param {OptserveError} cause The last failure.
   * @param {{step: number, worker: number, digest: Uint8Array}} contribution
   */
  constructor(cause, { step, worker, digest }) {
    super(
      `step ${step} was sent, and no answer came: ${cause.message}; whether it was applied is unknown until asked:` +
        ' see getContribution, or take the same step again, which applies it once',
      { code: cause.code, cause },
    );
    /** Number of the step. */
    this.step = step;
    /** Who sent it. */
    this.worker = worker;
    /** What its content is known by: see `Contribution`. */
    this.digest = digest;
  }
}
/** The client, or the worker, has been closed. */
export class ClosedError extends ServiceError {}
/** Client and server do not understand each other. */
export class ProtocolError extends ServiceError {}
/** A fault of the server; `requestId` finds it in the server's log. */
export class InternalError extends ServiceError {}

/** @type {Map<string, typeof OptserveError>} By reason. */
export const CLASS_OF = new Map([
  ...rows(RequestError, [
    'MALFORMED_MESSAGE',
    'UNKNOWN_FIELD',
    'MISSING_FIELD',
    'INVALID_FIELD',
    'INVALID_NAME',
    'UNKNOWN_NAME',
    'INVALID_HYPERPARAMETER',
    'INVALID_EXPRESSION',
    'SHAPE_MISMATCH',
    'DATA_TYPE_MISMATCH',
    'BYTE_COUNT_MISMATCH',
    'CHUNK_OUT_OF_ORDER',
    'EVENT_OUT_OF_ORDER',
    'NON_FINITE_GRADIENT',
    'NO_GRADIENT',
    'TARGET_OUT_OF_RANGE',
  ]),
  ...rows(SessionError, [
    'SESSION_NOT_FOUND',
    'PARAMETERS_NOT_SET',
    'LOSS_NOT_SET',
    'STEP_OUT_OF_ORDER',
    'EPOCH_OUT_OF_ORDER',
    'EPOCH_EMPTY',
    'WORKER_BUSY',
    'ROUND_TIMEOUT',
    'SCHEDULE_FAILED',
    'SESSION_FAILED',
    'SESSION_DELETED',
    'SESSION_DAMAGED',
    'JOURNAL_FOREIGN',
    'NO_STORAGE',
    'CHECKPOINT_NOT_FOUND',
    'CHECKPOINT_EXISTS',
    'STALLED',
    'STEP_CONFLICT',
    'REQUEST_CONFLICT',
    'SEAT_TAKEN_OVER',
  ]),
  ...rows(LimitError, [
    'TOO_MANY',
    'MEMORY_EXHAUSTED',
    'LIMIT_EXCEEDED',
    'STORAGE_FULL',
    'RATE_EXCEEDED',
  ]),
  ...rows(UnauthenticatedError, ['UNAUTHENTICATED']),
  ...rows(UnavailableError, ['DRAINING']),
  ...rows(InternalError, ['INTERNAL']),
]);

/** @type {Map<number, typeof OptserveError>} By status code, where no optserve has given a reason. */
const CLASS_OF_CODE = new Map([
  [Code.CANCELLED, ClosedError],
  [Code.DEADLINE_EXCEEDED, DeadlineError],
  [Code.RESOURCE_EXHAUSTED, LimitError],
  [Code.UNAUTHENTICATED, UnauthenticatedError],
  [Code.UNAVAILABLE, UnavailableError],
]);

// google/rpc/{status,error_details}.proto, as far as the contract uses them; no package that we need anyway ships them.
/** @type {any} */
const GOOGLE_RPC = {
  Status: {
    fields: {
      code: { id: 1, type: 'int32' },
      message: { id: 2, type: 'string' },
      details: { id: 3, type: 'Any', rule: 'repeated' },
    },
  },
  Any: { fields: { type_url: { id: 1, type: 'string' }, value: { id: 2, type: 'bytes' } } },
  ErrorInfo: {
    fields: {
      reason: { id: 1, type: 'string' },
      domain: { id: 2, type: 'string' },
      metadata: { id: 3, type: 'string', keyType: 'string' },
    },
  },
  RetryInfo: { fields: { retry_delay: { id: 1, type: 'Duration' } } },
  Duration: { fields: { seconds: { id: 1, type: 'int64' }, nanos: { id: 2, type: 'int32' } } },
};
const rpc = fromJSON(
  { nested: { google: { nested: { rpc: { nested: GOOGLE_RPC } } } } },
  { keepCase: true, longs: Number, defaults: true },
);

/**
 * Turn a gRPC error into ours.
 *
 * @param {import('@grpc/grpc-js').ServiceError} error
 * @returns {OptserveError}
 */
export function errorFromStatus(error) {
  const details = detailsOf(error);
  const info = details.get('google.rpc.ErrorInfo');
  if (info?.domain !== 'optserve') {
    const message = `${Code[error.code] ?? 'UNKNOWN'}: ${error.details || error.message}`;
    return new (CLASS_OF_CODE.get(error.code) ?? ProtocolError)(message, {
      code: error.code,
      cause: error,
    });
  }
  const delay = details.get('google.rpc.RetryInfo')?.retry_delay;
  return errorOf(error.details, {
    reason: info.reason,
    code: error.code,
    field: info.metadata.field,
    expected: info.metadata.expected,
    actual: info.metadata.actual,
    requestId: info.metadata.request_id,
    retryAfterS: secondsOf(delay),
    cause: error,
  });
}

/**
 * Turn the Refusal of a step on a stream into an error.
 *
 * @param {import('../generated/optserve/v1/Refusal.js').Refusal__Output} refusal
 * @returns {OptserveError}
 */
export function errorFromRefusal(refusal) {
  return errorOf(refusal.message, {
    reason: /** @type {Reason} */ (refusal.reason.replace(/^REASON_/, '')),
    code: refusal.code,
    field: refusal.field,
    expected: refusal.expected,
    actual: refusal.actual,
    retryAfterS: secondsOf(refusal.retryAfter),
  });
}

/** @param {typeof OptserveError} type @param {Reason[]} reasons @returns {[string, typeof OptserveError][]} */
function rows(type, reasons) {
  return reasons.map((reason) => [reason, type]);
}

/** @param {string} message @param {Facts} facts */
function errorOf(message, facts) {
  return new (CLASS_OF.get(facts.reason ?? '') ?? OptserveError)(message, facts);
}

/** @param {import('@grpc/grpc-js').ServiceError} error @returns {Map<string, any>} By full name of the message. */
function detailsOf(error) {
  const details = new Map();
  const [packed] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!Buffer.isBuffer(packed)) return details;
  try {
    for (const { type_url: url, value } of unpack('google.rpc.Status', packed).details) {
      const name = url.slice(url.lastIndexOf('/') + 1);
      if (name in rpc) details.set(name, unpack(name, value));
    }
  } catch {
    // Whoever answered speaks another language: the status code and its text are all there is.
  }
  return details;
}

/** @param {string} name @param {Buffer} bytes @returns {any} */
function unpack(name, bytes) {
  const definition = /** @type {import('@grpc/proto-loader').MessageTypeDefinition<any, any>} */ (
    rpc[name]
  );
  return definition.deserialize(bytes);
}

/** @param {{seconds: number, nanos: number} | null | undefined} duration */
function secondsOf(duration) {
  return duration ? duration.seconds + duration.nanos / 1e9 : undefined;
}
