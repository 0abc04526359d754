/** Plays the acts of one scenario through the client's public API. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';

import { checkpointFile } from './checkpoint-file.js';
import { compare, compareRefusal } from './compare.js';
import {
  downloadDocument,
  fromScenario,
  namedTensors,
  sessionDocument,
  stepDocument,
  tensorFrom,
  toScenario,
} from './values.js';

/** @typedef {import('./values.js').Json} Json */
/** @typedef {import('../index.js').Session} Session */
/** @typedef {import('../index.js').Worker} Worker */

const STAGGER_MS = 50; // Between two contributions to a round, so that they arrive in that order.

export class Player {
  /** @type {Map<string, Session>} By the scenario's label. */
  sessions = new Map();
  /** @type {Map<string, Worker>} By label and number. */
  workers = new Map();
  /** @type {Set<string>} Ids of every session that was made. */
  made = new Set();
  /** @type {{sessionId: string, name: string}[]} Every checkpoint that was saved. */
  saved = [];

  /** @param {import('../index.js').Client} client */
  constructor(client) {
    this.client = client;
  }

  /** Play an act. @param {Json} given @throws {Error} Something else came than must come. */
  async play({ act, expect, refused, ...keys }) {
    const answer = ACTS[act];
    if (answer === undefined) throw new Error(`there is no act '${act}'`);
    for (const outcome of await Promise.allSettled([answer(this, new Keys(keys))].flat())) {
      if (refused === undefined) {
        if (outcome.status === 'rejected') throw outcome.reason;
        compare(outcome.value, expect);
      } else {
        if (outcome.status === 'fulfilled') throw new Error('it was not refused');
        compareRefusal(outcome.reason, refused);
      }
    }
  }

  /** Leave nothing on the server. */
  async end() {
    for (const session of this.sessions.values()) await session.delete().catch(() => {}); // An act may have done it.
    for (const { sessionId, name } of this.saved)
      await this.client.deleteCheckpoint(sessionId, name).catch(() => {});
  }

  /** @param {string} label @returns {Session} */
  session(label) {
    const session = this.sessions.get(label);
    if (session === undefined) throw new Error(`there is no session '${label}'`);
    return session;
  }

  /** Find the session of an act, by label or by id. @param {Keys} keys @returns {Promise<Session>} */
  async sessionOf(keys) {
    const id = keys.take('session_id', undefined);
    return id === undefined ? this.session(keys.take('session')) : this.client.getSession(id);
  }

  /** @param {string} label @param {number} worker @returns {Worker} */
  worker(label, worker) {
    const joined = this.workers.get(`${label}/${worker}`);
    if (joined === undefined) throw new Error(`worker ${worker} of '${label}' has not joined`);
    return joined;
  }

  /**
   * Contribute to a step.
   *
   * @param {string} label
   * @param {number | undefined} step
   * @param {Keys} keys
   */
  async contribute(label, step, keys) {
    const [worker, via] = [keys.take('worker', 0), keys.take('via', 'stream')];
    const gradients = namedTensors(keys.take('gradients'));
    keys.done();
    const session = this.session(label);
    const result =
      via === 'unary'
        ? await session.stepUnary(gradients, { step, worker })
        : await this.worker(label, worker).step(gradients, { step });
    return stepDocument(session, result);
  }
}

/** The keys of an act: each of them must be taken. */
class Keys {
  /** @param {Json} keys */
  constructor(keys) {
    this.keys = new Map(Object.entries(keys));
  }

  /** @param {string} name @param {any[]} fallback For a key that may be left out. @returns {any} */
  take(name, ...fallback) {
    if (!this.keys.has(name) && fallback.length === 0) throw new Error(`the act has no '${name}'`);
    const value = this.keys.has(name) ? this.keys.get(name) : fallback[0];
    this.keys.delete(name);
    return value;
  }

  done() {
    if (this.keys.size > 0)
      throw new Error(`the act has unknown keys: ${[...this.keys.keys()].join(', ')}`);
  }
}

