/** Node client of optserve, an optimizer as a service. */
export { Client, connect } from './client.js';
export {
  ClosedError,
  DeadlineError,
  InternalError,
  LimitError,
  OptserveError,
  ProtocolError,
  RequestError,
  ServiceError,
  SessionError,
  StepsLostError,
  StepUnknownError,
  UnauthenticatedError,
  UnavailableError,
} from './errors.js';
export { Session } from './session.js';
export { Worker } from './worker.js';

/** @typedef {import('./types.js').Catalogue} Catalogue */
/** @typedef {import('./types.js').Checkpoint} Checkpoint */
/** @typedef {import('./types.js').ClientOptions} ClientOptions */
/** @typedef {import('./types.js').Contribution} Contribution */
/** @typedef {import('./types.js').DataType} DataType */
/** @typedef {import('./types.js').Elements} Elements */
/** @typedef {import('./types.js').Encoding} Encoding */
/** @typedef {import('./types.js').LossInput} LossInput */
/** @typedef {import('./types.js').LossOutcome} LossOutcome */
/** @typedef {import('./types.js').LossPoint} LossPoint */
/** @typedef {import('./types.js').NewSession} NewSession */
/** @typedef {import('./types.js').Reason} Reason */
/** @typedef {import('./types.js').RetryOptions} RetryOptions */
/** @typedef {import('./types.js').ServerInfo} ServerInfo */
/** @typedef {import('./types.js').SessionChange} SessionChange */
/** @typedef {import('./types.js').SessionSpec} SessionSpec */
/** @typedef {import('./types.js').SessionStatus} SessionStatus */
/** @typedef {import('./types.js').Split} Split */
/** @typedef {import('./types.js').StepOutcome} StepOutcome */
/** @typedef {import('./types.js').StepResult} StepResult */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */
/** @typedef {import('./types.js').TensorLike} TensorLike */
/** @typedef {import('./types.js').TlsOptions} TlsOptions */
/** @typedef {import('./types.js').Token} Token */
