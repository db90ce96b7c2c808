"""A node of Ray that does not come up, with a stand-in for Ray's command that ends as Ray's does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.slurm.ray_node import CAME_LATE, RayNode
from dapo_megatron.types import EngineError

PORTS = range(30000, 30010)
RAY = """
import pathlib, sys, time
starts = pathlib.Path({starts!r})
starts.write_text(starts.read_text() + "*" if starts.exists() else "*")
if len(starts.read_text()) <= {num_failures}:
    sys.exit({reason!r})
time.sleep(100)
"""


@contextmanager
def follower(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_failures: int,
    reason: str,
    deadline_seconds: float = 60,
    head: str | None = "a:1",
) -> Iterator[RayNode]:
    package = folder / "ray" / "scripts"
    package.mkdir(parents=True)
    for file in (folder / "ray" / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "scripts.py").write_text(RAY.format(starts=str(folder / "starts"), num_failures=num_failures, reason=reason))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    cluster = {"startup_deadline_seconds": deadline_seconds}
    config = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "cluster": cluster})
    node = RayNode(config, "n2", "127.0.0.1", PORTS, folder / "ray.log", head)
    try:
        yield node
    finally:
        node.stop()


def num_starts(folder: Path) -> int:
    starts = folder / "starts"
    return len(starts.read_text()) if starts.exists() else 0


def ask_until(node: RayNode, condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        node.require_alive()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_follower_that_was_too_slow_for_ray_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with follower(tmp_path, monkeypatch, 2, f"Exception: {CAME_LATE}. This could happen because") as node:
        ask_until(node, lambda: num_starts(tmp_path) == 3)
        node.require_alive()


@pytest.mark.parametrize(
    ("reason", "deadline_seconds", "head"),
    [
        ("Exception: no space left", 60, "a:1"),
        (CAME_LATE, 1e-6, "a:1"),
        (CAME_LATE, 60, None),
    ],
    ids=["another reason", "after the deadline", "the head"],
)
def test_other_ends_of_ray_are_the_nodes_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, deadline_seconds: float, head: str | None
):
    with follower(tmp_path, monkeypatch, 9, reason, deadline_seconds, head) as node:
        with pytest.raises(EngineError, match="Ray on n2 ended with code 1") as caught:
            ask_until(node, lambda: False)
        assert reason in str(caught.value) and num_starts(tmp_path) == 1
