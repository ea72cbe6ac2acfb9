"""The story of somebody who builds on snapshots, told with the official Python SDK.

A guest counts in its memory and keeps a note on its disk. It is captured while it runs, brought back, multiplied,
put to sleep and woken, and in the end outlived by its snapshots. What the server offers beyond the SDK (`verify`,
`usage`, several forks in one call, pages of the list) is asked for through the SDK's plain HTTP calls.
"""

import asyncio
import time

from hypeman import AsyncHypeman
from hypeman.lib import exec, exec_async

from support import client, create, refused, wait

COUNT = "n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.05; done"
# The shell empties the file before it writes to it.
READ_COUNT = 'until n=$(cat /dev/shm/count) && [ -n "$n" ]; do :; done; echo $n'
TAGS = {"team": "backend", "path": "a/b=c +@"}

# What one step leaves to the next: the instance, where its counter was at the capture, and the snapshots.
origin = None
captured_at = 0
baseline = small = cold = None
forks = []


def once(call, *arguments, **more):
    """The call of a client that does not repeat what is refused."""
    return call(client.with_options(max_retries=0))(*arguments, **more)


def shell(instance, line):
    result = exec(client, instance, ["sh", "-c", line])
    assert result.exit_code == 0, (line, result)
    return result.output.decode().strip()


def counter(instance):
    return int(shell(instance, READ_COUNT))


def goes_on(instance, at_least):
    """The guest counts, from where it was."""
    first = counter(instance)
    assert first >= at_least, f"{first} after {at_least}"
    while counter(instance) <= first:
        pass
    return first


def compressed(snapshot_id):
    while True:
        shown = client.snapshots.get(snapshot_id)
        assert shown.compression_state in ("compressing", "compressed"), shown
        if shown.compression_state == "compressed":
            return shown
        time.sleep(0.05)


def policy_on_create():
    global origin
    with refused(400, "invalid_snapshot_policy"):
        create("python-bad", snapshot_policy={"compression": {"enabled": True, "algorithm": "lz4", "level": 12}})
    policy = {
        "compression": {"enabled": True, "algorithm": "lz4", "level": 2},
        "standby_compression_delay": "90s",
    }
    origin = create("python-origin", tags={"client": "python"}, snapshot_policy=policy)
    wait(origin.id, "Running")
    shown = client.instances.get(origin.id)
    assert shown.snapshot_policy.compression.algorithm == "lz4", shown.snapshot_policy
    assert shown.snapshot_policy.compression.level == 2, shown.snapshot_policy
    assert shown.snapshot_policy.standby_compression_delay == "1m30s", shown.snapshot_policy
    assert shown.has_snapshot is False
    shell(origin.id, f"sh -c '{COUNT}' >/dev/null 2>&1 </dev/null & echo before > /root/note && sync")
    goes_on(origin.id, 1)


def standby_and_restore():
    with refused(409, "invalid_state"):
        once(lambda c: c.instances.restore, origin.id)
    with refused(400, "invalid_compression_delay"):
        client.instances.standby(origin.id, compression_delay="soon")
    with refused(400, "invalid_snapshot_compression"):
        client.instances.standby(origin.id, compression={"enabled": True, "algorithm": "lz4", "level": 10})
    for more in (
        {},
        {"compression": {"enabled": True, "algorithm": "zstd", "level": 3}, "compression_delay": "0s"},
        {"compression": {"enabled": False}},
    ):
        before = counter(origin.id)
        asleep = client.instances.standby(origin.id, **more)
        assert asleep.state == "Standby" and asleep.has_snapshot is True, asleep
        assert [other.id for other in client.instances.list(state="Standby")] == [origin.id]
        with refused(409, "invalid_state"):
            once(lambda c: c.instances.standby, origin.id)
        with refused(409, "invalid_state"):
            once(lambda c: c.instances.stop, origin.id)
        awake = client.instances.restore(origin.id)
        assert awake.state == "Running" and awake.has_snapshot is False, awake
        goes_on(origin.id, before)
        assert shell(origin.id, "cat /root/note") == "before"