/** @type {Record<string, (player: Player, keys: Keys) => Promise<any> | Promise<any>[]>} */
const ACTS = {
  async server_info(player, keys) {
    keys.done();
    return toScenario(await player.client.serverInfo());
  },

  async catalogue(player, keys) {
    keys.done();
    return toScenario(await player.client.catalogue());
  },

  async create_session(player, keys) {
    const [label, { parameters, ...spec }] = [keys.take('session'), keys.take('spec')];
    keys.done();
    const given = { ...fromScenario(spec), parameters: namedTensors(parameters) };
    const session = await player.client.createSession(given);
    player.sessions.set(label, session);
    player.made.add(session.id);
    return sessionDocument(session);
  },

  async get_session(player, keys) {
    const session = await player.sessionOf(keys);
    keys.done();
    return sessionDocument(await session.refresh());
  },

  async update_session(player, keys) {
    const session = await player.sessionOf(keys);
    const change = fromScenario(keys.take('update'));
    keys.done();
    return sessionDocument(await session.update(change));
  },

  async delete_session(player, keys) {
    const session = await player.sessionOf(keys);
    keys.done();
    return toScenario(await session.delete());
  },

  async list_sessions(player, keys) {
    const pageSize = keys.take('page_size', undefined);
    keys.done();
    const sessions = [];
    for await (const status of player.client.listSessions({ pageSize })) {
      if (player.made.has(status.sessionId)) sessions.push(toScenario(status));
    }
    return { sessions };
  },

  async upload_parameters(player, keys) {
    const session = await player.sessionOf(keys);
    const values = namedTensors(keys.take('parameters'));
    keys.done();
    return toScenario(await session.upload(values));
  },

  async download_parameters(player, keys) {
    const session = await player.sessionOf(keys);
    const names = keys.take('names', undefined);
    keys.done();
    return downloadDocument(session, names, await session.download(names));
  },

  async join(player, keys) {
    const [label, worker] = [keys.take('session'), keys.take('worker', 0)];
    keys.done();
    const session = player.session(label);
    player.workers.set(`${label}/${worker}`, await session.join(worker));
    return toScenario(session.status);
  },

  async leave(player, keys) {
    const [label, worker] = [keys.take('session'), keys.take('worker', 0)];
    keys.done();
    await player.worker(label, worker).close();
    return {};
  },

  async step(player, keys) {
    const [label, step] = [keys.take('session'), keys.take('step', undefined)];
    return player.contribute(label, step, keys);
  },

  round(player, keys) {
    const [label, step] = [keys.take('session'), keys.take('step', undefined)];
    const contributions = keys.take('contributions');
    keys.done();
    return contributions.map(async (/** @type {Json} */ contribution, /** @type {number} */ i) => {
      await delay(i * STAGGER_MS);
      return player.contribute(label, step, new Keys(contribution));
    });
  },

  async end_epoch(player, keys) {
    const session = await player.sessionOf(keys);
    const epoch = keys.take('epoch', undefined);
    keys.done();
    return toScenario(await session.endEpoch({ epoch }));
  },

  async evaluate_loss(player, keys) {
    const session = await player.sessionOf(keys);
    const input = {
      predictions: tensorFrom(keys.take('predictions')),
      targets: tensorFrom(keys.take('targets')),
      split: keys.take('split', undefined),
      gradient: keys.take('gradient', undefined),
      via: keys.take('via', undefined),
    };
    keys.done();
    return toScenario(await session.evaluateLoss(input));
  },

  async list_loss_points(player, keys) {
    const session = await player.sessionOf(keys);
    const options = {
      split: keys.take('split', undefined),
      pageSize: keys.take('page_size', undefined),
    };
    keys.done();
    return toScenario(await session.lossPoints(options));
  },

  async save_checkpoint(player, keys) {
    const [session, name] = [player.session(keys.take('session')), keys.take('name')];
    keys.done();
    const checkpoint = await session.saveCheckpoint(name);
    player.saved.push({ sessionId: session.id, name });
    return toScenario(checkpoint);
  },

  async list_checkpoints(player, keys) {
    const label = keys.take('session', undefined);
    const options = {
      sessionId: label === undefined ? undefined : player.session(label).id,
      pageSize: keys.take('page_size', undefined),
    };
    keys.done();
    const checkpoints = [];
    for await (const checkpoint of player.client.checkpoints(options)) {
      if (player.made.has(checkpoint.sessionId)) checkpoints.push(toScenario(checkpoint));
    }
    return { checkpoints };
  },

  async restore_checkpoint(player, keys) {
    const [session, name] = [player.session(keys.take('session')), keys.take('name')];
    const restored = keys.take('restored');
    const displayName = keys.take('display_name', undefined);
    keys.done();
    const made = await player.client.restoreCheckpoint(session.id, name, { displayName });
    player.sessions.set(restored, made);
    player.made.add(made.id);
    return sessionDocument(made);
  },

  async download_checkpoint(player, keys) {
    const [session, name] = [player.session(keys.take('session')), keys.take('name')];
    keys.done();
    const folder = await mkdtemp(join(tmpdir(), 'optserve-'));
    try {
      const path = join(folder, 'checkpoint.safetensors');
      const checkpoint = await player.client.downloadCheckpoint(session.id, name, path);
      return { checkpoint: toScenario(checkpoint), ...(await checkpointFile(path)) };
    } finally {
      await rm(folder, { recursive: true });
    }
  },

  async delete_checkpoint(player, keys) {
    const [session, name] = [player.session(keys.take('session')), keys.take('name')];
    keys.done();
    return toScenario(await player.client.deleteCheckpoint(session.id, name));
  },
};
