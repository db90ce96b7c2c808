"""The cluster that the other tests rely on behaves as one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import NAMESPACES, OWNER, PREFIX, ROOT, TAG, Cluster, clear_away_abandoned, start_of

pytestmark = pytest.mark.slurm


def test_nodes_are_machines_of_their_own(slurm: Cluster, shared_dir: Path):
    script = "hostname; ls /tmp | grep mine; touch /tmp/mine-$(hostname)"
    for _ in range(2):
        job = slurm.sbatch("-N2", "-w", "node[1-2]", f"--output={shared_dir}/out", "--wrap", f"srun sh -c '{script}'")
        slurm.wait(job, "COMPLETED")
    assert sorted((shared_dir / "out").read_text().split()) == ["mine-node1", "mine-node2", "node1", "node2"]
    assert "mine" not in slurm.on_node(3, "ls", "/tmp")


def test_what_killed_test_runs_left_is_cleared_away_and_what_others_use_is_not(slurm_cluster: Cluster):
    with subprocess.Popen(["sleep", "60"]) as lives, subprocess.Popen(["true"]) as dead:
        dead.wait()
        try:
            for process in (lives, dead):
                subprocess.run(["ip", "netns", "add", f"{TAG}{process.pid:x}-1"], check=True)
            folder = ROOT / f"{PREFIX}{lives.pid}"
            folder.mkdir()
            (folder / OWNER).write_text(start_of(lives.pid) or "")
            clear_away_abandoned()
            assert (folder.is_dir(), (NAMESPACES / f"{TAG}{lives.pid:x}-1").exists()) == (True, True)
            assert not (NAMESPACES / f"{TAG}{dead.pid:x}-1").exists()
            (folder / OWNER).write_text("0")  # the number is another process's now
            clear_away_abandoned()
            assert (folder.exists(), (NAMESPACES / f"{TAG}{lives.pid:x}-1").exists()) == (False, False)
        finally:
            lives.kill()
