"""What is said of processes that stand still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_megatron.launcher.stall import Frame, ProcessPlace, ProcessStacks, dump, explain_stall, summarize

STEP = Frame("train_micro_batches", "dapo_megatron/actor/step.py", 210)
WORKER = Frame("train", "dapo_megatron/actor/worker.py", 70)
ALL_REDUCE = Frame("all_reduce", "torch/distributed/distributed_c10d.py", 2800)
WRAPPER = Frame("wrapper", "torch/distributed/c10d_logger.py", 81)


def rank(number: int, *frames: Frame, state: str = "S", problem: str = "") -> ProcessStacks:
    threads = (("idle", (Frame("wait", "threading.py", 1),)), ("MainThread", frames)) if frames else ()
    return ProcessStacks(f"actor rank {number}", number, None, state, "python", threads, problem)


def test_ranks_are_grouped_by_the_collective_they_are_in_and_the_line_of_ours():
    found = [
        rank(10, WRAPPER, ALL_REDUCE, STEP, WORKER),
        rank(2, WRAPPER, ALL_REDUCE, STEP, WORKER),
        rank(3, STEP, WORKER, state="T"),
        rank(4, Frame("run_task", "ray/_private/worker.py", 1)),
        rank(5, problem="py-spy: Permission denied"),
    ]
    assert summarize(found) == (
        "ranks 2, 10: in all_reduce, called by train_micro_batches (dapo_megatron/actor/step.py:210); "
        "rank 3: stopped (SIGSTOP), in train_micro_batches (dapo_megatron/actor/step.py:210); "
        "rank 4: waits for the controller; "
        "rank 5: no stacks (py-spy: Permission denied), process state S"
    )


def test_a_stopped_process_and_what_it_started_are_read_and_let_go(tmp_path: Path):
    program = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', INNER])\ndef outer():\n    print(1, flush=True)\n"
    )
    inner = "INNER = 'def inner():\\n    input()\\ninner()'\n"
    process = subprocess.Popen(
        [sys.executable, "-c", inner + program + "    time.sleep(100)\nouter()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        os.kill(process.pid, signal.SIGSTOP)
        found = {stacks.name: stacks for stacks in dump([ProcessPlace("actor rank 0", process.pid)])}
        stopped = found["actor rank 0"]
        assert stopped.state == "T" and "outer" in [frame.function for _, frames in stopped.threads for frame in frames]
        assert "actor rank 0 child" in found
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "T"
    finally:
        process.kill()
        process.communicate()


def test_everything_lies_in_the_run_folder_also_of_nodes_that_do_not_answer(tmp_path: Path):
    def elsewhere(node: str, places: object) -> list[ProcessStacks]:
        if node == "10.0.0.9":
            raise TimeoutError("no answer in 60 s")
        return [rank(1, ALL_REDUCE, STEP)]

    places = [ProcessPlace("actor rank 1", 1, "10.0.0.2"), ProcessPlace("actor rank 2", 2, "10.0.0.9")]
    line = explain_stall(tmp_path / "stalls", "phase train did not end", places, elsewhere)
    (folder,) = (tmp_path / "stalls").iterdir()
    assert "rank 2: no stacks (10.0.0.9 does not answer: no answer in 60 s)" in line and str(folder) in line
    assert (folder / "summary.txt").read_text().startswith("phase train did not end. rank 1: in all_reduce")
    assert "all_reduce (torch/distributed/distributed_c10d.py:2800)" in (folder / "actor_rank_1_1.txt").read_text()
    controller = (folder / f"controller_{os.getpid()}.txt").read_text()
    assert "test_everything_lies_in_the_run_folder" in controller


@pytest.mark.parametrize("pid", [2**22 - 3])
def test_a_process_that_is_gone_is_said_to_be(pid: int):
    (gone,) = dump([ProcessPlace("actor rank 0", pid)])
    assert gone.state == "gone" and gone.problem.startswith("py-spy")
