/** The way to a server. */
import { randomUUID } from 'node:crypto';

import { channelCredentials, refuseToTell, tokenCredentials } from './access.js';
import { Calls } from './calls.js';
import { deleted, downloaded, listed } from './checkpoint.js';
import { decode, encode, OptimizerService } from './contract.js';
import { MESSAGE_DATA_BYTES_MAX } from './framing.js';
import { Retry, retryTerms } from './retry.js';
import { Session } from './session.js';
import { headerToMessage, tensorOf, tensorToMessage } from './tensor.js';
import { SessionView, statusOf } from './view.js';

/** @typedef {import('./types.js').Catalogue} Catalogue */
/** @typedef {import('./types.js').Checkpoint} Checkpoint */
/** @typedef {import('./types.js').ClientOptions} ClientOptions */
/** @typedef {import('./types.js').NewSession} NewSession */
/** @typedef {import('./types.js').ServerInfo} ServerInfo */
/** @typedef {import('./types.js').SessionStatus} SessionStatus */
/** @typedef {import('./types.js').Tensor} Tensor */
/** @typedef {import('./types.js').TensorHeader} TensorHeader */

const TIMEOUT_S = 60; // As long as the server's own wait for a round, by default.
const FLOW_CONTROL_WINDOW_BYTES = 4 << 20; // A few chunks: with HTTP/2's 64 KiB a download takes twice as long.
const KEEPALIVE_S = 45; // The server takes more than one question in 30 s for an attack.
const KEEPALIVE_TIMEOUT_MS = 20_000;

/**
 * Make a client of the server at `target`. Connects with the first call.
 *
 * @param {string} target `host:port`, or any other name that gRPC resolves.
 * @param {ClientOptions} [options]
 * @returns {Client}
 */
export function connect(target, options) {
  return new Client(target, options);
}

/** Made by `connect`. */
export class Client {
  #calls;

  /**
   * @param {string} target
   * @param {ClientOptions} [options]
   * @throws {import('./errors.js').RequestError} The options do not go together.
   */
  constructor(target, { timeoutS = TIMEOUT_S, keepaliveS = KEEPALIVE_S, ...given } = {}) {
    const { credentials, tls, token, allowPlaintextToken = false } = given;
    const isPlaintext = credentials === undefined && tls === undefined;
    if (token !== undefined && isPlaintext && !allowPlaintextToken) refuseToTell(target);
    const terms = retryTerms(given.retry);
    const stub = new OptimizerService(target, credentials ?? channelCredentials(tls), {
      'grpc-node.flow_control_window': FLOW_CONTROL_WINDOW_BYTES,
      'grpc.keepalive_time_ms': keepaliveS * 1e3,
      'grpc.keepalive_timeout_ms': KEEPALIVE_TIMEOUT_MS,
      // gRPC connects again at its own pace, and until then every attempt of ours fails at once.
      'grpc.initial_reconnect_backoff_ms': Math.max(1, terms.backoffS * 1e3),
      'grpc.max_reconnect_backoff_ms': Math.max(1, terms.backoffS * 1e3, terms.backoffMaxS * 1e3),
      ...given.channel,
    });
    const options = token === undefined ? {} : { credentials: tokenCredentials(token) };
    this.#calls = new Calls(stub, { timeoutS, retry: new Retry(terms), options });
  }

  /**
   * Make a session, and bring the values of its parameters over, in one message or as chunks.
   *
   * @param {NewSession} given
   * @param {{requestId?: string}} [options] `requestId`: who asks again with the same one gets the session that was made
   *     first. Left out: a random one, so that the session is made once though the connection breaks.
   * @returns {Promise<Session>}
   */
  async createSession({ parameters, ...rest }, { requestId = randomUUID() } = {}) {
    const spec = encode('SessionSpec', rest, 'spec');
    const { headers, values } = parametersOf(parameters);
    spec.parameters = headers;
    const bytes = [...values.values()].reduce((sum, { data }) => sum + data.byteLength, 0);
    const fits = bytes <= MESSAGE_DATA_BYTES_MAX;
    const sent = fits ? [...values].map(([name, tensor]) => tensorToMessage(tensor, name)) : [];
    const request = { spec, values: sent, requestId };
    const answer = await this.#calls.unary('createSession', request);
    const session = this.#sessionOf(answer.session);
    if (fits) return session;
    try {
      await session.upload(values);
      return session;
    } catch (error) {
      // Nobody would know its id; and the first error says more.
      await this.#calls.once('deleteSession', { sessionId: session.id }).catch(() => {});
      throw error;
    }
  }