def capture_while_running():
    global baseline, captured_at
    captured_at = counter(origin.id)
    baseline = client.instances.snapshots.create(
        origin.id, kind="Standby", name="baseline", tags=TAGS, compression={"enabled": False}
    )
    assert client.instances.get(origin.id).state == "Running"
    goes_on(origin.id, captured_at)
    assert (baseline.kind, baseline.name, baseline.tags) == ("Standby", "baseline", TAGS), baseline
    assert (baseline.source_instance_id, baseline.source_instance_name) == (origin.id, "python-origin"), baseline
    assert baseline.source_hypervisor == origin.hypervisor
    assert baseline.size_bytes > 1 << 20 and baseline.uncompressed_size_bytes > 1 << 20, baseline
    assert baseline.compression_state == "none" and baseline.compressed_size_bytes is None, baseline
    with refused(409, "conflict"):
        once(lambda c: c.instances.snapshots.create, origin.id, kind="Standby", name="baseline")
    with refused(409, "conflict"):
        once(lambda c: c.instances.snapshots.create, origin.id, kind="Stopped")
    with refused(400, "invalid_snapshot_compression"):
        wrong = {"enabled": True, "algorithm": "lz4", "level": 10}
        client.instances.snapshots.create(origin.id, kind="Standby", compression=wrong)
    assert client.snapshots.get(baseline.id) == baseline


def back_in_place():
    shell(origin.id, "echo after > /root/note && sync")
    with refused(409, "invalid_state"):
        once(lambda c: c.instances.snapshots.restore, baseline.id, id=origin.id)
    client.instances.stop(origin.id)
    wait(origin.id, "Stopped")
    back = client.instances.snapshots.restore(baseline.id, id=origin.id)
    assert (back.id, back.state) == (origin.id, "Running"), back
    assert shell(origin.id, "cat /root/note") == "before"
    later = goes_on(origin.id, captured_at)

    # Also from standby, where it can be captured without being woken, and to each of the other states.
    client.instances.standby(origin.id)
    with refused(409, "conflict"):
        once(lambda c: c.instances.snapshots.create, origin.id, kind="Stopped")
    dreaming = client.instances.snapshots.create(origin.id, kind="Standby", name="dreaming")
    assert client.instances.get(origin.id).state == "Standby"
    dreamer = client.snapshots.fork(dreaming.id, name="python-dreamer")
    goes_on(dreamer.id, later)
    client.snapshots.delete(dreaming.id)
    client.instances.delete(dreamer.id, graceful_shutdown=False)
    asleep = client.instances.snapshots.restore(baseline.id, id="python-origin", target_state="Standby")
    assert asleep.state == "Standby", asleep
    client.instances.restore(origin.id)
    assert counter(origin.id) < later + 10_000
    client.instances.stop(origin.id)
    wait(origin.id, "Stopped")
    still = client.instances.snapshots.restore(baseline.id, id=origin.id, target_state="Stopped")
    assert still.state == "Stopped", still
    client.instances.start(origin.id)
    wait(origin.id, "Running")
    assert exec(client, origin.id, ["cat", "/dev/shm/count"]).exit_code == 1, "a boot has no memory"
    client.instances.stop(origin.id)
    wait(origin.id, "Stopped")
    client.instances.snapshots.restore(baseline.id, id=origin.id, target_state="Running")
    goes_on(origin.id, captured_at)
    with refused(400, "invalid_request"):
        client.instances.snapshots.restore(baseline.id, id=origin.id, target_hypervisor="qemu-microvm")
    with refused(404, "not_found"):
        client.instances.snapshots.restore("a" * 24, id=origin.id)


async def ten_forks():
    async with AsyncHypeman(timeout=300) as other:
        names = [f"python-fork-{number}" for number in range(10)]
        made = await asyncio.gather(*(other.snapshots.fork(baseline.id, name=name) for name in names))
        assert [fork.name for fork in made] == names
        assert len({fork.id for fork in made} | {origin.id}) == 11
        assert {fork.state for fork in made} == {"Running"}
        forks.extend(fork.id for fork in made)
        line = f"hostname; cat /etc/machine-id; cat /root/note; {READ_COUNT}; hostname > /root/note; sync"
        answers = await asyncio.gather(*(exec_async(other, fork.id, ["sh", "-c", line]) for fork in made))
    seen = [answer.output.decode().split() for answer in answers]
    assert [hostname for hostname, *_ in seen] == names, seen
    assert len({machine for _, machine, *_ in seen}) == 10, seen
    assert all(note == "before" and int(count) >= captured_at for _, _, note, count in seen), seen
    with refused(409, "conflict"):
        once(lambda c: c.snapshots.fork, baseline.id, name="python-fork-3")
    assert shell(origin.id, "cat /root/note") == "before", "each has a disk of its own"
    for fork, name in zip(forks, names):
        assert shell(fork, "cat /root/note") == name
        goes_on(fork, captured_at)

    several = client.post(f"/snapshots/{baseline.id}/fork", body={"name": "python-many", "count": 2}, cast_to=object)
    assert [fork["name"] for fork in several["forks"]] == ["python-many-1", "python-many-2"], several
    for fork in several["forks"]:
        goes_on(fork["instance"]["id"], captured_at)
        client.instances.delete(fork["instance"]["id"], graceful_shutdown=False)


