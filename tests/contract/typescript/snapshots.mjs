// The story of somebody who builds on snapshots, told with the official TypeScript SDK, on the microvm board.
//
// A guest counts in its memory and keeps a note on its disk. It is captured while it runs, brought back, multiplied,
// put to sleep and woken, and in the end outlived by its snapshots. What the server offers beyond the SDK (`verify`,
// `usage`, several forks in one call, pages of the list) is asked for through the SDK's plain HTTP calls.

import assert from 'node:assert/strict';
import { setTimeout as pause } from 'node:timers/promises';

import { client, exec, image, refused, waitFor } from './support.mjs';

const count = 'n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.05; done';
// The shell empties the file before it writes to it.
const readCount = 'until n=$(cat /dev/shm/count) && [ -n "$n" ]; do :; done; echo $n';
const tags = { team: 'backend', path: 'a/b=c +@' };
const nobody = 'a'.repeat(24);
// What is refused for good must not be asked for again and again.
const once = { maxRetries: 0 };

// What one step leaves to the next: the instance, where its counter was at the capture, and the snapshots.
let origin;
let capturedAt;
let baseline;
let small;
let cold;
let forks;

async function shell(instance, line) {
  const ended = await exec(instance, ['sh', '-c', line]);
  assert.equal(ended.exitCode, 0, `${line}: ${ended.output}`);
  return ended.output.toString().trim();
}

const counter = async (instance) => Number(await shell(instance, readCount));

/** The guest counts, from where it was. */
async function goesOn(instance, atLeast) {
  const first = await counter(instance);
  assert.ok(first >= atLeast, `${first} after ${atLeast}`);
  while ((await counter(instance)) <= first);
  return first;
}

async function compressed(id) {
  for (;;) {
    const shown = await client.snapshots.get(id);
    if (shown.compression_state === 'compressed') return shown;
    assert.equal(shown.compression_state, 'compressing', JSON.stringify(shown));
    await pause(50);
  }
}

async function stop(id) {
  await client.instances.stop(id);
  await waitFor(id, 'Stopped');
}

const gone = (id) => client.instances.delete(id, { graceful_shutdown: false });

