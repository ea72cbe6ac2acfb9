"""Drives the official Python SDK through every call that the server covers, against real machines.

What is about snapshots stands in snapshots.py.

Environment: HYPEMAN_BASE_URL and HYPEMAN_API_KEY as the SDK reads them, STORY_IMAGE (a ready busybox image),
STORY_UPSTREAM (an image of another registry) and STORY_UPSTREAM_USER (who may pull it, with any password),
STORY_SCRATCH (a directory to write in). Prints one line for each step; ends non-zero at the first failure.
"""

import asyncio
import os
import stat
import sys
import time
import traceback

from hypeman import AsyncHypeman, Hypeman
from hypeman.lib import (
    CopyProtocolError,
    cp_from_instance,
    cp_from_instance_async,
    cp_to_instance,
    cp_to_instance_async,
    exec,
    exec_async,
)

import snapshots
from support import IMAGE, SCRATCH, client, create, refused, wait


def service():
    assert client.health.check().status == "ok"
    capabilities = client.capabilities.get()
    assert capabilities.host.os == "linux"
    assert {"qemu", "qemu-microvm"} <= {runtime.name for runtime in capabilities.runtimes if runtime.available}
    resources = client.resources.get()
    assert resources.cpu.capacity > 0 and resources.memory.capacity > 0 and resources.disk.capacity > 0


def images():
    assert IMAGE in [image.name for image in client.images.list()]
    image = client.images.get(IMAGE)
    assert image.status == "ready" and image.size_bytes > 0 and image.digest.startswith("sha256:")
    target = IMAGE.rsplit(":", 1)[0] + ":python"
    tagged = client.images.tag(IMAGE, target=target)
    assert (tagged.name, tagged.digest) == (target, image.digest)
    client.images.delete(target)
    with refused(404, "not_found"):
        client.images.get(target)
    with refused(400, "invalid_platform"):
        client.images.create(name=IMAGE, platform="beos/ppc")


def pulling():
    name, user = os.environ["STORY_UPSTREAM"], os.environ["STORY_UPSTREAM_USER"]
    asked = client.images.create(
        name=name, credentials={"username": user, "password": "any"}, tags={"client": "python"}
    )
    assert asked.name == name and asked.digest.startswith("sha256:") and asked.status != "failed"
    while (pulled := client.images.get(name)).status != "ready":
        assert pulled.status != "failed", pulled.error
        time.sleep(0.1)
    assert pulled.digest == asked.digest and pulled.size_bytes > 0
    assert pulled.cmd == ["/pulled"] and pulled.tags == {"client": "python"}
    client.images.delete(name)
    with refused(404, "not_found"):
        client.images.get(name)


def lifecycle():
    with refused(400, "invalid_size"):
        client.instances.create(name="python-bad", image=IMAGE, size="a lot")
    instance = create("python", env={"FROM": "sdk"}, tags={"client": "python", "path": "a/b=c +@"})
    assert instance.name == "python" and instance.size == "128.0 MB" and instance.expires_at is None
    wait(instance.id, "Running")
    for key in (instance.id, "python", instance.id[:20]):
        assert client.instances.get(key).id == instance.id
    assert client.instances.get(instance.id).state == "Running"
    listed = client.instances.list(state="Running", tags={"client": "python", "path": "a/b=c +@"})
    assert [other.id for other in listed] == [instance.id]
    assert client.instances.list(tags={"client": "nobody"}) == []
    with refused(400, "name_conflict"):
        create("python")
    with refused(409, "invalid_state"):
        client.with_options(max_retries=0).instances.start(instance.id)
    stats = client.instances.stats(instance.id)
    assert stats.memory_rss_bytes > 0 and stats.allocated_vcpus == 1
    path = client.instances.stat(instance.id, path="/bin/sh", follow_links=False)
    assert path.exists and path.is_symlink and path.link_target == "busybox"
    assert client.instances.stat(instance.id, path="/bin/sh", follow_links=True).is_file
    assert not client.instances.stat(instance.id, path="/absent").exists
    assert [a.instance_id for a in client.resources.get().allocations] == [instance.id]
    early = client.instances.wait(instance.id, state="Stopped", api_timeout="100ms")
    assert early.timed_out and early.state == "Running"


def executing():
    result = exec(client, "python", ["sh", "-c", "echo $FROM; echo problem >&2; exit 7"])
    assert result.exit_code == 7 and b"sdk" in result.output and b"problem" in result.output, result
    assert exec(client, "python", ["/no/such/program"]).exit_code == 127
    shown = exec(client, "python", ["sh", "-c", "echo $COLOUR $PWD"], env={"COLOUR": "red"}, cwd="/tmp", wait_for_agent=30)
    assert shown.output == b"red /tmp\n", shown
    assert exec(client, "python", ["sleep", "1000"], timeout=1).exit_code == 124
    noise = os.urandom(200_000)
    echoed = exec(client, "python", ["head", "-c", str(len(noise))], stdin=noise)
    assert echoed.output == noise and echoed.exit_code == 0
    size = exec(client, "python", ["sh", "-c", "sleep 1; stty size"], tty=True, rows=20, cols=70, resize=[(30, 90)])
    assert size.output.strip() == b"30 90", size
    many = exec(client, "python", ["sh", "-c", "head -c 3000000 /dev/zero"])
    assert len(many.output) == 3_000_000