  /** Find a session that there is. @param {string} sessionId @returns {Promise<Session>} */
  async getSession(sessionId) {
    return this.#sessionOf((await this.#calls.unary('getSession', { sessionId })).session);
  }

  /**
   * List the sessions of the server, the oldest first.
   *
   * @param {{pageSize?: number}} [options] `pageSize`: how many to ask for at once.
   * @returns {AsyncGenerator<SessionStatus, void, void>}
   */
  async *listSessions(options = {}) {
    const request = encode('ListSessionsRequest', options, 'listSessions');
    let pageToken = '';
    do {
      const page = await this.#calls.unary('listSessions', { ...request, pageToken });
      yield* page.sessions.map(statusOf);
      pageToken = page.nextPageToken;
    } while (pageToken !== '');
  }

  /**
   * List checkpoints, the oldest first, also of sessions that are gone.
   *
   * @param {{sessionId?: string, pageSize?: number}} [options] `sessionId`: left out, those of all sessions.
   * @returns {AsyncGenerator<Checkpoint, void, void>}
   */
  checkpoints(options = {}) {
    return listed(this.#calls, options);
  }

  /**
   * Make a new session that goes on from a checkpoint; the one that it was saved of stays as it is, or is gone.
   *
   * @param {string} sessionId Of the session that it was saved of.
   * @param {string} name
   * @param {{displayName?: string, requestId?: string}} [options] `requestId` as in `createSession`.
   * @returns {Promise<Session>}
   */
  async restoreCheckpoint(sessionId, name, { displayName, requestId = randomUUID() } = {}) {
    const request = { sessionId, name, requestId, displayName };
    return this.#sessionOf((await this.#calls.unary('restoreCheckpoint', request)).session);
  }

  /**
   * Write a checkpoint to a file of the safetensors format: whole, or not at all.
   *
   * @param {string} sessionId Of the session that it was saved of.
   * @param {string} name
   * @param {string} path Of the file. What has the name already is replaced.
   * @returns {Promise<Checkpoint>}
   */
  downloadCheckpoint(sessionId, name, path) {
    return downloaded(this.#calls, { sessionId, name }, path);
  }

  /**
   * Delete a checkpoint.
   *
   * @param {string} sessionId Of the session that it was saved of.
   * @param {string} name
   * @returns {Promise<Checkpoint>} What it was.
   */
  deleteCheckpoint(sessionId, name) {
    return deleted(this.#calls, { sessionId, name });
  }

  /** List every optimizer, scheduler and loss with its hyperparameters. @returns {Promise<Catalogue>} */
  async catalogue() {
    return decode('GetCatalogueResponse', await this.#calls.unary('getCatalogue', {}));
  }

  /** Ask what the server is and what it allows. @returns {Promise<ServerInfo>} */
  async serverInfo() {
    return decode('GetServerInfoResponse', await this.#calls.unary('getServerInfo', {}));
  }

  /** Close every stream, and then the channel. The sessions stay on the server. @returns {Promise<void>} */
  close() {
    return this.#calls.close();
  }

  async [Symbol.asyncDispose]() {
    await this.close();
  }

  /** @param {any} message */
  #sessionOf(message) {
    return new Session(this.#calls, new SessionView(message));
  }
}

/** @param {NewSession['parameters']} given @returns {{headers: any[], values: Map<string, Tensor>}} */
function parametersOf(given) {
  const entries = given instanceof Map ? [...given] : Object.entries(given ?? {});
  /** @type {Map<string, Tensor>} */
  const values = new Map();
  const headers = entries.map(([name, value]) => {
    if (!ArrayBuffer.isView(value) && !('data' in value)) return headerToMessage(value, name);
    const tensor = tensorOf(value, { path: `parameters.${name}` });
    values.set(name, tensor);
    return headerToMessage(tensor, name);
  });
  return { headers, values };
}