export const steps = {
  async policyOnCreate() {
    const request = {
      name: 'typescript-origin', image, size: '128MB', overlay_size: '256MB', vcpus: 1,
      network: { enabled: false }, hypervisor: 'qemu-microvm',
    };
    const wrong = { compression: { enabled: true, algorithm: 'zstd', level: 0 } };
    await refused(400, 'invalid_snapshot_policy', () =>
      client.instances.create({ ...request, snapshot_policy: wrong }),
    );
    const snapshot_policy = { compression: { enabled: true }, standby_compression_delay: '1h' };
    origin = await client.instances.create({ ...request, snapshot_policy });
    await waitFor(origin.id, 'Running');
    const shown = await client.instances.get(origin.id);
    assert.equal(shown.snapshot_policy.compression.enabled, true);
    assert.equal(shown.snapshot_policy.standby_compression_delay, '1h0m0s');
    assert.equal(shown.has_snapshot, false);
    await shell(origin.id, `sh -c '${count}' >/dev/null 2>&1 </dev/null & echo before > /root/note && sync`);
    await goesOn(origin.id, 1);
  },

  async standbyAndRestore() {
    await refused(409, 'invalid_state', () => client.instances.restore(origin.id, once));
    await refused(400, 'invalid_compression_delay', () =>
      client.instances.standby(origin.id, { compression_delay: 'soon' }),
    );
    for (const body of [undefined, { compression: { enabled: true, algorithm: 'lz4', level: 9 }, compression_delay: '0s' }]) {
      const before = await counter(origin.id);
      const asleep = await client.instances.standby(origin.id, body);
      assert.equal(asleep.state, 'Standby');
      assert.equal(asleep.has_snapshot, true);
      await refused(409, 'invalid_state', () => client.instances.standby(origin.id, {}, once));
      const awake = await client.instances.restore(origin.id);
      assert.equal(awake.state, 'Running');
      assert.equal(awake.has_snapshot, false);
      await goesOn(origin.id, before);
    }
  },

  async captureWhileRunning() {
    capturedAt = await counter(origin.id);
    const request = { kind: 'Standby', name: 'baseline', tags, compression: { enabled: false } };
    baseline = await client.instances.snapshots.create(origin.id, request);
    assert.equal((await client.instances.get(origin.id)).state, 'Running');
    await goesOn(origin.id, capturedAt);
    assert.deepEqual(baseline.tags, tags);
    assert.equal(baseline.source_instance_name, 'typescript-origin');
    assert.equal(baseline.source_hypervisor, 'qemu-microvm');
    assert.equal(baseline.compression_state, 'none');
    assert.ok(baseline.size_bytes > 1 << 20 && baseline.uncompressed_size_bytes > 1 << 20);
    await refused(409, 'conflict', () => client.instances.snapshots.create(origin.id, request, once));
    await refused(409, 'conflict', () => client.instances.snapshots.create(origin.id, { kind: 'Stopped' }, once));
    assert.deepEqual(await client.snapshots.get(baseline.id), baseline);
  },

  async backInPlace() {
    await shell(origin.id, 'echo after > /root/note && sync');
    const restore = (more = {}, options = {}) =>
      client.instances.snapshots.restore(baseline.id, { id: origin.id, ...more }, options);
    await refused(409, 'invalid_state', () => restore({}, once));
    await stop(origin.id);
    assert.equal((await restore()).state, 'Running');
    assert.equal(await shell(origin.id, 'cat /root/note'), 'before');
    await goesOn(origin.id, capturedAt);
    await client.instances.standby(origin.id);
    assert.equal((await restore({ target_state: 'Stopped' })).state, 'Stopped');
    assert.equal((await restore({ target_state: 'Standby' })).state, 'Standby');
    await client.instances.restore(origin.id);
    await goesOn(origin.id, capturedAt);
    await refused(400, 'invalid_request', () => restore({ target_hypervisor: 'qemu' }));
  },

  async tenForks() {
    const names = [...Array(10).keys()].map((number) => `typescript-fork-${number}`);
    const made = await Promise.all(names.map((name) => client.snapshots.fork(baseline.id, { name })));
    assert.deepEqual(made.map(({ name }) => name), names);
    assert.ok(made.every(({ state }) => state === 'Running'));
    forks = made.map(({ id }) => id);
    const line = `hostname; cat /etc/machine-id; cat /root/note; ${readCount}; hostname > /root/note; sync`;
    const seen = (await Promise.all(forks.map((id) => shell(id, line)))).map((text) => text.split('\n'));
    assert.deepEqual(seen.map(([hostname]) => hostname), names);
    assert.equal(new Set(seen.map(([, machine]) => machine)).size, 10);
    for (const [, , note, counted] of seen) {
      assert.equal(note, 'before');
      assert.ok(Number(counted) >= capturedAt);
    }
    await refused(409, 'conflict', () => client.snapshots.fork(baseline.id, { name: names[3] }, once));
    assert.equal(await shell(origin.id, 'cat /root/note'), 'before', 'each has a disk of its own');
    for (const [number, id] of forks.entries()) {
      assert.equal(await shell(id, 'cat /root/note'), names[number]);
      await goesOn(id, capturedAt);
    }
    const several = await client.post(`/snapshots/${baseline.id}/fork`, { body: { name: 'typescript-many', count: 2 } });
    assert.deepEqual(several.forks.map(({ name }) => name), ['typescript-many-1', 'typescript-many-2']);
    for (const fork of several.forks) {
      await goesOn(fork.instance.id, capturedAt);
      await gone(fork.instance.id);
    }
  },

  async compression() {
    // The instance's policy counts where the request says nothing.
    small = await client.instances.snapshots.create(origin.id, { kind: 'Standby', name: 'small' });
    assert.deepEqual(small.compression, { enabled: true, algorithm: 'zstd', level: 1 });
    small = await compressed(small.id);
    assert.ok(small.compressed_size_bytes > 0 && small.compressed_size_bytes < small.uncompressed_size_bytes);
    assert.equal(small.compression_error, undefined);
  },

  async verification() {
    for (const { id } of [baseline, small]) {
      const verified = await client.post(`/snapshots/${id}/verify`);
      assert.equal(verified.state, 'intact', JSON.stringify(verified));
      assert.equal(verified.verified_bytes, verified.total_bytes);
      assert.ok((await client.get(`/snapshots/${id}/usage`)).own_bytes > 0);
    }
  },

  async diskAlone() {
    await stop(origin.id);
    await refused(409, 'conflict', () => client.instances.snapshots.create(origin.id, { kind: 'Standby' }, once));
    cold = await client.instances.snapshots.create(origin.id, { kind: 'Stopped', tags: { team: 'backend' } });
    assert.equal(cold.name, undefined);
    assert.equal(cold.uncompressed_size_bytes, undefined);
    const body = { name: 'typescript-wide', target_state: 'Running', target_hypervisor: 'qemu' };
    const wide = await client.snapshots.fork(cold.id, body);
    assert.equal(wide.hypervisor, 'qemu');
    await waitFor(wide.id, 'Running');
    assert.equal(await shell(wide.id, 'cat /root/note; hostname'), 'before\ntypescript-wide');
    await gone(wide.id);
  },

  async listing() {
    const ids = async (filters, options) => (await client.snapshots.list(filters, options)).map(({ id }) => id);
    const everything = [cold.id, small.id, baseline.id];
    const source_instance_id = origin.id;
    assert.deepEqual(await ids(), everything);
    assert.deepEqual(await ids({ kind: 'Standby' }), [small.id, baseline.id]);
    assert.deepEqual(await ids({ kind: 'Stopped' }), [cold.id]);
    assert.deepEqual(await ids({ name: 'small' }), [small.id]);
    assert.deepEqual(await ids({ source_instance_id }), everything);
    assert.deepEqual(await ids({ source_instance_id: nobody }), []);
    assert.deepEqual(await ids({ tags: { team: 'backend' } }), [cold.id, baseline.id]);
    assert.deepEqual(await ids({ tags }), [baseline.id]);
    assert.deepEqual(await ids({ kind: 'Standby', name: 'baseline', source_instance_id, tags }), [baseline.id]);
    assert.deepEqual(await ids({ kind: 'Stopped', name: 'baseline', source_instance_id, tags }), []);
    assert.deepEqual(await ids({}, { query: { limit: 2 } }), everything.slice(0, 2));
    assert.deepEqual(await ids({}, { query: { limit: 2, cursor: small.id } }), [baseline.id]);
  },

  async forksOfInstances() {
    await client.instances.snapshots.restore(small.id, { id: origin.id });
    const before = await counter(origin.id);
    const fork = (name, more = {}, options = {}) => client.instances.fork(origin.id, { name, ...more }, options);
    await refused(409, 'invalid_state', () => fork('typescript-live', {}, once));
    await refused(409, 'name_conflict', () => fork('typescript-fork-0', { from_running: true }, once));
    const live = await fork('typescript-live', { from_running: true });
    assert.equal(live.state, 'Running');
    await goesOn(origin.id, before);
    await goesOn(live.id, before);
    await client.instances.standby(origin.id);
    const asleep = await fork('typescript-asleep');
    assert.equal(asleep.state, 'Standby');
    await client.instances.restore(asleep.id);
    await goesOn(asleep.id, before);
    assert.equal((await fork('typescript-disk', { target_state: 'Stopped' })).state, 'Stopped');
    for (const name of ['typescript-live', 'typescript-asleep', 'typescript-disk']) await gone(name);
  },

  async schedules() {
    const { snapshotSchedule } = client.instances;
    await refused(404, 'not_found', () => snapshotSchedule.get(origin.id));
    const retention = { max_count: 3 };
    await refused(400, 'invalid_request', () => snapshotSchedule.update(origin.id, { interval: '59s', retention }));
    const request = { interval: '90m', retention, name_prefix: 'hourly', metadata: { by: 'clock' } };
    const made = await snapshotSchedule.update(origin.id, request);
    assert.equal(made.interval, '1h30m0s');
    assert.deepEqual(made.retention, retention);
    assert.deepEqual(await snapshotSchedule.get(origin.id), made);
    await snapshotSchedule.delete(origin.id);
    await refused(404, 'not_found', () => snapshotSchedule.delete(origin.id));
  },

  async outlivingTheSource() {
    await gone(origin.id);
    for (const id of forks) await gone(id);
    assert.deepEqual(await client.instances.list(), []);
    await refused(404, 'not_found', () => client.instances.snapshots.restore(baseline.id, { id: origin.id }));
    for (const { id } of [baseline, small]) {
      const heir = await client.snapshots.fork(id, { name: 'typescript-heir' });
      assert.equal(await shell(heir.id, 'cat /root/note; hostname'), 'before\ntypescript-heir');
      await client.snapshots.delete(id);
      await refused(404, 'not_found', () => client.snapshots.fork(id, { name: 'typescript-never' }));
      await goesOn(heir.id, capturedAt);
      await gone(heir.id);
    }
    await client.snapshots.delete(cold.id);
    assert.deepEqual(await client.snapshots.list(), []);
  },
};