def tree():
    root = SCRATCH / "tree"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "sub" / "script").write_bytes(b"#!/bin/sh\necho copied\n")
    (root / "sub" / "script").chmod(0o750)
    (root / "noise").write_bytes(os.urandom(300_001))
    (root / "nothing").write_bytes(b"")
    return root


def copying():
    root = tree()
    cp_to_instance(client, "python", root, "/copied")
    assert exec(client, "python", ["/copied/sub/script"]).output == b"copied\n"
    exec(client, "python", ["ln", "-s", "sub/script", "/copied/link"])
    out = SCRATCH / "out"
    cp_from_instance(client, "python", "/copied", out)
    assert (out / "copied/noise").read_bytes() == (root / "noise").read_bytes()
    assert (out / "copied/nothing").read_bytes() == b""
    assert stat.S_IMODE((out / "copied/sub/script").stat().st_mode) == 0o750
    assert (out / "copied/sub/empty").is_dir()
    assert os.readlink(out / "copied/link") == "sub/script"
    cp_to_instance(client, "python", root / "noise", "/owned", mode=0o600, archive=True)
    owner = exec(client, "python", ["stat", "-c", "%u:%g %a", "/owned"]).output.decode().strip()
    assert owner == f"{os.getuid()}:{os.getgid()} 600", owner
    cp_from_instance(client, "python", "/copied/link", out / "followed", follow_symlinks=True)
    try:
        cp_from_instance(client, "python", "/absent", out)
    except CopyProtocolError as error:
        assert "absent" in str(error), error
    else:
        raise AssertionError("copying what is not there must fail")


def logs():
    talker = create("python-logs", cmd=["sh", "-c", "for i in 1 2 3 4 5; do echo line $i; done; exec sleep 1000"])
    wait(talker.id, "Running")
    stream = client.instances.logs(talker.id, follow=True, tail=100)
    for line in stream:
        if "line 5" in line:
            break
    stream.close()
    assert list(client.instances.logs(talker.id, tail=2)) == ["line 4", "line 5"]
    assert list(client.instances.logs(talker.id, source="hypeman"))
    client.instances.delete(talker.id, graceful_shutdown=False)


def policies():
    updated = client.instances.update("python", ttl="1h")
    assert updated.expires_at is not None
    assert client.instances.update("python", ttl="0s").expires_at is None


async def asynchronous():
    async with AsyncHypeman(timeout=300) as other:
        assert (await other.health.check()).status == "ok"
        results = await asyncio.gather(*(exec_async(other, "python", ["echo", str(n)]) for n in range(10)))
        assert [result.output for result in results] == [f"{n}\n".encode() for n in range(10)]
        await cp_to_instance_async(other, "python", SCRATCH / "tree/noise", "/async")
        await cp_from_instance_async(other, "python", "/async", SCRATCH / "async")
        assert (SCRATCH / "async/async").read_bytes() == (SCRATCH / "tree/noise").read_bytes()


def stopping():
    stopped = client.instances.stop("python")
    assert stopped.state in ("Stopped", "Shutdown"), stopped.state
    wait("python", "Stopped")
    with refused(409, "invalid_state"):
        client.with_options(max_retries=0).instances.stop("python")
    try:
        exec(client, "python", ["true"])
    except Exception as error:
        assert "409" in str(error), error
    else:
        raise AssertionError("exec on a stopped instance must fail")
    client.instances.start("python", cmd=["sh", "-c", "echo second; exec sleep 1000"])
    wait("python", "Running")
    client.instances.delete("python")
    with refused(404, "not_found"):
        client.instances.get("python")
    assert client.instances.list() == []


def access():
    stranger = Hypeman(api_key="nonsense", max_retries=0)
    with refused(401, "Unauthorized"):
        stranger.instances.list()


STEPS = [service, access, images, pulling, lifecycle, executing, copying, logs, policies, asynchronous, stopping]
STEPS += snapshots.STEPS


def main():
    SCRATCH.mkdir(parents=True)
    for step in STEPS:
        begun = time.monotonic()
        try:
            asyncio.run(step()) if asyncio.iscoroutinefunction(step) else step()
        except BaseException:
            traceback.print_exc()
            print(f"FAILED {step.__name__}")
            return 1
        print(f"ok {step.__name__} ({time.monotonic() - begun:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
