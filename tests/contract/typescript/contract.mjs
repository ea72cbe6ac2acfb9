// Drives the official TypeScript SDK through every call that the server covers, against real machines.
// What is about snapshots stands in snapshots.mjs.
//
// Environment: HYPEMAN_BASE_URL and HYPEMAN_API_KEY as the SDK reads them, STORY_IMAGE (a ready busybox image),
// STORY_LAYOUT (an OCI layout to push), STORY_UPSTREAM (an image of another registry) and STORY_UPSTREAM_USER (who may
// pull it, with any password), STORY_SCRATCH (a directory to write in). Prints one line for each step; ends non-zero at
// the first failure.

import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';

import Hypeman from '@onkernel/hypeman';
import { cpFromInstance, cpToInstance } from '@onkernel/hypeman/lib/cp';
import { extractPushConfig, pushImage } from '@onkernel/hypeman/lib/push';

import * as snapshots from './snapshots.mjs';
import { Session, client, exec, image, refused, waitFor } from './support.mjs';

const layout = process.env.STORY_LAYOUT;
const scratch = path.join(process.env.STORY_SCRATCH, 'typescript');
const copyConfig = { baseURL: client.baseURL, apiKey: client.apiKey };

const blob = (digest) => fs.readFileSync(path.join(layout, 'blobs', digest.replace(':', '/')));

