"""One Slurm cluster for all tests of this folder, and a folder that its nodes see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster, why_not
from tests.slurm.plays import Play


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Four idle nodes."""
    if reason := why_not():
        pytest.skip(reason)
    with cluster(kill_wait=10) as it:
        yield it


@pytest.fixture
def slurm(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up; afterwards it has no jobs and all nodes again."""
    yield slurm_cluster
    slurm_cluster.run("scancel", "--user", "root", "--signal=KILL", "--full", check=False)
    slurm_cluster.run("scancel", "--user", "root", check=False)
    slurm_cluster.restore()


@pytest.fixture
def shared_dir(slurm_cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """In place of tmp_path: all nodes see it, under this path."""
    folder = slurm_cluster.shared / re.sub(r"\W+", "_", request.node.name)
    folder.mkdir()
    return folder


@pytest.fixture
def play(slurm: Cluster, shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Submit runs from this process, with a stand-in for what runs in the job."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("HOME", str(shared_dir))  # no site file of whoever runs the tests
    monkeypatch.chdir(shared_dir)
    return Play(shared_dir)
