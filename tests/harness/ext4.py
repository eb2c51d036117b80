"""Real power losses: ext4 in a file, shut down by ioctl without flushing its log, mounted again. Fault matrix row 3."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import kills, report, toy
from harness.process import count_steps, kill_at
from harness.sizes import mounted

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs/ext4/ext4.h
NO_LOG_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: the journal in memory is lost too, as with the power
IMAGE_BYTES = 64 << 20
OPTIONS = "loop,commit=300"  # the journal is not committed by a timer meanwhile, only by fsync


def cut_power(disk: Path) -> None:
    """Stop a mounted ext4 at once; what is not on its disk is gone."""
    descriptor = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))


def one(image: Path, disk: Path, job: kills.Job, step: int, expected: toy.Expected, *, fsync: bool = True) -> list[str]:
    """Run a job on the disk, cut the power at a step, mount again; return what is wrong then and after a rerun."""

    def work(tell: Callable[[Any], None]) -> None:
        if not fsync:
            os.fsync = lambda descriptor: None  # type: ignore[assignment]
        with toy.commits_reported(tell):
            job.run(disk / "home")

    with mounted(disk, OPTIONS, str(image)):
        subprocess.run(["rm", "-rf", str(disk / "home")], check=True)
        job.prepare(disk / "home")
        toy.request(disk / "home")
        os.sync()  # the corpus and what the job starts from were there before
        killed, reported = kill_at(step, work, before=lambda: cut_power(disk))
    with mounted(disk, OPTIONS, str(image)):
        bad = [] if killed else ["the step was not reached"]
        bad += job.survives(disk / "home", reported, expected)
        bad += job.finished(disk / "home", job.run, [] if bad else reported, expected)
    return [f"power cut at step {step}: {b}" for b in bad]


def run(n: int, seed: int = 0) -> report.Result:
    """Cut the power `n` times: over captures of one and two hook points and a removal; and in a control without fsync."""
    report.need_root_tools("mkfs.ext4", "mount", "umount", "losetup")
    result = report.Result("power losses", "ext4 shut down without log flush at a step, mounted again")
    toy.start()
    toy.no_reserve()
    rng = random.Random(seed)
    with report.timed(result), report.scratch("ext4") as scratch:
        image, disk = scratch / "image", scratch / "disk"  # the image in memory: what ext4 has written is on its disk
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-I", "256", str(image)], check=True)
        for name, share in {"capture": 5, "capture of two hook points": 2, "remove a sealed store": 1}.items():
            job = kills.JOBS[name]
            home = scratch / name
            job.reference(home / "reference")
            expected = toy.expected_of(home / "reference")
            job.prepare(home / "count")
            steps = count_steps(lambda job=job, home=home: job.run(home / "count"))
            wanted = max(1, n * share // 8)
            at = [s for _ in range(wanted // steps) for s in range(steps)]
            at += sorted(rng.sample(range(steps), wanted % steps))
            for step in at:
                result.bad += [f"{name}: {b}" for b in one(image, disk, job, step, expected)]
            result.n += len(at)
            result.details[name] = {"steps": steps, "cuts": len(at)}
            if name == "capture":
                wrong = [one(image, disk, job, step, expected, fsync=False) for step in range(steps - 1, 30, -steps // 8)]
                result.controls["fsync off"] = {"n": len(wrong), "bad": sum(map(bool, wrong))}
    return result


if __name__ == "__main__":
    report.main(run, 160)
