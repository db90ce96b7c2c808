"""A real Slurm cluster on this machine, for as long as the process that started it lives.

A node is a network, host name, mount and process namespace with a slurmd of its own: node 2 is `node2`, 10.x.y.2, has its own
/tmp, /dev/shm and processes, and shares every other folder. The controller has a network namespace too, so no port of the
machine is taken; sbatch and squeue work from here. Clusters of several processes live side by side.

    python -m tests.slurm.cluster      one to play with, until Ctrl-C
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
NAMESPACES = Path("/run/netns")
ROOT = Path("/var/tmp")
"""Folder of the clusters: on a disk, seen by all nodes."""
PREFIX = "slurm-test-"
TAG = "slt"
"""Names of namespaces and links begin with it and the process that they belong to, in hexadecimal."""
OWNER = "owner"
"""File in the folder of a cluster: when that process began, so that another one of its number is not taken for it."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare", "setpriv")
NUM_NODES = 4
START_SECONDS = 30
REPEATABLE = ("scontrol", "squeue", "sinfo", "scancel")
REVOKED = timedelta(seconds=2)
"""After a requeue: how long nodes may still refuse the job."""
CONTROLLER = 254
HOST = 253
"""Last parts of addresses; a node has its number."""

DYING_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root, for network namespaces"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(missing)} not found: apt-get install --no-install-recommends slurm-wlm munge iproute2"
    namespaces = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
    command = [*namespaces, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """The running cluster: jobs in, states out, and nodes to break."""

    def __init__(self, folder: Path, tag: str):
        self.folder, self._tag = folder, tag
        self.shared = folder / "shared"
        """A folder that all nodes see under this path, unlike /tmp."""
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def run(self, *command: str | Path, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command on this machine, which is the login node. AssertionError with what it said when it fails, unless `check` is off.

        On a busy machine the controller may hang up on a client; what can be said twice is then said again.
        """
        for attempt in range(10):
            done = subprocess.run(
                [str(part) for part in command],
                env=self.environment,
                cwd=cwd or self.shared,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            was_cut_off = done.returncode == -signal.SIGPIPE or (done.returncode and "ocket" in done.stderr)
            if command[0] not in REPEATABLE or not was_cut_off or attempt == 9:
                break
            time.sleep(1)
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def sbatch(self, *arguments: str | Path) -> str:
        """Submit; the job's id."""
        return self.run("sbatch", "--parsable", *arguments).stdout.strip().partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job or of an array's element, `17_2`."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).stdout.splitlines()[0].split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def state(self, job: str) -> str:
        """`RUNNING`, `COMPLETED` ..."""
        return self.job(job)["JobState"]

    def wait(self, job: str, *states: str, seconds: float = 60, until: Callable[[], bool] | None = None) -> str:
        """Until the job is in one of the states, or `until` is true; the state. Holds after a requeue, of all jobs, are lifted meanwhile.

        Slurm holds a requeued job back for two minutes and has no setting for it: within the second of the requeue, a node that had the
        job refuses it (`Job credential revoked`).
        """
        deadline = time.monotonic() + seconds
        while True:
            now = self.job(job)
            if now["JobState"] in states or (until is not None and until()):
                return now["JobState"]
            ended = now["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
            if time.monotonic() > deadline or ended:
                raise AssertionError(
                    f"job {job} is {now['JobState']} ({now.get('Reason')}), wanted {states or 'a condition'}; "
                    f"its output:\n{self.output(job)}"
                )
            self._lift_holds()
            time.sleep(0.1)

    def _lift_holds(self) -> None:
        pending = self.run("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i %V %r").stdout.splitlines()
        for job, queued, reason in (line.split(maxsplit=2) for line in pending):
            if reason == "BeginTime" and datetime.now() - datetime.fromisoformat(queued) > REVOKED:
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)  # it may just have begun

    def output(self, job: str) -> str:
        """What the job has written so far."""
        file = Path(self.job(job).get("StdOut", "/dev/null"))
        return file.read_text(errors="replace") if file.is_file() else f"({file} does not exist)"

    def power_off(self, node: int) -> None:
        """Every process of the node is gone at once. Slurm notices after 10 to 15 s."""
        holder = self._nodes.pop(node)
        holder.kill()
        holder.wait()

    def power_on(self, node: int) -> None:
        """Start the node, for the first time or again."""
        visible = [str(path) for path in _needed_below_tmp(self.folder)]
        with (self.folder / "log" / f"node{node}.log").open("ab") as log:
            self._nodes[node] = subprocess.Popen(
                [
                    *(*DYING_WITH_US, "nsenter", f"--net=/run/netns/{self._tag}{node}"),
                    *(
                        "unshare",
                        "--mount",
                        "--uts",
                        "--pid",
                        "--fork",
                        "--kill-child",
                        "--mount-proc",
                        "--propagation",
                        "private",
                    ),
                    *("bash", str(HERE / "node.sh"), str(self.folder), f"node{node}", *visible),
                ],
                env={name: value for name, value in self.environment.items() if name != "TMPDIR"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def restore(self) -> None:
        """Nodes that are off are started, cables are plugged in; back when every node is idle."""
        for node in range(1, NUM_NODES + 1):
            self.plug(node)
            if node not in self._nodes:
                self.power_on(node)
        self.wait_idle()

    def on_node(self, node: int, *command: str) -> str:
        """Run a command there, past Slurm; its output."""
        return self.run("nsenter", "-t", str(self._init_of(node)), "-m", "-u", "-n", "-p", "--", *command).stdout

    def unplug(self, node: int) -> None:
        """Pull the network cable."""
        self.run("ip", "link", "set", f"{self._tag}v{node}", "down")

    def plug(self, node: int) -> None:
        """Put it back."""
        self.run("ip", "link", "set", f"{self._tag}v{node}", "up")

    def wait_idle(self) -> None:
        """Until every node takes jobs and has none."""
        deadline = time.monotonic() + START_SECONDS
        while self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False).stdout.split() != ["idle"] * NUM_NODES:
            if time.monotonic() > deadline:
                nodes = self.run("sinfo", "-N", "-l", check=False)
                logs = (f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in (self.folder / "log").iterdir())
                raise AssertionError("\n".join((nodes.stdout, nodes.stderr, *logs)))
            time.sleep(0.05)

    def _init_of(self, node: int) -> int:
        holder = self._nodes[node].pid
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text())

    def stop_nodes(self) -> None:
        """All of them, at once."""
        for node in tuple(self._nodes):
            self.power_off(node)


@contextmanager
def cluster(*, kill_wait: int = 30) -> Iterator[Cluster]:
    """Start a cluster of four idle nodes; on leaving, nothing of it is left. `kill_wait`: seconds between SIGTERM and SIGKILL."""
    clear_away_abandoned()
    tag, folder = _tag_of(os.getpid()), _folder_of(os.getpid())
    with ExitStack() as undo:
        undo.callback(_remove, os.getpid())
        folder.mkdir()
        (folder / OWNER).write_text(start_of(os.getpid()) or "")
        for name in ("munge", "state", "spool", "dev", "tmp", "log", "shared"):
            (folder / name).mkdir(parents=True)
        network = _make_network(tag)
        _write_configuration(folder, network, kill_wait)
        it = Cluster(folder, tag)
        munge = folder / "munge"
        _daemon(
            undo,
            folder / "log" / "munged.log",
            *("munged", "--foreground", "--force", f"--key-file={munge / 'key'}", f"--socket={munge / 'socket'}"),
            *(f"--pid-file={munge / 'pid'}", f"--seed-file={munge / 'seed'}", f"--log-file={folder / 'log' / 'munged-own.log'}"),
        )
        controller = f'hostname ctl; exec slurmctld -D -i -f "{folder}/slurm.conf"'
        _daemon(
            undo,
            folder / "log" / "slurmctld-output.log",
            *("nsenter", f"--net=/run/netns/{tag}0", "unshare", "--uts", "--", "sh", "-c", controller),
        )
        undo.callback(it.stop_nodes)
        for node in range(1, NUM_NODES + 1):
            it.power_on(node)
        it.wait_idle()
        yield it


def _needed_below_tmp(folder: Path) -> list[Path]:
    """What jobs need and would not see, as a node has its own /tmp: the checkout and the interpreter, where they lie there."""
    wanted = {REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), folder}
    below = sorted(path for path in wanted if path.is_relative_to("/tmp"))
    return [path for path in below if not any(path != other and path.is_relative_to(other) for other in below)]


def _make_network(tag: str) -> str:
    """A bridge, and a namespace for each node and for the controller; the first three parts of the addresses."""
    taken = _ip("-o", "-4", "address")
    start = os.getpid()
    network = next(net for k in range(start, start + 2500) if f"{(net := f'10.{100 + k % 100}.{k // 100 % 250}')}." not in taken)
    _ip("link", "add", f"{tag}b", "type", "bridge", "forward_delay", "0")
    _ip("address", "add", f"{network}.{HOST}/24", "dev", f"{tag}b")
    _ip("link", "set", f"{tag}b", "up")
    for node in range(NUM_NODES + 1):
        _ip("netns", "add", f"{tag}{node}")
        _ip("link", "add", f"{tag}v{node}", "type", "veth", "peer", "name", "eth0", "netns", f"{tag}{node}")
        _ip("link", "set", f"{tag}v{node}", "master", f"{tag}b", "up")
        _ip("-n", f"{tag}{node}", "address", "add", f"{network}.{node or CONTROLLER}/24", "dev", "eth0")
        _ip("-n", f"{tag}{node}", "link", "set", "lo", "up")
        _ip("-n", f"{tag}{node}", "link", "set", "eth0", "up")
    return network


def _write_configuration(folder: Path, network: str, kill_wait: int) -> None:
    names = {f"node{node}": f"{network}.{node}" for node in range(1, NUM_NODES + 1)}
    hosts = {"localhost": "127.0.0.1", "ctl": f"{network}.{CONTROLLER}", os.uname().nodename: f"{network}.{HOST}"} | names
    lines = [f"{address} {name}" for name, address in hosts.items()]
    lines += [f"::ffff:{address} {name}" for name, address in names.items()]  # how torch looks a peer's name up
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    gpus = 8
    for gpu in range(gpus):  # slurmd takes nothing but character devices for GPUs
        os.mknod(folder / "dev" / f"nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Type=fake File={folder}/dev/nvidia[0-{gpus - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    text = Template((HERE / "slurm.conf").read_text()).substitute(
        name=f"test{os.getpid()}",
        folder=folder,
        network=network,
        nodes="\n".join(f"NodeName=node{k} NodeAddr={network}.{k} Weight={k}" for k in range(1, NUM_NODES + 1)),
        cpus=16,  # said, not had
        memory_mib=64000,
        gpus=gpus,
        kill_wait=kill_wait,
    )
    (folder / "slurm.conf").write_text(text)


def _daemon(undo: ExitStack, log: Path, *command: str) -> None:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*DYING_WITH_US, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    undo.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def _tag_of(pid: int) -> str:
    return f"{TAG}{pid:x}-"


def _folder_of(pid: int) -> Path:
    return ROOT / f"{PREFIX}{pid}"


def start_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _remove(pid: int) -> None:
    """Namespaces, links and files of a process, whichever exist."""
    tag = _tag_of(pid)
    commands: Sequence[tuple[str, ...]] = [
        *(("link", "del", f"{tag}v{node}") for node in range(NUM_NODES + 1)),
        *(("netns", "del", f"{tag}{node}") for node in range(NUM_NODES + 1)),
        ("link", "del", f"{tag}b"),
    ]
    for command in commands:
        subprocess.run(["ip", *command], capture_output=True, check=False)
    shutil.rmtree(_folder_of(pid), ignore_errors=True)


def clear_away_abandoned() -> None:
    """What processes that were killed left: their daemons died with them. Clusters of those that live stay."""
    pids = {int(folder.name.removeprefix(PREFIX)) for folder in ROOT.glob(f"{PREFIX}*")}
    names = [re.fullmatch(rf"{TAG}([0-9a-f]+)-\d", path.name) for path in NAMESPACES.glob(f"{TAG}*")]
    for pid in pids | {int(name[1], 16) for name in names if name}:
        if not _lives(pid):
            _remove(pid)


def _lives(pid: int) -> bool:
    """Whether the process that started a cluster is there; one that begins right now may not have said when it began."""
    started, owner = start_of(pid), _folder_of(pid) / OWNER
    return started is not None and (not owner.is_file() or owner.read_text() in ("", started))


def main() -> None:
    """A cluster until Ctrl-C."""
    with cluster() as it:
        print(
            f"export SLURM_CONF={it.folder}/slurm.conf\n# a folder that all nodes see: {it.shared}\n# Ctrl-C ends it", flush=True
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            signal.pause()
