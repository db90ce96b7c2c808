"""What needs no SGLang: the guard of a server's processes, and ports."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.sglang_cpu import cpu_environment
from dapo_megatron.rollout.sglang_server import FIRST_PORT, ServerSpec, SglangServer, free_port
from dapo_megatron.types import EngineError

GUARD = [sys.executable, "-m", "dapo_megatron.rollout.process_guard"]
TREE = ["bash", "-c", "sleep 1000 & echo $! >&2; sleep 1000"]


def guarded(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*GUARD, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def is_gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(*pids: int) -> None:
    end = time.monotonic() + 10
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, f"one of {pids} still runs"
        time.sleep(0.01)


def test_guard_ends_the_whole_tree_when_its_holder_is_killed():
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, time; subprocess.Popen({GUARD + TREE}, stdin=subprocess.PIPE); time.sleep(99)",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stderr
    server, child = int(holder.stdout.readline()), int(holder.stderr.readline())
    assert not is_gone(server) and not is_gone(child)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    wait_until_gone(server, child)
    holder.stdout.close()
    holder.stderr.close()


def test_command_ends_when_its_holder_and_the_holders_children_are_killed():
    """As Ray does it."""
    with guarded("bash", "-c", "sleep 1000") as guard:
        assert guard.stdout and guard.stdin
        server = int(guard.stdout.readline())
        guard.kill()
        guard.stdin.close()
        wait_until_gone(server)


def test_guard_ends_the_children_of_a_command_that_ended_and_has_its_exit_code():
    with guarded("bash", "-c", "sleep 1000 & echo $! >&2; exit 3") as guard:
        assert guard.stderr
        child = int(guard.stderr.readline())
        assert guard.wait(10) == 3
        wait_until_gone(child)


@pytest.mark.parametrize("dies", ["before it knows the pid", "after it said that the command is up"])
def test_command_ends_when_its_holder_does_not_listen_any_more(dies: str, tmp_path: Path):
    started = tmp_path / "pid"
    with guarded(
        "--clean", str(tmp_path / "folder"), "bash", "-c", f"echo $$ > {started}.new; mv {started}.new {started}; sleep 1000"
    ) as guard:
        assert guard.stdin and guard.stdout
        if dies == "before it knows the pid":
            guard.stdout.close()
        else:
            guard.stdout.readline()
            guard.stdout.close()
            guard.stdin.write("up\n")
        end = time.monotonic() + 10
        while not started.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        guard.stdin.close()
        guard.wait(10)
        wait_until_gone(int(started.read_text()))


MAPS = """
import mmap, sys, time
maps = []
for name in sys.argv[1:]:
    with open(name, "w+b") as file:
        file.truncate(4096)
        maps.append(mmap.mmap(file.fileno(), 4096))
print("mapped", file=sys.stderr, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_shared_memory_of_a_command_goes_with_it_and_so_does_its_folder(is_killed: bool, tmp_path: Path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    (folder / "socket").touch()
    own = [Path(f"/dev/shm/{name}_{secrets.token_hex(4)}") for name in ("sgl_shm_mq", "sglang_loads", "sem.mp-test")]
    actors = Path(f"/dev/shm/torch_{secrets.token_hex(4)}")
    try:
        with guarded("--clean", str(folder), sys.executable, "-c", MAPS, *map(str, [*own, actors])) as guard:
            assert guard.stdin and guard.stdout and guard.stderr
            server = int(guard.stdout.readline())
            assert guard.stderr.readline() == "mapped\n"
            guard.stdin.write("up\n")
            assert guard.stdout.readline() == "seen\n"
            assert all(file.exists() for file in (folder, *own, actors))
            if is_killed:
                os.killpg(server, signal.SIGKILL)
            else:
                guard.stdin.close()
            guard.wait(10)
        assert not any(file.exists() for file in (folder, *own)) and actors.exists()
    finally:
        for file in (*own, actors):
            file.unlink(missing_ok=True)


def test_port_in_use_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = ServerSpec(name="engine 0", model_dir=tmp_path, config=SglangEngineConfig(), extra={}, device="cpu", port=port)
        with pytest.raises(EngineError, match=f"engine 0 cannot listen on 127.0.0.1:{port}: the port is in use"):
            SglangServer(spec, tmp_path / "log").start(10)


def test_free_port_can_be_listened_on():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port("127.0.0.1")))


def test_servers_that_start_together_look_for_ports_in_shares_of_their_own():
    found = [{free_port("127.0.0.1", (index, 3)) % 3 for _ in range(20)} for index in range(3)]
    assert all(len(rests) == 1 for rests in found) and len(set.union(*found)) == 3
    assert free_port("127.0.0.1", (4000, 10_000)) != free_port("127.0.0.1", (4001, 10_000))


def test_a_server_gets_two_different_ports(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dapo_megatron.rollout.sglang_server.LAST_PORT", FIRST_PORT + 1)
    monkeypatch.setattr("dapo_megatron.rollout.sglang_server._is_free", lambda host, port: True)
    first = free_port("127.0.0.1")
    assert {first, free_port("127.0.0.1", but=first)} == {FIRST_PORT, FIRST_PORT + 1}


@pytest.mark.skipif(find_spec("sglang") is None, reason="pip install 'dapo-megatron[sglang]'")
def test_server_without_a_gpu_imports_the_models_of_its_type_alone():
    unwanted = cpu_environment("qwen3", 1, 1, {})["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert "qwen3" not in unwanted and {"qwen2", "gemma2", "deepseek_v2"} < set(unwanted)
    assert cpu_environment("deepseek_v3", 1, 1, {})["SGLANG_DISABLED_MODEL_ARCHS"] == "", "its module has another name"


def test_settings_of_a_server_that_did_not_come_up_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They hold its key."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "settings"))
    (tmp_path / "settings").mkdir()
    monkeypatch.setattr("sys.executable", str(tmp_path / "no_python"))
    (tmp_path / "no_python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "no_python").chmod(0o755)
    spec = ServerSpec(name="engine 0", model_dir=tmp_path, config=SglangEngineConfig(), extra={}, device="cpu")
    with pytest.raises(EngineError, match="engine 0 could not be started"):
        SglangServer(spec, tmp_path / "log").start(10)
    assert list((tmp_path / "settings").iterdir()) == []