async function ready(name) {
  for (;;) {
    const shown = await client.images.get(name);
    if (shown.status === 'ready') return shown;
    assert.notEqual(shown.status, 'failed', shown.error);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

async function settled(condition) {
  for (let tries = 0; tries < 600 && !condition(); tries += 1) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

const steps = {
  async service() {
    assert.equal((await client.health.check()).status, 'ok');
    const capabilities = await client.capabilities.get();
    assert.equal(capabilities.host.os, 'linux');
    assert.ok((await client.resources.get()).memory.capacity > 0);
  },

  async access() {
    const stranger = new Hypeman({ apiKey: 'nonsense', maxRetries: 0 });
    await refused(401, 'Unauthorized', () => stranger.instances.list());
  },

  async push() {
    const index = JSON.parse(fs.readFileSync(path.join(layout, 'index.json')));
    const manifest = JSON.parse(blob(index.manifests[0].digest));
    const layers = manifest.layers.map(({ digest, size }) => ({ digest, size, data: blob(digest) }));
    const source = { config: async () => blob(manifest.config.digest), layers: async () => layers };
    const config = extractPushConfig(client);
    await pushImage(config, source, 'typescript/pushed:v1');
    const shown = await ready(`${config.registryHost}/typescript/pushed:v1`);
    assert.deepEqual(shown.env, { FROM: 'sdk' });
  },

  async images() {
    assert.ok((await client.images.list()).some((listed) => listed.name === image));
    const shown = await client.images.get(image);
    const target = image.replace(/:[^:]*$/, ':typescript');
    const tagged = await client.images.tag(image, { target });
    assert.equal(tagged.digest, shown.digest);
    await client.images.delete(target);
    await refused(404, 'not_found', () => client.images.get(target));
  },

  async pulling() {
    const { STORY_UPSTREAM: name, STORY_UPSTREAM_USER: username } = process.env;
    const asked = await client.images.create({
      name, credentials: { username, password: 'any' }, tags: { client: 'typescript' },
    });
    assert.equal(asked.name, name);
    const pulled = await ready(name);
    assert.equal(pulled.digest, asked.digest);
    assert.deepEqual(pulled.cmd, ['/pulled']);
    assert.deepEqual(pulled.tags, { client: 'typescript' });
    await client.images.delete(name);
    await refused(404, 'not_found', () => client.images.get(name));
  },

  async lifecycle() {
    const request = {
      name: 'typescript', image, size: '128MB', overlay_size: '256MB', vcpus: 1,
      network: { enabled: false }, hypervisor: 'qemu-microvm', tags: { client: 'typescript' },
      cmd: ['sh', '-c', 'echo first; echo second; exec sleep 1000'],
    };
    const created = await client.instances.create(request);
    await waitFor(created.id, 'Running');
    assert.equal((await client.instances.get('typescript')).id, created.id);
    const listed = await client.instances.list({ state: 'Running', tags: { client: 'typescript' } });
    assert.deepEqual(listed.map(({ id }) => id), [created.id]);
    await refused(400, 'name_conflict', () => client.instances.create(request));
    assert.ok((await client.instances.stats(created.id)).memory_rss_bytes > 0);
    assert.equal((await client.instances.stat(created.id, { path: '/bin/busybox' })).is_file, true);
    assert.notEqual((await client.instances.update(created.id, { ttl: '1h' })).expires_at, null);
  },

  async executing() {
    const ended = await exec('typescript', ['sh', '-c', 'echo words; echo problem >&2; exit 7']);
    assert.equal(ended.exitCode, 7);
    assert.deepEqual(ended.output.toString().trim().split('\n').sort(), ['problem', 'words']);
    assert.equal((await exec('typescript', ['/no/such/program'])).exitCode, 127);
    assert.equal((await exec('typescript', ['sleep', '1000'], { timeout: 1 })).exitCode, 124);
    const where = { env: { COLOUR: 'red' }, cwd: '/tmp', wait_for_agent: 30 };
    assert.equal((await exec('typescript', ['sh', '-c', 'echo $COLOUR $PWD'], where)).output.toString(), 'red /tmp\n');
    const many = await exec('typescript', ['sh', '-c', 'head -c 3000000 /dev/zero']);
    assert.equal(many.output.length, 3_000_000);
    const numbers = [...Array(10).keys()];
    const together = await Promise.all(numbers.map((number) => exec('typescript', ['echo', `${number}`])));
    assert.deepEqual(together.map(({ output }) => output.toString()), numbers.map((number) => `${number}\n`));
  },

  async input() {
    const noise = crypto.randomBytes(200_000);
    const session = await Session.start('typescript', ['head', '-c', `${noise.length}`]);
    for (let at = 0; at < noise.length; at += 32_768) session.socket.send(noise.subarray(at, at + 32_768));
    const ended = await session.finish();
    assert.ok(ended.output.equals(noise));
    assert.equal(ended.exitCode, 0);
  },

  async terminal() {
    const script = 'stty size; read line; stty size; echo "got $line"';
    const session = await Session.start('typescript', ['sh', '-c', script], { tty: true, rows: 20, cols: 70 });
    await session.until('20 70');
    session.socket.send(JSON.stringify({ resize: { rows: 30, cols: 90 } }));
    session.socket.send(Buffer.from('words\n'));
    const ended = await session.finish();
    assert.match(ended.output.toString(), /30 90\r\n/);
    assert.match(ended.output.toString(), /got words\r\n/);
    assert.equal(ended.exitCode, 0);
  },

  async logs() {
    const stream = await client.instances.logs('typescript', { follow: true, tail: 10 });
    for await (const line of stream) if (line.includes('second')) break;
    const lines = [];
    for await (const line of await client.instances.logs('typescript', { tail: 2 })) lines.push(line);
    assert.deepEqual(lines, ['first', 'second']);
  },

  async copying() {
    const source = path.join(scratch, 'tree');
    fs.mkdirSync(path.join(source, 'sub', 'empty'), { recursive: true });
    const noise = crypto.randomBytes(300_001);
    fs.writeFileSync(path.join(source, 'sub', 'noise'), noise);
    fs.writeFileSync(path.join(source, 'nothing'), '');
    await cpToInstance(copyConfig, { instanceId: 'typescript', srcPath: source, dstPath: '/copied' });
    const out = path.join(scratch, 'out');
    await cpFromInstance(copyConfig, { instanceId: 'typescript', srcPath: '/copied', dstPath: out });
    const found = fs.readdirSync(out, { recursive: true }).find((name) => name.endsWith('sub/noise'));
    // The SDK resolves at the last entry, when files before it may still be on their way to the disk.
    await settled(() => fs.statSync(path.join(out, found)).size === noise.length);
    assert.ok(noise.equals(fs.readFileSync(path.join(out, found))));
    await assert.rejects(() =>
      cpFromInstance(copyConfig, { instanceId: 'typescript', srcPath: '/absent', dstPath: out }),
    );
  },

  async stopping() {
    await client.instances.stop('typescript');
    await waitFor('typescript', 'Stopped');
    await refused(409, 'invalid_state', () => client.instances.stop('typescript', { maxRetries: 0 }));
    await assert.rejects(exec('typescript', ['true']), /409/);
    await client.instances.start('typescript', {});
    await waitFor('typescript', 'Running');
    await client.instances.delete('typescript', { graceful_shutdown: false });
    await refused(404, 'not_found', () => client.instances.get('typescript'));
    assert.deepEqual(await client.instances.list(), []);
  },
};

fs.mkdirSync(scratch, { recursive: true });
for (const [name, step] of Object.entries({ ...steps, ...snapshots.steps })) {
  const begun = Date.now();
  try {
    await step();
  } catch (error) {
    console.log(error);
    console.log(`FAILED ${name}`);
    process.exit(1);
  }
  console.log(`ok ${name} (${((Date.now() - begun) / 1000).toFixed(1)} s)`);
}