def compression():
    global small
    # The instance's policy counts where the request says nothing.
    by_policy = client.instances.snapshots.create(origin.id, kind="Standby", name="by-policy")
    assert (by_policy.compression.algorithm, by_policy.compression.level) == ("lz4", 2), by_policy
    wanted = {"enabled": True, "algorithm": "zstd", "level": 3}
    small = client.instances.snapshots.create(origin.id, kind="Standby", name="small", compression=wanted)
    assert (small.compression.algorithm, small.compression.level) == ("zstd", 3), small
    for snapshot_id in (by_policy.id, small.id):
        shown = compressed(snapshot_id)
        assert 0 < shown.compressed_size_bytes < shown.uncompressed_size_bytes, shown
        assert shown.compression_error is None, shown
    small = client.snapshots.get(small.id)
    client.snapshots.delete(by_policy.id)
    with refused(404, "not_found"):
        client.snapshots.get(by_policy.id)


def verification():
    for snapshot in (baseline, small):
        verified = client.post(f"/snapshots/{snapshot.id}/verify", cast_to=object)
        assert verified["state"] == "intact" and "damage" not in verified, verified
        assert verified["verified_bytes"] == verified["total_bytes"] > 0, verified
        usage = client.get(f"/snapshots/{snapshot.id}/usage", cast_to=object)
        assert usage["own_bytes"] > 0 and usage["freed_by_delete_bytes"] >= 0 and usage["shared_bytes"] >= 0, usage


def disk_alone():
    global cold
    client.instances.stop(origin.id)
    wait(origin.id, "Stopped")
    with refused(409, "conflict"):
        once(lambda c: c.instances.snapshots.create, origin.id, kind="Standby")
    with refused(400, "invalid_snapshot_compression"):
        client.instances.snapshots.create(origin.id, kind="Stopped", compression={"enabled": True})
    cold = client.instances.snapshots.create(origin.id, kind="Stopped", name="cold", tags={"team": "backend"})
    assert cold.uncompressed_size_bytes is None and cold.compressed_size_bytes is None, cold
    still = client.snapshots.fork(cold.id, name="python-still")
    assert still.state == "Stopped", still
    client.instances.delete(still.id)
    micro = client.snapshots.fork(
        cold.id, name="python-micro", target_state="Running", target_hypervisor="qemu-microvm"
    )
    assert micro.hypervisor == "qemu-microvm", micro
    wait(micro.id, "Running")
    assert shell(micro.id, "cat /root/note; hostname") == "before\npython-micro"
    client.instances.delete(micro.id, graceful_shutdown=False)


def listing():
    def ids(**filters):
        return [snapshot.id for snapshot in client.snapshots.list(**filters)]

    everything = [cold.id, small.id, baseline.id]
    assert ids() == everything, "newest first"
    assert ids(kind="Standby") == [small.id, baseline.id]
    assert ids(kind="Stopped") == [cold.id]
    assert ids(name="baseline") == [baseline.id]
    assert ids(name="base") == [], "a name is not a prefix"
    assert ids(source_instance_id=origin.id) == everything
    assert ids(source_instance_id="a" * 24) == []
    assert ids(tags={"team": "backend"}) == [cold.id, baseline.id]
    assert ids(tags=TAGS) == [baseline.id]
    assert ids(tags={"team": "frontend"}) == []
    assert ids(kind="Standby", name="baseline", source_instance_id=origin.id, tags=TAGS) == [baseline.id]
    assert ids(kind="Stopped", name="baseline", source_instance_id=origin.id, tags=TAGS) == []
    assert ids(extra_query={"limit": 2}) == everything[:2]
    assert ids(extra_query={"limit": 2, "cursor": everything[1]}) == everything[2:]
    for snapshot in (cold, small, baseline):
        assert client.snapshots.get(snapshot.id) == snapshot


