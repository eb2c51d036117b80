"""Kill -9 at random times: the real command line on the embedded real model. Fault matrix row 2.

TransformerLens is imported once, in this process, which computes nothing; every command runs in a child of its own, so
that the kills fall on its work and not on seconds of imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformer_lens  # noqa: F401 - see above
from actstore_cli.actstore import main as command

from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from harness import report, toy
from harness.process import in_child

ROOT = Path(__file__).parent.parent.parent
HOOK = "blocks.2.hook_resid_pre"


def arguments(home: Path) -> list[str]:
    """Return the arguments of a capture of a few thousand rows with the embedded model."""
    corpus = home / "corpus.jsonl"
    if not corpus.exists():
        home.mkdir(parents=True)
        texts = [path.read_text() for path in sorted((ROOT / "actstore").glob("*.py"))]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["capture", "--model", str(ROOT / "data" / "tiny-gpt2"), "--hook", HOOK, "--corpus", str(corpus), "--rows", "12000",
            "--seq-len", "64", "--batch-tokens", "512", "--stores", str(home / "stores")]  # fmt: skip


def capture(home: Path, delay_s: float | None = None) -> tuple[int, float, list[Any]]:
    """Run the command in a child, killed after `delay_s`; return (wait status, seconds, row groups reported)."""
    start = time.monotonic()

    def work(tell: Any) -> None:
        torch.set_num_threads(1)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        if delay_s is not None:
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
            _kill_in(delay_s)
        with toy.commits_reported(tell), contextlib.suppress(SystemExit):
            command(arguments(home), standalone_mode=False)

    status, told = in_child(work)
    return status, time.monotonic() - start, told


def _kill_in(delay_s: float) -> None:
    """Fork a process that kills this one after a delay; it takes nothing else from it."""
    victim = os.getpid()
    if os.fork() == 0:
        os.closerange(3, 256)  # the pipe too: its reader waits for the last end to close
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


def run(n: int, seed: int = 0) -> report.Result:
    """Kill the command `n` times after seeded delays, several kills a capture, and finish each capture."""
    result = report.Result("random kills", "SIGKILL of the real command with a real model after a random time")
    toy.actstore.manifest.MAX_CHUNK_BYTES = 1024 * 192 * 4  # row groups of 1,024 rows: a dozen
    rng = random.Random(seed)
    with report.timed(result), report.scratch("random") as folder:
        status, whole_s, _ = capture(folder / "reference")
        expected = toy.expected_of(folder / "reference")
        if status or not expected.content:
            result.bad.append(f"the reference failed: {status}")
            return result
        reported: list[Any] = []
        home, kills_here, committed = folder / "home0", 0, 0
        while result.n < n or (not committed and result.n < 4 * n):  # on a busy machine early kills may all fall on the start
            status, _, told = capture(home, rng.uniform(0.1, 0.9) * whole_s)
            reported += told
            committed += len(told)
            result.n += 1
            kills_here += os.WIFSIGNALED(status)
            result.bad += toy.lost(home, reported, expected) + toy.states(home, expected)
            if kills_here == 3 or not os.WIFSIGNALED(status) or result.n >= n:
                status, _, _ = capture(home)
                result.bad += [f"the rerun ended with status {status}"] if status else []
                for line in list_stores(home / "stores"):
                    store = open_store(line.digest, home / "stores")
                    result.bad += check_store(store.path, data=True).findings
                    if store.content_digest != expected.content[line.digest]:
                        result.bad.append("another content digest")
                home, kills_here, reported = folder / f"home{result.n}", 0, []
        result.details = {"seconds of a whole run": round(whole_s, 1), "row groups committed before a kill": committed}
    return result


if __name__ == "__main__":
    report.main(run, 6)
