"""Runs of one process that are told to stop in a phase, one after the other: `python -m tests.e2e.stopping DIR RUN STEP:PHASE...`.

Prints the exit code of each, and of a last one that nothing stops.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from dapo_megatron.config.load import load_config
from dapo_megatron.launcher.run_folder import PhaseNote, RunFolder
from dapo_megatron.train import run
from tests.e2e.runs import QUICKSTART

OVERRIDES = (
    *("--cluster.backend", "local", "--actor.tensor_parallel_size", "1", "--train.num_rollout_steps", "6"),
    *("--eval.interval", "2", "--checkpoint.every", "4", "--metrics.tensorboard", "false"),
)


def main(folder: Path, name: str, stops: list[str]) -> None:
    os.chdir(folder)
    note_phase = RunFolder.note_phase

    def note_and_stop(self: RunFolder, note: PhaseNote) -> None:
        note_phase(self, note)
        if stops and stops[0] == f"{note.rollout_step}:{note.phase}":
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    RunFolder.note_phase = note_and_stop  # type: ignore[method-assign]
    config = load_config([QUICKSTART], [*OVERRIDES, "--run.dir", str(folder / name)])
    for _ in range(len(stops) + 1):
        print("exit code", int(run(config, check_only=False)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
