#!/usr/bin/env node
/** Takes the conformance exam with this client; client/conformance/README.md says how. */
import { readFile } from 'node:fs/promises';
import { parseArgs } from 'node:util';

import { Player } from './exam/player.js';
import { connect } from './index.js';

const { values, positionals } = parseArgs({
  options: { target: { type: 'string' } },
  allowPositionals: true,
});
if (values.target === undefined || positionals.length === 0) {
  console.error('usage: conform.js SCENARIO.json... --target HOST:PORT');
  process.exit(2);
}
for (const path of positionals) {
  const outcome = await play(path, values.target);
  console.log(JSON.stringify(outcome));
  if (outcome.failure !== null) process.exitCode = 1;
}

/** @param {string} path @param {string} target */
async function play(path, target) {
  const { name, acts } = JSON.parse(await readFile(path, 'utf8'));
  const client = connect(target);
  await client.serverInfo(); // From now on it is known that there is a server.
  const player = new Player(client);
  let failure = null;
  for (const [i, act] of acts.entries()) {
    try {
      await player.play(act);
    } catch (error) {
      failure = {
        act: i + 1,
        problem: `${act.act}: ${error instanceof Error ? error.message : error}`,
      };
      break;
    }
  }
  await player.end();
  await client.close();
  return { scenario: name, acts: acts.length, failure };
}
