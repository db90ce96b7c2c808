"""The checks of a job's nodes: facts in, findings out."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.slurm.checks import GIB, AllReduce, Gathered, all_findings, bad_nodes, needed_host_bytes
from dapo_megatron.launcher.slurm.facts import GpuFacts, NodeFacts, folder_problem, gather, parse_gpus
from dapo_megatron.launcher.slurm.preflight import EXCLUDED, preflight, preflight_here
from dapo_megatron.types import BadNodeError

GPU = GpuFacts("H100", 80 * GIB, 79 * GIB)
FACTS = NodeFacts(
    name="node1",
    address="10.0.0.1",
    clock=0.0,
    versions={"python": "3.12.1", "torch": "2.14.1", "driver": "580.1"},
    gpus=(GPU, GPU),
    num_memory_bytes=500 * GIB,
    num_shm_bytes=200 * GIB,
)


def config(**slurm: object) -> Config:
    return Config.model_validate({"model": {"path": "none"}, "data": {"path": "none"}, "slurm": {"gpus_per_node": 2, **slurm}})


def gathered(*changes: dict) -> Gathered:
    """Node 1 as it should be, and one more for each entry."""
    nodes = (FACTS, *(replace(FACTS, name=f"node{number}", **change) for number, change in enumerate(changes, start=2)))
    skew = {node.name: 0.01 for node in nodes[1:]}
    return Gathered(nodes, skew_seconds=skew, all_reduce=AllReduce("nccl", len(nodes), 4, 90.0, {}))


def bad(found: Gathered, settings: Config | None = None, needed_bytes: int = 0) -> list[tuple[str, str | None, str]]:
    findings = all_findings(settings or config(), found, needed_bytes)
    return [(finding.check, finding.node, finding.words) for finding in findings if finding.verdict == "bad"]


def test_equal_healthy_nodes_have_no_fault():
    assert bad(gathered({}, {}), needed_bytes=400 * GIB) == []


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        ({"versions": {**FACTS.versions, "torch": "2.13.0"}}, "versions", "torch 2.13.0, but 2.14.1 on the others"),
        ({"versions": {"python": "3.12.1", "torch": "2.14.1"}}, "versions", "driver none, but 580.1 on the others"),
        ({"gpus": (GPU,)}, "GPUs", "1 GPUs, 2 wanted"),
        ({"gpus": None}, "GPUs", "0 GPUs, 2 wanted"),
        ({"gpus": (GPU, replace(GPU, num_free_bytes=40 * GIB))}, "GPUs", "GPU 1 has 40 of 80 GiB free"),
        ({"gpus": (replace(GPU, processes=("python (pid 7)",)), GPU)}, "GPUs", "GPU 0 is used by python (pid 7)"),
        ({"num_memory_bytes": 9 * GIB}, "host memory", "9.0 GiB available, the run needs about 10.0"),
        ({"num_shm_bytes": 64 * 2**20}, "/dev/shm", "64 MiB free, 1024 wanted; give the container more, or clean up"),
        ({"network": "none is free"}, "ports", "none is free"),
        ({"run_folder": "/lustre cannot be written"}, "run folder", "/lustre cannot be written"),
    ],
)
def test_a_fault_is_found_on_its_node_alone(change: dict, check: str, words: str):
    assert bad(gathered({}, change), needed_bytes=10 * GIB) == [(check, "node3", words)]


def test_faults_between_nodes_are_found():
    found = replace(
        gathered({}),
        missing=("node7",),
        unseen=("node2",),
        skew_seconds={"node2": -90.0},
        all_reduce=AllReduce("gloo", 2, 2, 0.0, {"node2": "no route to host"}),
    )
    assert [(check, node) for check, node, _ in bad(found)] == [
        ("here", "node7"),
        ("run folder", "node2"),
        ("clock", "node2"),
        ("all-reduce", "node2"),
    ]
    assert bad_nodes(all_findings(config(), found, 0)) == ["node7", "node2"]


def test_an_all_reduce_that_fails_everywhere_is_no_fault_of_each_node():
    found = replace(gathered({}), all_reduce=AllReduce("nccl", 2, 4, 0.0, {"node1": "timed out", "node2": "no route"}))
    assert bad(found) == [
        ("all-reduce", None, "failed on every node, so that no single one can be blamed: node1: timed out; node2: no route")
    ]
    assert bad_nodes(all_findings(config(), found, 0)) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Gathered((FACTS,)), "can be written and read"),
        (gathered({}), "seen by all nodes, both ways"),
        (replace(gathered({}), missing=("node7",)), "seen by all nodes that came, both ways"),
    ],
)
def test_what_is_said_of_the_run_folder_is_what_was_looked_at(found: Gathered, words: str):
    findings = {finding.check: finding for finding in all_findings(config(), found, 0)}
    assert (findings["run folder"].verdict, findings["run folder"].words) == ("good", words)


def test_a_folder_is_written_and_read_back(tmp_path: Path):
    assert folder_problem(tmp_path / "yet" / "to come") == "" and list(tmp_path.iterdir()) == []
    assert folder_problem(Path("/proc/run")).startswith("/proc cannot be written and read: ")


def test_a_job_of_one_process_is_asked_for_what_it_uses(tmp_path: Path):
    run = {"run": {"dir": str(tmp_path)}, "cluster": {"backend": "local"}, "slurm": {"gpus_per_node": 0, "last_port": 20001}}
    alone = Config.model_validate({"model": {"path": "none"}, "data": {"path": "none"}, **run})
    text = io.StringIO()
    preflight_here(alone, Console(file=text, width=200), "node1")
    said = {line.split("\u2502")[1].strip(): line for line in text.getvalue().splitlines() if line.count("\u2502") == 5}
    assert "can be written and read" in said["run folder"] and "available" in said["host memory"]
    for check in ("/dev/shm", "ports"):
        assert "skipped" in said[check] and "one process, which needs none" in said[check]
    broken = alone.model_copy(update={"run": alone.run.model_copy(update={"dir": Path("/proc/run")})})
    with pytest.raises(BadNodeError, match="preflight: node1 cannot run this. node1: run folder: /proc cannot be written"):
        preflight_here(broken, Console(file=text), "node1")


def test_what_cannot_be_looked_at_is_skipped_in_words():
    alone = Gathered((replace(FACTS, gpus=None),))
    findings = {finding.check: finding for finding in all_findings(config(gpus_per_node=0), alone, 0)}
    assert [name for name, finding in findings.items() if finding.verdict == "skipped"] == ["GPUs", "clock", "all-reduce"]
    assert "gpus_per_node 0" in findings["GPUs"].words


def test_bad_nodes_are_named_and_left_out_where_the_config_says_so(tmp_path: Path):
    (tmp_path / EXCLUDED).write_text("node9\n")
    text = io.StringIO()
    found = gathered({}, {"num_shm_bytes": 0})
    with pytest.raises(
        BadNodeError, match=r"preflight: node3 cannot run this; left out from now on .*node3: /dev/shm: 0 MiB free"
    ):
        preflight(config(exclude_bad_nodes=True), found, Console(file=text, width=200), exclude_from=tmp_path)
    assert (tmp_path / EXCLUDED).read_text() == "node9\nnode3\n"
    assert "/dev/shm" in text.getvalue() and "node3" in text.getvalue()
    with pytest.raises(BadNodeError, match="node3 cannot run this. node3"):
        preflight(config(), found, Console(file=text), exclude_from=tmp_path)


def test_nvidia_smi_is_read_with_the_holders_of_each_gpu():
    listing = "GPU-a, NVIDIA H100, 81559, 81000\nGPU-b, NVIDIA H100, 81559, 20\n"
    assert parse_gpus(listing, "GPU-b, 4242, /usr/bin/python, x\n") == (
        GpuFacts("NVIDIA H100", 81559 * 2**20, 81000 * 2**20),
        GpuFacts("NVIDIA H100", 81559 * 2**20, 20 * 2**20, ("/usr/bin/python, x (pid 4242)",)),
    )


def test_the_facts_of_this_machine_are_plausible():
    facts = gather("here", "127.0.0.1")
    assert facts.num_memory_bytes > 2**20 and facts.num_shm_bytes > 0 and facts.versions["torch"][0].isdigit()


def test_needed_memory_grows_with_the_model_and_shrinks_with_the_nodes():
    small = needed_host_bytes(config(), 10**9, 2, on_gpus=True)
    assert needed_host_bytes(config(), 2 * 10**9, 2, on_gpus=True) > small > needed_host_bytes(config(), 10**9, 4, on_gpus=True)
    assert needed_host_bytes(config(), 10**9, 1, on_gpus=True) >= 14 * 10**9, "bf16 weights, fp32 master weights, two moments"
    assert needed_host_bytes(config(), 10**9, 2, on_gpus=False) > small
