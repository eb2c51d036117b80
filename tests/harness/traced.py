"""The kernel's view: every call that changes the disk was announced by `durable.step`, and no other code makes one.

strace records the system calls of a capture and a removal, and makes chosen ones of the real command fail. Fault matrix
rows 6 and 7.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from harness import report, toy

CALL = re.compile(r"^(?P<call>\w+)\((?P<rest>.*)$")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
CHANGING = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,fsync,fdatasync,sync_file_range,"
    "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,truncate,ftruncate,"
    "fallocate,flock,chmod,fchmod,fchmodat,chown,fchown,utimensat,mknod,mknodat,pread64,read"
)
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": "tests", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
ROOT = Path(__file__).parent.parent.parent


def strace(folder: Path, options: list[str], command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command under strace; each of its threads writes its calls to `folder`/calls.<tid>."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        ["strace", "-ff", "-y", "-s", "300", "-o", str(folder / "calls"), *options, *command],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def calls_of(folder: Path) -> list[tuple[str, str, str]]:
    """Return (thread, call, its arguments and result) of everything that strace wrote."""
    found = []
    for path in sorted(folder.glob("calls.*")):
        for line in path.read_text(errors="replace").splitlines():
            if match := CALL.match(line):
                found.append((path.suffix, match["call"], match["rest"]))
    return found


def _path_of(call: str, rest: str) -> str:
    """Return the path that a call acts on: its last name, relative to a folder's descriptor, or its descriptor."""
    names = QUOTED.findall(rest.rpartition(" = ")[0])
    descriptor = re.match(r"(?:\d+|AT_FDCWD)<([^>]*)>", rest)
    if call in ("write", "pwrite64", "read", "pread64") or not names:
        return descriptor[1] if descriptor else ""
    name = names[1] if call.startswith("rename") else names[0]
    return name if name.startswith("/") or descriptor is None else f"{descriptor[1]}/{name}"


def changes(folder: Path, stores: Path) -> list[tuple[str, str]]:
    """Return (kind, path) of every call of a trace that changes something below `stores`, in the words of `durable`."""
    found = []
    for _, call, rest in calls_of(folder):
        path = _path_of(call, rest)
        if not path.startswith(f"{stores}/") and path != str(stores):
            continue
        if call in ("open", "openat"):
            if "O_CREAT" in rest or "O_WRONLY" in rest or "O_RDWR" in rest:
                found.append(("open", path))
        elif call == "fsync":
            found.append(("fsync-folder" if Path(path).suffix == "" and _is_folder(path, rest) else "fsync", path))
        elif call not in ("read", "pread64"):
            found.append((call.removesuffix("at") if call != "pwrite64" else "write", path))
    return found


def _is_folder(path: str, rest: str) -> bool:
    return "/tmp/" not in path and not path.endswith(".lock")  # a file is only ever synced under its temporary name


def unannounced(made: list[tuple[str, str]], steps: list[tuple[str, str]]) -> list[str]:
    """Compare the calls made with the steps announced, by kind and path; return every difference."""
    announced = collections.Counter(steps)
    locks = {path for name, path in steps if name == "lock"}
    trees = tuple(path for name, path in steps if name == "remove-tree")
    bad, counted = [], collections.Counter[tuple[str, str]]()
    for kind, path in made:
        if path in locks and kind in ("open", "flock", "ftruncate", "write"):
            continue  # all of them belong to the lock that was announced
        inside = any(path == tree or path.startswith(f"{tree}/") for tree in trees)
        if kind in ("unlink", "rmdir") and inside:
            continue  # the parts of a tree that was announced
        counted[kind, path] += 1
    for (kind, path), times in counted.items():
        if kind == "write" and announced[kind, path]:  # a file of several buffers takes several
            continue
        if announced[kind, path] != times:
            bad.append(f"{kind} {path}: made {times} times, announced {announced[kind, path]} times")
    for (kind, path), times in announced.items():
        if kind == "write" and counted[kind, path] > times:
            continue
        if kind in ("open", "write", "fsync", "fsync-folder", "rename", "mkdir") and counted[kind, path] != times:
            bad.append(f"{kind} {path}: announced {times} times, made {counted[kind, path]} times")
    return sorted(set(bad))


def compare(folder: Path, *more: str) -> tuple[int, list[str]]:
    """Trace a capture and a removal; return (calls that change the disk, what was not announced)."""
    folder.mkdir()
    home, log = folder / "home", folder / "steps.json"
    done = strace(
        folder / "trace", ["-e", f"trace={CHANGING}"], [sys.executable, "-m", "harness.traced_child", str(home), str(log), *more]
    )
    if done.returncode:
        return 0, [f"the traced process failed: {done.stderr[-500:]}"]
    made = changes(folder / "trace", home / "stores")
    return len(made), unannounced(made, [(name, path) for name, path in json.loads(log.read_text()) if "/home/stores" in path])


def command(home: Path, *arguments: str) -> list[str]:
    """Return the command line of `actstore`, on the stores of a home."""
    return [str(Path(sys.executable).parent / "actstore"), *arguments, "--stores", str(home / "stores")]


