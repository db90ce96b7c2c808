"""What a task knows of its job; addresses, ports and the meeting of tasks."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo_megatron.config.schema import SlurmConfig
from dapo_megatron.launcher.slurm import network
from dapo_megatron.launcher.slurm.job import Job, JobNode, expand_node_list, in_topology_order
from dapo_megatron.launcher.slurm.meeting import Head, find_meeting, join
from dapo_megatron.types import BadNodeError, ConfigError

STEP = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "n[1-3]"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node7", ["node7"]),
        ("gpu[01-03,07],login", ["gpu01", "gpu02", "gpu03", "gpu07", "login"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("a[9-11]-ib", ["a9-ib", "a10-ib", "a11-ib"]),
    ],
)
def test_slurms_short_form_of_names_is_expanded(text: str, names: list[str]):
    assert expand_node_list(text) == names


def test_a_task_knows_its_node_and_attempt():
    job = Job.from_environment({**STEP, "SLURM_RESTART_COUNT": "2"})
    assert (job.attempt, job.node) == ("12_2", JobNode("n2"))
    assert Job.from_environment(STEP).attempt == "12_0"


def test_the_parts_of_a_heterogeneous_job_follow_one_another():
    parts = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]", "SLURM_JOB_NODELIST_HET_GROUP_1": "b1"}
    job = Job.from_environment({**STEP, **parts, "SLURM_PROCID": "2"})
    assert job.nodes == (JobNode("a1", 0), JobNode("a2", 0), JobNode("b1", 1)) and job.node.name == "b1"


def test_outside_a_job_step_the_remedy_is_named():
    with pytest.raises(ConfigError, match="SLURM_PROCID is not set: .* use `dapo-megatron submit`"):
        Job.from_environment({"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"})


def test_nodes_below_one_switch_are_neighbours():
    assert in_topology_order({0: "s0.s2.n0", 1: "s0.s1.n1", 2: "s0.s2.n2", 3: "s0.s1.n3"}) == [1, 3, 0, 2]
    assert in_topology_order({1: "", 0: "", 2: ""}) == [0, 1, 2]


@pytest.mark.parametrize(
    ("address", "of_network", "allowed"),
    [
        ("10.1.2.3", None, True),
        ("127.0.0.1", None, False),
        ("127.0.1.1", "127.0.0.0/8", False),
        ("8.8.8.8", None, False),
        ("8.8.8.8", "8.8.0.0/16", True),
        ("10.1.2.3", "10.2.0.0/16", False),
    ],
)
def test_only_private_or_named_networks_are_used(address: str, of_network: str | None, allowed: bool):
    assert network.is_allowed(address, of_network) is allowed


def test_ports_that_are_taken_are_passed_over():
    size = network.NUM_FIXED_PORTS + network.NUM_WORKER_PORTS
    config = SlurmConfig(first_port=25000, last_port=25000 + 2 * size - 1)
    first = network.free_ports("127.0.0.1", config, seed=4)
    with socket.create_server(("127.0.0.1", first[3])):
        second = network.free_ports("127.0.0.1", config, seed=4)
    assert len(second) == size and not set(first) & set(second)
    with pytest.raises(BadNodeError, match="slurm.first_port"):
        network.free_ports("127.0.0.1", SlurmConfig(first_port=25000, last_port=25100), seed=0)


def test_the_interface_of_an_address_is_found():
    assert network.interface_of("127.0.0.1") == "lo" and network.interface_of("203.0.113.7") is None


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    head = Head(tmp_path / "attempt" / "meeting.json", "127.0.0.1", [port])
    yield head
    head.close()


def test_tasks_meet_talk_and_hear_the_end(head: Head, tmp_path: Path):
    file = tmp_path / "attempt" / "meeting.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    line = join(find_meeting(file, 5), 1, {"facts": [1, 2]}, 5)
    hello = head.hellos([1], 5)[1]
    assert hello["facts"] == [1, 2] and "secret" not in hello
    head.tell_all({"ray": "there"})
    assert line.receive(5) == {"ray": "there"}
    line.send({"error": ""})
    assert head.answers(5) == ({1: {"error": ""}}, {})
    threading.Thread(target=head.close).start()
    assert line.receive(5) is None
    assert not file.exists()


def test_who_does_not_come_is_known_and_who_has_no_secret_is_not_let_in(head: Head):
    with socket.create_connection((head.meeting.address, head.meeting.port), timeout=5) as stranger:
        stranger.sendall(json.dumps({"task": 1, "secret": "guessed"}).encode() + b"\n")
        assert stranger.recv(1) == b""
    assert head.hellos([1, 2], 0.05) == {}


def test_a_node_that_leaves_or_is_silent_is_named(head: Head):
    line = join(head.meeting, 1, {}, 5)
    head.hellos([1], 5)
    assert head.answers(0.05) == ({}, {1: "did not answer within 0.05 s"})
    line.close()
    assert head.answers(5) == ({}, {1: "left before it answered; see its lines above"})


def test_a_meeting_that_never_comes_names_what_to_look_at(tmp_path: Path):
    with pytest.raises(BadNodeError, match="this node does not see the run folder"):
        find_meeting(tmp_path / "meeting.json", 0.05)
