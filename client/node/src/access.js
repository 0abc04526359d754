/** How a client shows who it is, and makes sure of whom it talks to: TLS, and bearer tokens. */
import { credentials, Metadata, status as Code } from '@grpc/grpc-js';

import { RequestError } from './errors.js';

/** @typedef {import('@grpc/grpc-js').CallCredentials} CallCredentials */
/** @typedef {import('@grpc/grpc-js').ChannelCredentials} ChannelCredentials */
/** @typedef {import('./types.js').TlsOptions} TlsOptions */
/** @typedef {import('./types.js').Token} Token */

/**
 * @param {TlsOptions | true | undefined} tls Undefined: no TLS. True: with the authorities that the system trusts.
 * @returns {ChannelCredentials}
 * @throws {RequestError} There is a key without its certificate, or the other way round.
 */
export function channelCredentials(tls) {
  if (tls === undefined) return credentials.createInsecure();
  const { ca, certificate, key } = tls === true ? {} : tls;
  if ((certificate === undefined) !== (key === undefined)) {
    const field = key === undefined ? 'tls.key' : 'tls.certificate';
    throw new RequestError(`${field} is missing: certificate and key belong together`, {
      reason: 'MISSING_FIELD',
      field,
    });
  }
  return credentials.createSsl(bytesOf(ca), bytesOf(key), bytesOf(certificate));
}

/**
 * @param {Token} token
 * @returns {CallCredentials} Asks for the token anew with each call.
 */
export function tokenCredentials(token) {
  return credentials.createFromMetadataGenerator(async (_, answer) => {
    try {
      const metadata = new Metadata();
      metadata.set(
        'authorization',
        `Bearer ${typeof token === 'function' ? await token() : token}`,
      );
      answer(null, metadata);
    } catch (error) {
      const text = `there is no token: ${error instanceof Error ? error.message : error}`;
      answer(Object.assign(new Error(text, { cause: error }), { code: Code.UNAUTHENTICATED }));
    }
  });
}

/**
 * Refuse to send a token where everybody on the way could read it.
 *
 * @param {string} target
 * @throws {RequestError} The target is not on this host.
 */
export function refuseToTell(target) {
  if (isOnThisHost(target)) return;
  throw new RequestError(
    `the token would go to ${target} unencrypted: use TLS, or allow it with allowPlaintextToken`,
    { reason: 'INVALID_FIELD', field: 'token', expected: 'TLS', actual: 'plaintext' },
  );
}

/** @param {string} target As gRPC resolves it. @returns {boolean} */
export function isOnThisHost(target) {
  if (/^unix(-abstract)?:/.test(target)) return true;
  const address = target.replace(/^(dns|ipv4|ipv6):(\/\/[^/]*\/)?/, '');
  const host = address.replace(/:\d+$/, '').replace(/^\[(.*)\]$/, '$1');
  return host === 'localhost' || host === '::1' || /^127(\.\d{1,3}){3}$/.test(host);
}

/** @param {string | Uint8Array | undefined} pem @returns {Buffer | null} */
function bytesOf(pem) {
  return pem === undefined ? null : Buffer.from(pem);
}
