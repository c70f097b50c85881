"""Commands of loramox as children of this process, in their own folder: left alone, killed, on a full disk, two at once."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil

from loramox.cli import main

CPU_SECONDS, WALL_SECONDS, MEMORY = 30, 300, 4 << 30  # for one command; more is a hang, or a file read without a limit
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What is killed of a command under torchrun, and how.
VICTIMS = {
    "torchrun": signal.SIGKILL,
    "one of its processes": signal.SIGKILL,
    "all of them": signal.SIGKILL,
    "torchrun, by SIGTERM,": signal.SIGTERM,
}
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}


class Ended(NamedTuple):
    code: int  # below 0: the signal
    said: str
    operations: int  # on files in its folder
    seconds: float  # of CPU

    def fault(self) -> str | None:
        """The fault, if the command ended as none may."""
        last = (self.said.strip().splitlines() or [""])[-1][:160]
        if "Traceback (most recent call last)" in self.said:
            return f"traceback: {last}"
        if "memory ran out" in self.said:
            return f"memory: {last}"
        hung = self.code in (-signal.SIGXCPU, -signal.SIGALRM)
        return "hang" if hung else f"exit code {self.code}: {last}" if self.code not in (0, 1, 2) else None


@dataclass
class Disturbance:
    """What happens to a command. Operations are those on files in its folder, counted from 1; 0: at none of them."""

    kill_at: int = 0  # operation
    kill_after: float = 0.0  # seconds of CPU
    full_at: int = 0  # operation from which no file can be opened for writing, as on a full disk
    largest: int = 0  # bytes of a file: the disk fills up within one


def run(folder: Path, words: str, disturbance: Disturbance | None = None) -> Ended:
    return wait(folder, start(folder, words, disturbance))


def start(folder: Path, words: str, disturbance: Disturbance | None = None, **environment: str) -> int:
    """The process that runs a command."""
    child = os.fork()
    if not child:
        os.environ |= environment
        _obey(folder, words.split(), disturbance or Disturbance())
    return child


def wait(folder: Path, child: int) -> Ended:
    _, status, used = os.wait4(child, 0)
    counted = folder / f".operations-{child}"
    operations = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    said = (folder / f".said-{child}").read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), said, operations, used.ru_utime + used.ru_stime)


def run_two(folder: Path, words: str, kill_after: float = 0.0, random: Random | None = None) -> Ended:
    """Run a command in two processes. Like torchrun, end the other when one fails; one of them may be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    victim = random.randrange(2) if random else 0
    children = [
        start(
            folder,
            words,
            Disturbance(kill_after=kill_after if rank == victim else 0.0),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **both,
        )
        for rank in range(2)
    ]
    running = set(children)
    while running:
        for child in sorted(running):
            done = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if done is None:
                continue
            running.discard(child)
            for other in running if done.si_status else ():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    ended = [wait(folder, child) for child in children]
    # One that torchrun ended says nothing; of the others the one that failed.
    worst = min(
        ended, key=lambda each: (each.code != -signal.SIGPROF, each.fault() is None, each.code == 0, each.code < 0)
    )
    return worst._replace(seconds=max(each.seconds for each in ended))


def torchrun(folder: Path, words: str, victim: str = "", moment: str = "") -> Ended:
    """Run a command in two processes of torchrun. One of `VICTIMS` is killed as soon as the file `moment` is in the folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "loramox"]
    with (folder / ".said-torchrun").open("w+", errors="replace") as said:
        agent = psutil.Popen([*launcher, *words.split()], cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        until = time.monotonic() + WALL_SECONDS
        while victim and agent.poll() is None and not (folder / moment).exists() and time.monotonic() < until:
            time.sleep(0.002)
        workers = agent.children(recursive=True) if victim and agent.poll() is None else []
        if workers:
            victims = {"one of its processes": workers[:1], "all of them": [*workers, agent]}
            for process in victims.get(victim, [agent]):
                process.send_signal(VICTIMS[victim])
        for each in psutil.wait_procs([agent], timeout=WALL_SECONDS)[1]:
            each.kill()
        # What torchrun leaves behind when it is killed ends by itself, or waits for it for ever.
        for each in psutil.wait_procs(workers, timeout=30)[1]:
            each.kill()
        psutil.wait_procs(workers)
        said.seek(0)
        return Ended(agent.wait(), said.read(), 0, 0.0)


def _obey(folder: Path, words: list[str], disturbance: Disturbance) -> None:
    os.chdir(folder)
    said = os.open(f".said-{os.getpid()}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = ["loramox", *words]
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if disturbance.largest:  # Python ignores the signal, and the write fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.largest, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, disturbance.kill_after)  # nothing handles SIGPROF: it kills like SIGKILL
    seen, ended = 0, False

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if (
            event in OPERATIONS
            and not ended
            and isinstance(args[0], str | os.PathLike)
            and (event != "open" or (args[2] or 0) & WRITES)
            and os.path.abspath(args[0]).startswith(str(folder))
        ):
            seen += 1
            if seen == disturbance.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if 0 < disturbance.full_at <= seen and event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    if not disturbance.kill_after:
        sys.addaudithook(watch)
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        traceback.print_exc()
    ended = True
    Path(f".operations-{os.getpid()}").write_text(str(seen))
    os._exit(code)
