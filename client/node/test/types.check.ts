// Not run: `npm run check` makes sure that types accept what is right, and refuse what is not.
import { type Client, connect, type SessionStatus, type Tensor } from '../src/index.js';

export async function check(client: Client): Promise<void> {
  const session = await client.createSession({
    parameters: { w: new Float32Array(2), later: { dataType: 'BF16', shape: [2, 2] } },
    optimizer: { adam: { lr: 0.1, betas: [0.9, 0.99] } },
    groups: [{ name: 'head', parameters: ['w'], overrides: { adam: { amsgrad: true } } }],
    scheduler: { stepLr: { stepSize: 2 }, unit: 'EPOCHS' },
    loss: { nllLoss: { weight: Float32Array.of(1, 2), reduction: 'SUM' } },
    nonFinite: 'ALLOW',
    wire: { gradients: 'INT8_BLOCKS', parameters: 'BF16' },
    durability: { mode: 'SNAPSHOT', snapshotSteps: 100 },
  });
  const lr: number | undefined = session.spec.optimizer?.adam?.lr;
  const status: SessionStatus = await session.endEpoch();
  const { parameters, replayed } = await session.step({ w: new Float32Array(2) }, { step: 1 });
  const w: Tensor | undefined = parameters.w;
  console.log(lr, status.rates.default, status.createTime?.getTime(), w?.shape, replayed);

  const { applied, digest, result } = await session.getContribution(1);
  const norm: number | undefined = result?.gradientNorm;
  console.log(applied, digest.length, norm, (await session.resume()).parameters.w?.shape);
  const { name, createTime } = await session.saveCheckpoint('best');
  const fork = await client.restoreCheckpoint(session.id, name, { displayName: 'a fork' });
  for await (const each of client.checkpoints({ sessionId: fork.id })) console.log(each.steps);
  console.log(createTime?.getTime());
  connect('localhost:1', { tls: { ca: 'pem' }, token: async () => 'token', retry: { jitter: 1 } });

  // @ts-expect-error Patience that there is not.
  connect('localhost:1', { retry: { attempts: 3 } });
  // @ts-expect-error A misspelt hyperparameter.
  await session.update({ optimizer: { sgd: { momentun: 0.1 } } });
  // @ts-expect-error A value that the enum does not have.
  await session.update({ loss: { mseLoss: { reduction: 'AVERAGE' } } });
  // @ts-expect-error A number that is none.
  await session.update({ optimizer: { sgd: { lr: '0.1' } } });
  // @ts-expect-error The contract's name, which is not JavaScript's.
  await session.update({ display_name: 'a' });
  // @ts-expect-error An encoding that there is not.
  await client.createSession({ parameters: {}, wire: { gradients: 'INT4' } });
  // @ts-expect-error A plain array is no tensor.
  await session.step({ w: [1, 2] });
}
