"""A SGLang server on this machine: start, readiness, log, stop. Knows no Ray and imports no sglang.

    SglangServer ── pipe ──> process_guard ──> python -m sglang.launch_server --config FILE ──> ranks, detokenizer

The guard ends the whole tree when the process that holds the SglangServer is gone. All settings are in FILE (mode 0600, removed
once the server has read it), so the API key does not show in the list of processes. FILE is in the server's own folder for
temporary files, which goes when the server has ended, and with it the sockets that SGLang leaves there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.process_guard import STOP_SECONDS
from dapo_megatron.rollout.sglang_cpu import cpu_arguments, cpu_environment
from dapo_megatron.types import EngineEndpoint, EngineError

NUM_LOG_LINES = 20
"""Log lines quoted when a server does not come up."""
FIRST_PORT, LAST_PORT = 20000, 32767
"""Below Linux's ephemeral range, so that no outgoing connection takes a port between the look and the use."""
IN_PLACE_WATCHDOG_SECONDS = 10**7
"""`watchdog_timeout` of servers that are paused in place, which SGLang 0.5.23 takes for a hang; the health deadline finds those."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_POLL_SECONDS = 0.5
_READY_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What one server is started with."""

    name: str
    """As users know it: `engine 0`."""
    model_dir: Path
    """HF directory with weights and tokenizer."""
    config: SglangEngineConfig
    extra: dict[str, Any]
    """`rollout.sglang_extra`."""
    device: Literal["cpu", "cuda"]
    num_threads: int = 1
    """CPU threads of a rank; without effect on GPUs."""
    gpu_ids: tuple[int, ...] | None = None
    """GPUs of this machine that the server sees. None: those that this process sees."""
    host: str = "127.0.0.1"
    """Address to listen on: loopback, or the machine's private one."""
    port: int | None = None
    """None: a free one."""
    share_of_ports: tuple[int, int] = (0, 1)
    """(i, n): free ports are looked for in the i-th of n shares, so that servers that start at the same time do not take the same one."""
    random_seed: int = 0
    memory_saver: bool = False
    """Let weights and KV cache be released between rollouts; GPUs only."""