def capture_command(home: Path) -> list[str]:
    """Return the real command of the toy capture."""
    asked = toy.request(home)
    options = {"--backend": "toy", "--model": asked.model, "--hook": asked.hooks[0], "--corpus": str(asked.corpus[0])}
    options |= {"--seq-len": str(asked.seq_len), "--batch-tokens": str(asked.batch_tokens)}
    return command(home, "capture", *(word for pair in options.items() for word in pair))


def injectable(folder: Path, below: Path, calls: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return (call, n) for each n at which the n-th such call of every thread that makes as many lies below a folder."""
    threads: dict[str, dict[str, list[bool]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for thread, call, rest in calls_of(folder):
        if call in calls:
            threads[call][thread].append(_path_of(call, rest).startswith(str(below)))
    found = []
    for call, lists in threads.items():
        for n in range(1, max(map(len, lists.values())) + 1):
            if all(inside[n - 1] for inside in lists.values() if len(inside) >= n):
                found.append((call, n))
    return found


def inject(folder: Path, stores: Path, what: list[str], call: str, n: int, error: str) -> list[str] | None:
    """Run a command with its n-th call of a kind failing; return what is wrong: exit code, message, traceback.

    A line of progress can come in between on a busy machine, and be the n-th call instead (of any thread): the command is
    run again then. None when that happens each time: nothing was tested.
    """
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        done = strace(folder, ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={n}"], what)
        hits = [_path_of(made, rest) for _, made, rest in calls_of(folder) if "(INJECTED)" in rest]
        if all(hit.startswith(str(stores)) for hit in hits):
            break
        if call != "pread64":
            shutil.rmtree(stores)  # a capture is injected into from its beginning
    else:
        return None
    bad = []
    if done.returncode != 6:
        bad.append(f"exit code {done.returncode}: {done.stderr[-300:]}")
    if "Traceback" in done.stderr:
        bad.append("a traceback")
    if len(re.findall(r"^(?:StorageFailed|DiskFull): ", done.stderr, re.MULTILINE)) != 1:
        bad.append("not exactly one message")
    return [f"{call} number {n} with {error}: {b}" for b in bad]


def sweep(folder: Path, n: int) -> tuple[int, list[str]]:
    """Let calls of the real commands `capture` and `head` fail, `n` in all; return (how many did, what was wrong)."""
    home = folder / "seen"
    home.mkdir()
    done = strace(folder / "capture", ["-e", f"trace={CHANGING}"], capture_command(home))
    strace(folder / "head", ["-e", "trace=pread64"], command(home, "head", done.stdout.strip()[:8]))
    writing = injectable(folder / "capture", home / "stores", ("fsync", "rename", "mkdir", "write", "unlink", "rmdir"))
    reading = injectable(folder / "head", home / "stores", ("pread64",))
    share = max(1, n // 4)
    reading, writing = (
        chosen[:: max(1, len(chosen) // most)][:most] for chosen, most in ((reading, share), (writing, n - share))
    )
    bad = [] if reading and writing else [f"nothing to inject into: {done.stderr[-300:]}"]
    failed = 0
    for call, at in reading:
        what = command(home, "head", done.stdout.strip()[:8])
        wrong = inject(folder / "injected", home / "stores", what, call, at, "EIO")
        failed, bad = failed + (wrong is not None), bad + (wrong or [])
    for i, (call, at) in enumerate(writing):
        broken = folder / f"broken{i}"
        broken.mkdir()
        wrong = inject(folder / "injected", broken / "stores", capture_command(broken), call, at, ("EIO", "ENOSPC")[i % 2])
        again = subprocess.run(capture_command(broken), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)
        failed, bad = failed + (wrong is not None), bad + (wrong or [])
        if again.returncode or again.stdout != done.stdout:
            bad.append(f"the rerun after {call} number {at}: exit code {again.returncode}: {again.stderr[-300:]}")
    if failed < 0.9 * (len(reading) + len(writing)):
        bad.append(f"only {failed} of {len(reading) + len(writing)} chosen calls could be made to fail")
    return failed, bad


def run(n: int, seed: int = 0) -> report.Result:
    """Compare one traced run with its announced steps, and let `n` calls of the real command fail."""
    report.need_root_tools("strace", root=False)
    result = report.Result("system calls", "a traced call below the stores, or one made to fail in the real command")
    with report.timed(result), report.scratch("traced") as folder:
        made, result.bad = compare(folder / "right")
        if made < 100:
            result.bad.append(f"only {made} calls were seen")
        control, bad = compare(folder / "careless", "careless")
        result.controls["a plain open() below the stores"] = {"n": 1, "bad": int(any("note" in b for b in bad))}
        (folder / "sweep").mkdir()
        injected, bad = sweep(folder / "sweep", n)
        result.bad += bad
        result.n = made + injected
        result.details = {"calls compared": made, "calls made to fail": injected, "calls of the control": control}
    return result


if __name__ == "__main__":
    report.main(run, 8)
