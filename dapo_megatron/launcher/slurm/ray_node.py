"""Ray on one node of a job, as a child of this task: it ends with the task, however that ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.config.schema import Config
from dapo_megatron.types import EngineError

NUM_LOG_LINES = 15
CAME_LATE = "The current node timed out during startup"
"""Ray's words when its own processes took longer than the 30 s that it gives them (see UPSTREAM.md)."""
_POLL_SECONDS = 0.05
_STOP_SECONDS = 15.0
_SHARE_OF_MEMORY, _SHARE_OF_SHM = 0.3, 0.8


class RayNode:
    """`ray start --block`, guarded (`rollout/process_guard.py`)."""

    def __init__(self, config: Config, name: str, address: str, ports: Sequence[int], log_file: Path, head: str | None = None):
        """Start it; `head` None: this is the head, and it listens on ports[0]. Else `host:port` of the head."""
        self.name, self.address, self._log_file = name, address, log_file
        self.gcs_address = head or f"{address}:{ports[0]}"
        self._may_start_until = 0.0 if head is None else time.monotonic() + config.cluster.startup_deadline_seconds
        self._folder = tempfile.mkdtemp(prefix="dapo-ray-", dir="/tmp")  # short: sockets lie in it
        _, manager, objects, agent, agent_grpc, runtime_env, metrics, client, *workers = ports
        num_processes = config.actor.world_size + config.rollout.num_engines
        options = {
            "node-ip-address": address,
            "node-manager-port": manager,
            "object-manager-port": objects,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "runtime-env-agent-port": runtime_env,
            "metrics-export-port": metrics,
            "min-worker-port": workers[0],
            "max-worker-port": workers[-1],
            "num-cpus": max(len(os.sched_getaffinity(0)), num_processes),
            "object-store-memory": _object_store_bytes(),
            "temp-dir": self._folder,
            "include-log-monitor": "false",
        }
        if head is None:
            options |= {"port": ports[0], "ray-client-server-port": client, "include-dashboard": "false"}
        else:
            options |= {"address": head}
        command = [
            sys.executable,
            "-m",
            "dapo_megatron.rollout.process_guard",
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
        ]
        command += [f"--{name}={value}" for name, value in options.items()]
        self._command = [*command, "--block", "--disable-usage-stats", *(["--head"] if head is None else [])]
        self._start()

    def _start(self) -> None:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as log:
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )

    def wait_until_head_listens(self, deadline_seconds: float) -> None:
        """EngineError, with the end of its output, when it does not."""
        host, _, port = self.gcs_address.rpartition(":")
        end = time.monotonic() + deadline_seconds
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                pass
            self.require_alive()
            if time.monotonic() > end:
                raise EngineError(f"Ray's head on {self.name} did not listen within {deadline_seconds:g} s. {self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def require_alive(self) -> None:
        """EngineError, with the end of its output, when it has ended.

        Not so a follower that was too slow for Ray while nodes may still come (`cluster.startup_deadline_seconds`): it starts again.
        """
        if (code := self._guard.poll()) is None:
            return
        if time.monotonic() < self._may_start_until and CAME_LATE in self._said():
            self._start()
            return
        raise EngineError(f"Ray on {self.name} ended with code {code}. {self.log_tail()}")

    def _said(self) -> str:
        """Since it was started last."""
        with self._log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def log_tail(self) -> str:
        """The last lines of its output."""
        lines = self._log_file.read_text(errors="replace").splitlines() if self._log_file.is_file() else []
        return f"Last lines of {self._log_file}:\n" + "\n".join(f"    {line[:500]}" for line in lines[-NUM_LOG_LINES:])

    def stop(self) -> None:
        """End it and all that it started, and remove its files."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _object_store_bytes() -> int:
    """What fits into /dev/shm, at most Ray's own share of the memory: more, and Ray would take a file on disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(_SHARE_OF_MEMORY * memory, _SHARE_OF_SHM * shutil.disk_usage("/dev/shm").free))
