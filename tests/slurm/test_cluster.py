"""The cluster that the other tests rely on behaves as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_nodes_are_machines_of_their_own(slurm: Cluster, shared_dir: Path):
    script = "hostname; ls /tmp | grep mine; touch /tmp/mine-$(hostname)"
    for _ in range(2):
        job = slurm.sbatch("-N2", "-w", "node[1-2]", f"--output={shared_dir}/out", "--wrap", f"srun sh -c '{script}'")
        slurm.wait(job, "COMPLETED")
    assert sorted((shared_dir / "out").read_text().split()) == ["mine-node1", "mine-node2", "node1", "node2"]
    assert "mine" not in slurm.on_node(3, "ls", "/tmp")
