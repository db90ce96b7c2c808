"""What the parent sees of the mark while the scorer writes it."""

from __future__ import annotations

import os
import signal
import time

from dapo_megatron.rewards.progress_mark import ProgressMark


def test_a_time_is_never_seen_half_written():
    file = ProgressMark.new_file()
    mark = ProgressMark(file)
    mark.begin(0)
    begun = mark.started
    pid = os.fork()
    if pid == 0:
        while True:
            mark.begin(1)
    try:
        while mark.place == 0:
            time.sleep(0.001)
        seen = [mark.started for _ in range(200_000)]
        assert begun <= min(seen) and max(seen) <= time.monotonic()
        assert seen == sorted(seen)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(file)
    mark.close()
