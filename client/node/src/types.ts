// What the client takes and gives, in types: derived from the contract, so that a new optimizer, scheduler or loss needs
// no line here. Enum values lose their prefix ("FP32", "TRAIN"); names are the contract's, in camelCase.

import type { ChannelCredentials, ChannelOptions } from '@grpc/grpc-js';
import type { Timestamp__Output } from '../generated/google/protobuf/Timestamp.js';
import type { Checkpoint__Output } from '../generated/optserve/v1/Checkpoint.js';
import type { DataType__Output } from '../generated/optserve/v1/DataType.js';
import type { Encoding__Output } from '../generated/optserve/v1/Encoding.js';
import type { GetCatalogueResponse__Output } from '../generated/optserve/v1/GetCatalogueResponse.js';
import type { GetServerInfoResponse__Output } from '../generated/optserve/v1/GetServerInfoResponse.js';
import type { LossPoint__Output } from '../generated/optserve/v1/LossPoint.js';
import type { Reason__Output } from '../generated/optserve/v1/Reason.js';
import type { SessionSpec__Output } from '../generated/optserve/v1/SessionSpec.js';
import type { SessionStatus__Output } from '../generated/optserve/v1/SessionStatus.js';
import type { Split__Output } from '../generated/optserve/v1/Split.js';
import type { Tensor__Output } from '../generated/optserve/v1/Tensor.js';
import type { UpdateSessionRequest__Output } from '../generated/optserve/v1/UpdateSessionRequest.js';

type Prefix =
  | 'DATA_TYPE_'
  | 'DURABILITY_MODE_'
  | 'ENCODING_'
  | 'NON_FINITE_POLICY_'
  | 'REASON_'
  | 'REDUCTION_'
  | 'SCHEDULE_UNIT_'
  | 'SESSION_STATE_'
  | 'SPLIT_';

/** A message as the client gives it. */
export type Given<T> = T extends null
  ? undefined
  : T extends `${Prefix}UNSPECIFIED`
    ? never
    : T extends `${Prefix}${infer Name}`
      ? Name
      : T extends Timestamp__Output
        ? Date
        : T extends Tensor__Output
          ? Tensor
          : T extends (infer Element)[]
            ? Given<Element>[]
            : T extends object
              ? { [Key in keyof T]: Given<T[Key]> }
              : T;

/** A message as the client takes it: everything may be left out, and then means what the contract says about unset. */
export type Taken<T> = T extends Tensor
  ? TensorLike
  : T extends (infer Element)[]
    ? Taken<Element>[]
    : T extends object
      ? { [Key in keyof T]?: Taken<T[Key]> }
      : T;

/** Element type of a tensor: `"FP32"`. */
export type DataType = Given<DataType__Output>;

/** What stands for FP32 elements on the wire, where fewer bytes are wanted: `"BF16"`. */
export type Encoding = Given<Encoding__Output>;

/** Why something was refused: `"SHAPE_MISMATCH"`. */
export type Reason = Given<Reason__Output>;

/** Which data a loss was evaluated on. */
export type Split = Given<Split__Output>;

/**
 * Elements of a tensor. FP16 and BF16 are their 16 bits in a Uint16Array, BOOL is a Uint8Array of 0 and 1; the other
 * types have the array that their name says (INT64: BigInt64Array).
 */
export type Elements =
  | BigInt64Array
  | Float32Array
  | Float64Array
  | Int16Array
  | Int32Array
  | Int8Array
  | Uint16Array
  | Uint8Array;

/** A tensor; `data` is row-major. */
export interface Tensor {
  dataType: DataType;
  /** Outermost dimension first; empty: a scalar. */
  shape: number[];
  data: Elements;
}

/**
 * A tensor to send. Elements alone, and a shape or data type that is left out, stand for those of the parameter that the
 * tensor belongs to; where it belongs to none, for one dimension and for the type that the array's class says.
 */
export type TensorLike =
  Elements | { data: Elements; shape?: readonly number[]; dataType?: DataType };

/** What a parameter is, without its value. */
export interface TensorHeader {
  dataType: DataType;
  shape: readonly number[];
}

/** Tensors by their names. */
export type Named<T> = Readonly<Record<string, T>> | ReadonlyMap<string, T>;

/** What is in force for a session, every default filled in. */
export type SessionSpec = Given<SessionSpec__Output>;

/** What to make a session from. */
export type NewSession = Omit<Taken<SessionSpec>, 'parameters'> & {
  /** Parameters of the model: values, or headers of those whose values come by `upload`. */
  parameters: Named<TensorLike | TensorHeader>;
};

/** What to change in a running session. */
export type SessionChange = Omit<Taken<Given<UpdateSessionRequest__Output>>, 'sessionId'>;

/** A session as it was between two steps, under a name. */
export type Checkpoint = Given<Checkpoint__Output>;

/** Where a session stands; `rates` are the learning rates that the next step will use, by group. */
export type SessionStatus = Omit<Given<SessionStatus__Output>, 'rates'> & {
  rates: Record<string, number>;
};