def forks_of_instances():
    fork = client.instances.fork
    still = fork("python-origin", name="python-still")
    assert still.state == "Stopped", still
    client.instances.delete(still.id)
    client.instances.snapshots.restore(small.id, id=origin.id)
    before = counter(origin.id)
    with refused(409, "invalid_state"):
        once(lambda c: c.instances.fork, origin.id, name="python-live")
    with refused(409, "name_conflict"):
        once(lambda c: c.instances.fork, origin.id, name="python-fork-0", from_running=True)
    live = fork(origin.id, name="python-live", from_running=True)
    assert live.state == "Running", live
    assert client.instances.get(origin.id).state == "Running"
    goes_on(origin.id, before)
    goes_on(live.id, before)
    assert shell(live.id, "hostname") == "python-live"
    client.instances.standby(origin.id)
    asleep = fork(origin.id, name="python-asleep")
    assert asleep.state == "Standby" and asleep.has_snapshot is True, asleep
    client.instances.restore(asleep.id)
    goes_on(asleep.id, before)
    disk = fork(origin.id, name="python-disk", target_state="Stopped")
    assert disk.state == "Stopped", disk
    client.instances.restore(origin.id)
    goes_on(origin.id, before)
    for other in (live, asleep, disk):
        client.instances.delete(other.id, graceful_shutdown=False)


def schedules():
    schedule = client.instances.snapshot_schedule
    with refused(404, "not_found"):
        schedule.get(origin.id)
    for interval, retention in (("30s", {"max_count": 1}), ("1h", {}), ("often", {"max_count": 1})):
        with refused(400, "invalid_request"):
            schedule.update(origin.id, interval=interval, retention=retention)
    made = schedule.update(
        origin.id, interval="90m", retention={"max_count": 3}, name_prefix="hourly", metadata={"by": "clock"}
    )
    assert (made.instance_id, made.interval, made.retention.max_count) == (origin.id, "1h30m0s", 3), made
    assert (made.name_prefix, made.metadata, made.last_run_at) == ("hourly", {"by": "clock"}, None), made
    assert made.next_run_at > made.created_at
    changed = schedule.update("python-origin", interval="90m", retention={"max_age": "48h"})
    assert changed.next_run_at == made.next_run_at, "only another interval moves the next run"
    assert (changed.retention.max_age, changed.retention.max_count) == ("48h0m0s", None), changed
    assert schedule.get(origin.id) == changed
    schedule.delete(origin.id)
    with refused(404, "not_found"):
        schedule.delete(origin.id)


def outliving_the_source():
    client.instances.delete(origin.id)
    for fork in forks:
        client.instances.delete(fork, graceful_shutdown=False)
    assert client.instances.list() == []
    assert [s.id for s in client.snapshots.list(source_instance_id=origin.id)] == [cold.id, small.id, baseline.id]
    with refused(404, "not_found"):
        client.instances.snapshots.restore(baseline.id, id=origin.id)
    for snapshot in (baseline, small):
        heir = client.snapshots.fork(snapshot.id, name="python-heir")
        assert heir.state == "Running", heir
        assert shell(heir.id, "cat /root/note; hostname") == "before\npython-heir"
        goes_on(heir.id, captured_at)
        client.snapshots.delete(snapshot.id)
        with refused(404, "not_found"):
            client.snapshots.fork(snapshot.id, name="python-never")
        goes_on(heir.id, captured_at)
        client.instances.delete(heir.id, graceful_shutdown=False)
    client.snapshots.delete(cold.id)
    with refused(404, "not_found"):
        client.snapshots.delete(cold.id)
    assert client.snapshots.list() == []


STEPS = [
    policy_on_create,
    standby_and_restore,
    capture_while_running,
    back_in_place,
    ten_forks,
    compression,
    verification,
    disk_alone,
    listing,
    forks_of_instances,
    schedules,
    outliving_the_source,
]
