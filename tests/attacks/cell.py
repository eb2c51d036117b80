"""Where an attack is carried out: a forked process with little memory and time, and canaries around it.

A victim is a folder with two sealed toy stores, a finished run, a corpus and a config file. An attack makes a copy of
it hostile and names the command that a person would run on it. That command must end with exactly one of our errors.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY_BYTES = 100_000_000
CPU_SECONDS = 1.0
WALL_SECONDS = 60  # lenient: the machine may be loaded; a FIFO that blocks would block for good
CANARY = "canary-5d41402abc4b2a76b9719d911017c592"


@dataclass(frozen=True)
class Attack:
    """One hostile input.

    Args:
        name: group and what is done.
        build: makes a victim hostile.
        error: class that the command must end with.
        code: its exit code.
        command: program and arguments; {store}, {twin} and {run} stand for digests.
        cpu_seconds: processor time it may take.
    """

    name: str
    build: Callable[[Victim], None]
    error: str
    code: int
    command: tuple[str, ...]
    cpu_seconds: float = CPU_SECONDS


@dataclass(frozen=True)
class Victim:
    """A copy of the victim's folder, and the digests in it."""

    home: Path
    digests: dict[str, str]

    @property
    def store(self) -> Path:
        """The store that is attacked."""
        return self.home / "stores" / self.digests["store"]

    @property
    def twin(self) -> Path:
        """Another sealed store of the same size."""
        return self.home / "stores" / self.digests["twin"]

    @property
    def run(self) -> Path:
        """A finished run."""
        return self.home / "runs" / self.digests["run"]

    @property
    def secret(self) -> Path:
        """A file outside that nobody may read; it has the size of a chunk, so that only its being a link gives it away."""
        return self.home.parent / "outside" / "secret"

    @property
    def marker(self) -> Path:
        """A file outside that comes to be if anything in a payload is executed."""
        return self.home.parent / "outside" / "executed"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str
    cpu_seconds: float
    complaints: list[str]


def prepare(template: Path, work: Path, digests: dict[str, str]) -> Victim:
    """Copy the template victim into `work/home`, writable, with canaries beside it."""
    victim = Victim(work / "home", digests)
    shutil.copytree(template, victim.home, symlinks=True)
    for path in (victim.home, *victim.home.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    victim.secret.parent.mkdir()
    size = (victim.store / "acts/c.0.0").stat().st_size
    victim.secret.write_text((CANARY + "\n") * 400)
    os.truncate(victim.secret, size)
    os.utime(victim.secret, (0, time.time()))  # with relatime, the first read moves the access time
    return victim


def carry_out(attack: Attack, victim: Victim) -> Outcome:
    """Build an attack, run its command in a forked process, and look at what came of it."""
    attack.build(victim)
    before = tree(victim.home.parent)
    names = {**victim.digests, "home": str(victim.home)}
    command = [part.format(**names) if "{" in part else part for part in attack.command]
    code, out, err, cpu = in_cell(victim.home, command)
    complaints = judge(attack, code, out, err, cpu)
    allowed = re.compile(r"home/(stores/\.locks|stores/\.staging|runs/\.locks|cpu|stdout|stderr|stores$|runs$)")
    complaints += [f"made {name}" for name in sorted(tree(victim.home.parent) - before) if not allowed.match(name)]
    if victim.secret.stat().st_atime > 1:
        complaints.append("the secret file was read")
    if victim.marker.exists():
        complaints.append("a payload was executed")
    return Outcome(code, out, err, cpu, complaints)


def tree(folder: Path) -> set[str]:
    """Return the names of everything below a folder, links not followed."""
    found = set()
    for top, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(top, name), folder) for name in (*folders, *files)}
    return found


def in_cell(home: Path, command: list[str]) -> tuple[int, str, str, float]:
    """Run a command line in a forked process; return its exit status, output and processor time."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(home)
            for number, name in ((1, "stdout"), (2, "stderr")):
                descriptor = os.open(home / name, os.O_WRONLY | os.O_CREAT, 0o644)
                os.dup2(descriptor, number)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WALL_SECONDS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES,) * 2)
            started = time.process_time()
            code = call(command)
            sys.stdout.flush()
            os.write(os.open(home / "cpu", os.O_WRONLY | os.O_CREAT), f"{time.process_time() - started:.3f}".encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    out, err = ((home / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    cpu = float((home / "cpu").read_text()) if (home / "cpu").exists() else float(WALL_SECONDS)
    return os.waitstatus_to_exitcode(status), out, err, cpu


def call(command: list[str]) -> int:
    """Run `actstore …` or `trainer …` (or, in a control, a Python function) in this process; return the exit code."""
    from actstore_cli.actstore import main as actstore
    from actstore_cli.trainer import main as trainer

    try:
        {"actstore": actstore, "trainer": trainer, **CONTROLS}[command[0]](command[1:])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def judge(attack: Attack, code: int, out: str, err: str, cpu: float) -> list[str]:
    """Return what is wrong with how a command ended."""
    complaints = []
    errors = re.findall(r"^([A-Z]\w+): ", err, re.MULTILINE)
    if code != attack.code:
        complaints.append(f"exit code {code}, not {attack.code}")
    if errors != [attack.error]:
        complaints.append(f"errors {errors}, not one {attack.error}")
    if "Traceback" in err:
        complaints.append("a traceback")
    if cpu > attack.cpu_seconds:
        complaints.append(f"{cpu:.2f} s of processor time")
    if CANARY in out + err:
        complaints.append("the secret was printed")
    return complaints


def _careless(arguments: list[str]) -> None:
    """Control: reads through the link, says what it read, and trusts a pickle."""
    import pickle

    print(Path(arguments[0]).read_text())
    pickle.loads(Path(arguments[1]).read_bytes())


def _greedy(arguments: list[str]) -> None:
    """Control: takes more memory than allowed."""
    bytearray(3 * MEMORY_BYTES)


def _slow(arguments: list[str]) -> None:
    """Control: takes more time than allowed."""
    while time.process_time() < CPU_SECONDS + 0.5:
        sum(range(10**5))


CONTROLS: dict[str, Callable[[list[str]], None]] = {"careless": _careless, "greedy": _greedy, "slow": _slow}
