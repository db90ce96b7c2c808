"""How the tasks of a job find each other, talk, and part.

The head (task 0) listens on a private address and writes address, port and a secret of this attempt into a file of the run folder, which
only its user can read. Every other task connects and says who it is; from then on both sides send one JSON object a line.
The connection is the lifeline: a node that hears the end of it ends what it has started and leaves. Keep-alive notices a head that
lost its power.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dapo_megatron.launcher.slurm.network import is_free
from dapo_megatron.types import BadNodeError

_HELLO_SECONDS = 10.0
_POLL_SECONDS = 0.1
_MAX_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the head listens, and the secret of this attempt: Ray's token too."""

    address: str
    port: int
    secret: str


_MEETING = TypeAdapter(Meeting)


class Line:
    """One side of a connection."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 5)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._reader = connection, connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """OSError when the other side is gone."""
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None when the other side is gone. TimeoutError."""
        self._connection.settimeout(timeout_seconds)
        try:
            line = self._reader.readline(_MAX_LINE_BYTES)
        except TimeoutError:
            raise
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        """Part; the other side hears it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Head:
    """Task 0's side: listens until `close`."""

    def __init__(self, file: Path, address: str, ports: Sequence[int]):
        """Listen on the first free port and invite by `file`. BadNodeError when there is none."""
        port = next((port for port in ports if is_free(address, port)), None)
        if port is None:
            raise BadNodeError(
                f"no port of {address} between {ports[0]} and {ports[-1]} is free; set slurm.first_port and last_port."
            )
        self._socket = socket.create_server((address, port), backlog=1024)
        self.meeting = Meeting(address, port, secrets.token_hex(32))
        self._lines: dict[int, Line] = {}
        self._hellos: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._accept, name="meeting", daemon=True)
        self._thread.start()
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
        with os.fdopen(descriptor, "w") as handle:
            handle.write(json.dumps(asdict(self.meeting)))
        os.rename(temporary, file)

    def hellos(self, tasks: Collection[int], deadline_seconds: float) -> dict[int, dict[str, Any]]:
        """What each task said first; at the deadline, of those that came. `heard` is when, by our clock."""
        with self._changed:
            self._changed.wait_for(lambda: self._hellos.keys() >= set(tasks), deadline_seconds)
            return dict(self._hellos)

    def tell_all(self, message: Mapping[str, Any]) -> None:
        """To every task that is there."""
        for line in list(self._lines.values()):
            with suppress(OSError):
                line.send(message)

    def answers(self, timeout_seconds: float) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """One message of each task; and of those without one, by task, what became of them."""
        deadline = time.monotonic() + timeout_seconds
        found: dict[int, dict[str, Any]] = {}
        silent: dict[int, str] = {}
        for task, line in sorted(self._lines.items()):
            try:
                answer = line.receive(max(deadline - time.monotonic(), 0.01))
            except TimeoutError:
                silent[task] = f"did not answer within {timeout_seconds:g} s"
                continue
            if answer is None:
                silent[task] = "left before it answered; see its lines above"
            else:
                found[task] = answer
        return found, silent

    def close(self) -> None:
        """Part from all; they leave. Closing twice is harmless."""
        self._file.unlink(missing_ok=True)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for line in self._lines.values():
            line.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        line = Line(connection)
        try:
            hello = line.receive(_HELLO_SECONDS)
        except (TimeoutError, ValueError):
            hello = None
        if not isinstance(hello, dict) or not hmac.compare_digest(str(hello.pop("secret", "")), self.meeting.secret):
            line.close()
            return
        hello["heard"] = time.time()
        with self._changed:
            self._lines[hello["task"]], self._hellos[hello["task"]] = line, hello
            self._changed.notify_all()


def find_meeting(file: Path, deadline_seconds: float) -> Meeting:
    """Wait for the head's invitation. BadNodeError when it does not come."""
    end = time.monotonic() + deadline_seconds
    while time.monotonic() < end:
        _refresh(file.parent)
        with suppress(FileNotFoundError, ValidationError):
            return _MEETING.validate_json(file.read_bytes())
        time.sleep(_POLL_SECONDS)
    raise BadNodeError(
        f"{file} did not appear within {deadline_seconds:g} s: the first node of the job is not up, or this node does not see the run folder."
    )


def join(meeting: Meeting, task: int, hello: Mapping[str, Any], deadline_seconds: float) -> Line:
    """Connect and say who we are. BadNodeError when the head cannot be reached."""
    end = time.monotonic() + deadline_seconds
    while True:
        try:
            line = Line(socket.create_connection((meeting.address, meeting.port), timeout=5))
            line.send({**hello, "secret": meeting.secret, "task": task})
            return line
        except OSError as error:
            if time.monotonic() > end:
                raise BadNodeError(
                    f"the first node of the job cannot be reached at {meeting.address}:{meeting.port} ({error}); see whether a firewall is "
                    "between the nodes."
                ) from None
            time.sleep(_POLL_SECONDS)


def _refresh(folder: Path) -> None:
    """Have a network file system look again: it remembers for up to a minute that a file was not there, until the folder changes."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".look."):
        pass