class SglangServer:
    """One server process tree."""

    def __init__(self, spec: ServerSpec, log_file: Path):
        """`log_file` gets the output of the server; an older one is continued."""
        self._spec, self._log_file = spec, log_file
        self._api_key = secrets.token_hex(16)
        self._guard: subprocess.Popen[str] | None = None
        self._pid: int | None = None
        self._port = spec.port
        self._rendezvous_port: int | None = None
        self._folder: Path | None = None

    @property
    def pid(self) -> int:
        """Of the server's first process, which leads its process group."""
        if self._pid is None:
            raise EngineError(f"{self._spec.name} has not been started; call start() first.")
        return self._pid

    @property
    def endpoint(self) -> EngineEndpoint:
        """Where it listens, once started."""
        spec = self._spec
        return EngineEndpoint(
            name=spec.name,
            url=f"http://{spec.host}:{self._port}",
            tensor_parallel_size=spec.config.tensor_parallel_size,
            device=spec.device,
            node=spec.host,
            api_key=self._api_key,
            log_file=self._log_file,
        )

    def start(self, deadline_seconds: float) -> EngineEndpoint:
        """Start the processes and return when the server generates. EngineError, with the end of the log, when it does not."""
        end = time.monotonic() + deadline_seconds
        self._launch()
        while not self._answers():
            code = self._exit_code()
            if code is not None:
                self.stop()
                raise EngineError(f"{self._spec.name} ended with exit code {code} while it started. {self.log_tail()}")
            if time.monotonic() > end:
                self.stop()
                raise EngineError(
                    f"{self._spec.name} did not come up within {deadline_seconds:.0f} s; raise the deadline "
                    f"(cluster.startup_deadline_seconds), or see what it waits for. {self.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)
        self._tell_guard()
        return self.endpoint

    def is_alive(self) -> bool:
        """Whether the first process runs; a hung one does too."""
        return self._guard is not None and self._exit_code() is None

    def stop(self) -> None:
        """End all processes of the server; stopping twice is harmless."""
        guard, self._guard = self._guard, None
        if guard is not None:
            assert guard.stdin is not None and guard.stdout is not None
            with suppress(BrokenPipeError):
                guard.stdin.close()
            self._signal(signal.SIGCONT)  # a stopped process does not hear the request to end
            try:
                guard.wait(STOP_SECONDS + 5.0)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                guard.kill()
                guard.wait()
            guard.stdout.close()
        if self._folder is not None:  # where the guard could not
            shutil.rmtree(self._folder, ignore_errors=True)

    def _tell_guard(self) -> None:
        """That the server is up, and has all the shared memory that it will have."""
        assert self._folder is not None and self._guard is not None and self._guard.stdin is not None
        (self._folder / _SETTINGS).unlink(missing_ok=True)
        with suppress(BrokenPipeError):  # it has ended since; the next call to it says so
            self._guard.stdin.write("up\n")
            self._guard.stdin.flush()

    def _signal(self, number: int) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, number)

    def log_tail(self) -> str:
        """The last lines of its output, with the name of the file."""
        lines = self._log_file.read_text(errors="replace").splitlines() if self._log_file.is_file() else []
        tail = "\n".join(f"    {line[:500]}" for line in lines[-NUM_LOG_LINES:])
        return f"Last lines of {self._log_file}:\n{tail or '    (empty)'}"

    def _launch(self) -> None:
        spec = self._spec
        if spec.port is None:
            self._port = free_port(spec.host, spec.share_of_ports)
        elif not _is_free(spec.host, spec.port):
            raise EngineError(f"{spec.name} cannot listen on {spec.host}:{spec.port}: the port is in use; choose another one.")
        self._rendezvous_port = free_port("0.0.0.0", spec.share_of_ports, but=self._port)
        self._pid = None
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="sglang_"))
        settings = self._folder / _SETTINGS
        settings.touch(0o600)
        with settings.open("w") as file:
            yaml.safe_dump({name.replace("_", "-"): value for name, value in self._arguments().items()}, file)
        command = [sys.executable, "-m", "dapo_megatron.rollout.process_guard", "--clean", str(self._folder)]
        command += [sys.executable, "-m", "sglang.launch_server", "--config", str(settings)]
        self._log_file.touch()
        self._log_file.chmod(0o600)  # SGLang writes its arguments there, the key among them
        with self._log_file.open("a") as log:
            self._guard = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        first_line = self._guard.stdout.readline()
        if not first_line:
            self.stop()
            raise EngineError(f"{spec.name} could not be started. {self.log_tail()}")
        self._pid = int(first_line)

    def _arguments(self) -> dict[str, Any]:
        """ServerArgs by name: what the machine needs, then the config, then `rollout.sglang_extra`."""
        spec, config = self._spec, self._spec.config
        given = {
            "tensor_parallel_size": config.tensor_parallel_size,
            "mem_fraction_static": config.mem_fraction_static,
            "max_running_requests": config.max_running_requests,
            "max_total_tokens": config.max_total_tokens,
            "watchdog_timeout": IN_PLACE_WATCHDOG_SECONDS if config.pause_mode == "in_place" else None,
        }
        own = {
            "model_path": str(spec.model_dir),
            "dtype": _DTYPES[config.dtype],
            "host": spec.host,
            "port": self._port,
            "api_key": self._api_key,
            "nccl_port": self._rendezvous_port,
            "weight_version": "0",
            "random_seed": spec.random_seed,
            "skip_tokenizer_init": True,
            "incremental_streaming_output": True,
            "stream_interval": config.stream_interval_tokens,
            "enable_memory_saver": spec.memory_saver and spec.device == "cuda",
            "enable_return_routed_experts": config.return_routed_experts,
        }
        machine = cpu_arguments(config.tensor_parallel_size) if spec.device == "cpu" else {}
        return {**machine, **{name: value for name, value in given.items() if value is not None}, **own, **spec.extra}

    def _environment(self) -> dict[str, str]:
        spec = self._spec
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        if spec.gpu_ids is not None:
            inherited["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.gpu_ids))
        no_proxy = ",".join(filter(None, [inherited.get("NO_PROXY"), spec.host, "127.0.0.1"]))
        own = {"NO_PROXY": no_proxy, "no_proxy": no_proxy, "PYTHONUNBUFFERED": "1"}
        if len(str(self._folder)) <= _LONGEST_FOLDER:
            own["TMPDIR"] = str(self._folder)
            inherited.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")))
        if spec.device == "cpu":
            own |= cpu_environment(self._model_type(), spec.config.tensor_parallel_size, spec.num_threads, inherited)
        return inherited | own

    def _model_type(self) -> str | None:
        file = self._spec.model_dir / "config.json"
        return json.loads(file.read_text()).get("model_type") if file.is_file() else None

    def _exit_code(self) -> int | None:
        return self._guard.poll() if self._guard is not None else -signal.SIGTERM

    def _answers(self) -> bool:
        """Whether the server has generated a token on request."""
        request = urllib.request.Request(f"{self.endpoint.url}/health_generate")
        request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            with _OPENER.open(request, timeout=_READY_TIMEOUT_SECONDS):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Engines are reached directly, whatever proxy the environment names."""
_MOST_SHARES = 512
"""25 ports each."""
_SETTINGS = "settings.yaml"
_LONGEST_FOLDER = 70
"""The path of a socket has 107 bytes at most; multiprocessing's add 32 to its folder. In a longer one SGLang's stay where they are."""
_NOT_INHERITED = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""A launcher's or an actor rank's view of its own world, which the server would take for its own."""


def free_port(host: str, share: tuple[int, int] = (0, 1), *, but: int | None = None) -> int:
    """A port of `host` that nobody listens on, in the i-th of n shares, and not `but`. EngineError when a thousand are taken."""
    index, num_shares = share[0], min(share[1], _MOST_SHARES)
    ports = range(FIRST_PORT + index % num_shares, LAST_PORT + 1, num_shares)
    for _ in range(1000):
        port = secrets.choice(ports)
        if port != but and _is_free(host, port):
            return port
    raise EngineError(f"no port between {FIRST_PORT} and {LAST_PORT} of {host} is free; end what listens there.")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
