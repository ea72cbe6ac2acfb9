"""What the parts of the contract share: the client under test and a few words to tell their stories with."""

import os
from contextlib import contextmanager
from pathlib import Path

import hypeman
from hypeman import Hypeman

IMAGE = os.environ["STORY_IMAGE"]
SCRATCH = Path(os.environ["STORY_SCRATCH"]) / "python"
client = Hypeman(timeout=300)


@contextmanager
def refused(status, code):
    """The block must raise the SDK's error for `status` with this code."""
    try:
        yield
    except hypeman.APIStatusError as error:
        assert error.status_code == status, f"{error.status_code} instead of {status}: {error}"
        assert error.body["code"] == code, error.body
        assert error.body["message"], error.body
    else:
        raise AssertionError(f"not refused with {status} {code}")


def wait(instance_id, state):
    answer = client.instances.wait(instance_id, state=state, api_timeout="4m")
    assert answer.state == state and not answer.timed_out, answer


def create(name, **more):
    return client.instances.create(
        name=name, image=IMAGE, size="128MB", overlay_size="256MB", vcpus=1, network={"enabled": False}, **more
    )