export type LossPoint = Given<LossPoint__Output>;
export type Catalogue = Given<GetCatalogueResponse__Output>;
export type ServerInfo = Given<GetServerInfoResponse__Output>;

/** The last step that the server has of a worker, and where the session stands. */
export interface Contribution {
  /** Number of the step. Zero: the worker has sent none. */
  step: number;
  /** What its content is known by. Empty: the client that sent it gave none. */
  digest: Uint8Array;
  /** Whether it was applied. If not, it waits for the other workers. */
  applied: boolean;
  /** What it did. Unset: it was not applied yet, or another one was since. */
  result?: StepOutcome;
  /** How many steps of the session have been applied. */
  steps: number;
  /** How many of its epochs have been ended. */
  epochs: number;
}

/** What a step did. */
export interface StepOutcome {
  /** Number of the step, from 1. */
  step: number;
  /** Epochs that had been ended. */
  epochs: number;
  /** Learning rates that this step used, by group. */
  rates: Record<string, number>;
  /** Euclidean norm of the gradient that was applied, over all parameters. */
  gradientNorm: number;
  /** The step had been applied before, and was not applied again. */
  replayed: boolean;
}

/** What a step did, and what has come of it. */
export interface StepResult extends StepOutcome {
  /** Every parameter after the step. */
  parameters: Record<string, Tensor>;
}

export interface StepOptions {
  /** Number of the step. Left out: the next one. */
  step?: number;
  /** Arrays to write the parameters into, by name, instead of new ones. Half written if the step fails. */
  into?: Named<Elements>;
}

export interface UnaryStepOptions {
  /** Number of the step. Left out: the next one. */
  step?: number;
  /** Worker that sends. Left out: 0. */
  worker?: number;
}

export interface LossInput {
  predictions: TensorLike;
  targets: TensorLike;
  /** Left out: the evaluation is not kept in the session's history. */
  split?: Split;
  /** Whether to answer with the gradient. Left out: for `"TRAIN"` only. */
  gradient?: boolean;
  /** How the tensors travel. Left out: in one message each way if they fit, else as a stream. */
  via?: 'stream' | 'unary';
}

/** What a loss evaluation found. */
export interface LossOutcome {
  loss: number;
  /** Share of right predictions, between 0 and 1. Unset: not classification, or nothing to count. */
  accuracy?: number;
  /** Steps that had been applied. */
  steps: number;
  /** Gradient of the loss with respect to the predictions. Unset: not asked for. */
  gradient?: Tensor;
  /** Elements of the loss. Unset: its reduction is not `"NONE"`. */
  elements?: Tensor;
}

/**
 * How long a call that came to nothing is tried again, if that is safe. The waits grow, and part of each is left to chance; a
 * server that says when to come back is not asked before.
 */
export interface RetryOptions {
  /**
   * Seconds after its first failure in which the last attempt of a call may begin. 0: nothing is tried again. Default: 120.
   * Each call has all of it, and so has each step: an outage that has ended with an answer does not count for the next one. Nor
   * does, in one step, the time for which its stream was open, waiting for other workers perhaps.
   */
  giveUpAfterS?: number;
  /** The first wait, in seconds. Default: 0.1. */
  backoffS?: number;
  /** How much longer each wait is than the one before. Default: 2. */
  backoffFactor?: number;
  /** The longest wait, in seconds. Default: 5. */
  backoffMaxS?: number;
  /** Share of a wait that is left to chance, from 0 to 1. Default: 0.5. */
  jitter?: number;
}

/** What TLS needs, as PEM. */
export interface TlsOptions {
  /** Certificates of the authorities that may vouch for the server. Left out: those that the system trusts. */
  ca?: string | Uint8Array;
  /** Certificate chain that shows who the client is, for a server that asks for one; with its `key`. */
  certificate?: string | Uint8Array;
  key?: string | Uint8Array;
}

/** A bearer token, or what gives one whenever a call is made. */
export type Token = string | (() => string | Promise<string>);

export interface ClientOptions {
  /** TLS; `true`: with the authorities that the system trusts. Left out: none. */
  tls?: TlsOptions | true;
  /** Who calls. Without TLS it is sent to a server on this host only. */
  token?: Token;
  /** Whether the token may be sent where anybody on the way can read it: without TLS, to another host. Default: false. */
  allowPlaintextToken?: boolean;
  /** In the place of `tls`: gRPC's own. */
  credentials?: ChannelCredentials;
  /** Seconds after which a call has failed; a call that moves tensors, if nothing has moved for so long. Default: 60. */
  timeoutS?: number;
  /** What happens when the connection breaks, or the server asks to come back later. */
  retry?: RetryOptions;
  /**
   * Seconds that the connection may be silent before the server is asked whether it is there; without an answer it counts as
   * broken 20 s later. Much less, and servers take it for an attack. Default: 45.
   */
  keepaliveS?: number;
  /** Further options of the gRPC channel. */
  channel?: ChannelOptions;
}
