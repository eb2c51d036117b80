"""Ranks: the processes of one fit, started by torchrun or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

A fit of one process has `ALONE`: every operation is then the identity, so the code that trains reads the same for both.
No wait is endless: each ends after the time-out in RankLost, which says what was waited for and which rank does not answer.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from actstore.errors import RankLost, UsageError

Parallel = Literal["auto", "fleet", "data", "latents"]
BEAT_SECONDS = 0.5  # between two signs of life
GRACE_SECONDS = 3.0  # without one, and a process is gone
START_SECONDS = 60.0  # that ranks have to come at least: importing torch from a network disk takes a while


class Signs:
    """Signs of life of the ranks, beside their collectives: a thread leaves one every half second, as long as the process lives.

    Args:
        store: torch.distributed's, where they are left.
        rank: of this process.
        world: how many there are.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._gone: list[int] = []  # what some rank has found out
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="actstore-signs", daemon=True)

    def _live(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: rank 0 has it, unless torchrun does
            while not self._ended.wait(BEAT_SECONDS):
                self.store.set(f"actstore/beat/{self.rank}", str(count := count + 1))
                if not self._gone and self.store.check(["actstore/gone"]):
                    self._gone = [int(rank) for rank in self.store.get("actstore/gone").decode().split()]

    def meet(self, seconds: float) -> list[int]:
        """Wait until all ranks are here, then begin to leave signs; return the ranks that do not come."""
        self.store.set(f"actstore/beat/{self.rank}", "0")
        deadline = time.monotonic() + seconds
        while (absent := self._without("beat")) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._thread.start()
        return absent

    def end(self) -> None:
        """Leave no more signs."""
        self._ended.set()
        self._thread.join()

    def _without(self, sign: str) -> list[int]:
        return [rank for rank in range(self.world) if not self.store.check([f"actstore/{sign}/{rank}"])]

    def _beats(self) -> list[bytes]:
        return [self.store.get(f"actstore/beat/{rank}") for rank in range(self.world)]

    def silent(self) -> list[int]:
        """Return, after a wait has failed, the ranks whose process is gone, else those that do not see that it has."""
        try:
            self.store.set(f"actstore/failed/{self.rank}", "1")
            before, deadline = self._beats(), time.monotonic() + GRACE_SECONDS
            while not self._gone and time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 5)
            after = self._beats()
            stopped = [rank for rank in range(self.world) if before[rank] == after[rank]] or self._without("failed")
            gone = self._gone or [rank for rank in stopped if rank != self.rank]
            self.store.set("actstore/gone", " ".join(map(str, gone)))
            time.sleep(3 * BEAT_SECONDS)  # the others must read it, before rank 0 ends and takes the store along
        except RuntimeError:
            gone = self._gone or [0]
        return gone


@dataclass(frozen=True, slots=True)
class Ranks:
    """Processes that work together, and which one this is. Methods ending in _ change their tensor and return it.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        timeout_s: seconds after which a wait fails.
        signs: by which a failed wait finds out who is gone.
    """

    rank: int = 0
    world: int = 1
    timeout_s: float = 600.0
    signs: Signs | None = None

    def share(self, n: int, rank: int | None = None, world: int | None = None) -> range:
        """Return which of n things in a row belong to a rank (default: this one): contiguous, sizes differ by at most 1.

        Example:
            >>> [Ranks(rank, 3).share(8) for rank in range(3)]
            [range(0, 2), range(2, 5), range(5, 8)]
        """
        i, world = self.rank if rank is None else rank, world or self.world
        return range(i * n // world, (i + 1) * n // world)

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """Replace a tensor by its sum over the ranks, the same bits on each. Raises: RankLost."""
        return self._reduced_(tensor, dist.ReduceOp.SUM, what)

    def max_(self, tensor: Tensor, what: str) -> Tensor:
        """Replace a tensor by its largest values over the ranks. Raises: RankLost."""
        return self._reduced_(tensor, dist.ReduceOp.MAX, what)

    def _reduced_(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        if self.world > 1:
            with self._waiting(what):
                dist.all_reduce(tensor, operation)
        return tensor

    def total(self, count: int, what: str) -> int:
        """Return the sum of a count over the ranks. Raises: RankLost."""
        return count if self.world == 1 else int(self.sum_(torch.tensor(count), what))

    def largest(self, value: float, what: str) -> float:
        """Return the largest of the ranks' values. Raises: RankLost."""
        return value if self.world == 1 else float(self.max_(torch.tensor(value, dtype=torch.float64), what))

    def same_(self, tensor: Tensor, what: str) -> Tensor:
        """Replace a tensor by that of rank 0. Raises: RankLost."""
        if self.world > 1:
            with self._waiting(what):
                dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Return the tensors of all ranks, which have one shape, in the order of ranks. Raises: RankLost."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        with self._waiting(what):
            dist.all_gather(found, tensor.contiguous())
        return found

    def collect(self, tensor: Tensor, n: int, what: str) -> Tensor | None:
        """Return on rank 0, in main memory, the n rows that the ranks hold shares of; None on others. Raises: RankLost."""
        if self.world == 1:
            return tensor.detach().cpu()
        if self.rank:
            with self._waiting(what):
                dist.send(tensor.detach().contiguous(), 0)
            return None
        whole = torch.empty(n, *tensor.shape[1:], dtype=tensor.dtype)
        for rank in range(self.world):
            part = self.share(n, rank)
            rows = tensor.detach() if rank == 0 else tensor.new_empty(len(part), *tensor.shape[1:])
            if rank:
                with self._waiting(f"{what} of rank {rank}"):
                    dist.recv(rows, rank)
            whole[part.start : part.stop] = rows
        return whole

    def barrier(self, what: str) -> None:
        """Wait until all ranks are here. Raises: RankLost."""
        self.total(0, what)

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Turn a failed wait into the error that names the ranks that do not answer."""
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - begun
            assert self.signs is not None
            raise lost(self.signs.silent(), self, f"{what}, after {waited:.1f} s: {str(error).splitlines()[0][:160]}") from error


@dataclass(frozen=True, slots=True)
class Mesh:
    """What the ranks of a fit hold: the same (`ALONE`, a fleet), different rows, or different latents.

    Args:
        world: all ranks that train the same SAE.
        rows: the ranks that each take a share of every batch; else alone.
        latents: the ranks that each hold a share of the latents; else alone.
    """

    world: Ranks = Ranks()
    rows: Ranks = Ranks()
    latents: Ranks = Ranks()


ONE = Ranks()
ALONE = Mesh()


def lost(silent: list[int], ranks: Ranks, what: str) -> RankLost:
    """Return the error for ranks that do not answer; with none of them, for a connection that broke."""
    names = f"rank {', '.join(map(str, silent))} does not answer" if silent else "the connection between the ranks broke"
    return RankLost(
        f"{names}: waiting for {what}",
        f"rank {ranks.rank} of {ranks.world}, time-out {ranks.timeout_s:g} s",
        "see why it ended in its own messages, then run the same command again, with any number of ranks: it goes on at the "
        "last checkpoint",
    )


@contextlib.contextmanager
def connected(timeout_s: float = 600.0, cuda: bool = False) -> Iterator[Ranks]:
    """Yield the ranks that the launcher's environment names, connected; one process without such an environment.

    Args:
        timeout_s: seconds after which any wait fails.
        cuda: tensors on CUDA devices are exchanged too, by NCCL; each process takes the device of its LOCAL_RANK.

    Raises: UsageError: the environment makes no sense. RankLost: the others did not come in time.
    """
    values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if values["WORLD_SIZE"] in ("", "1"):
        yield ONE
        return
    rank, world = (int(values[name]) if values[name].isdecimal() else -1 for name in ("RANK", "WORLD_SIZE"))
    if not 0 <= rank < world or not values["MASTER_ADDR"] or not values["MASTER_PORT"].isdecimal():
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        raise UsageError(
            "the ranks' environment is incomplete", shown, "start it by `torchrun --nproc-per-node N -m trainer fit …`"
        )
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or rank) % torch.cuda.device_count())
    wait = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, world, timeout=max(wait, timedelta(seconds=START_SECONDS)))))
        signs = Signs(store, rank, world)
        ranks = Ranks(rank, world, timeout_s, signs)
        if absent := signs.meet(max(timeout_s, START_SECONDS)):
            raise lost(absent, ranks, "all ranks to come")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=wait)
    except RuntimeError as error:
        raise RankLost(
            f"not all {world} ranks came: {str(error).splitlines()[0][:160]}", f"rank {rank} of {world}",
            "start all of them with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
        ) from error  # fmt: skip
    try:
        yield ranks
        with contextlib.suppress(RankLost):  # all is done: this only keeps rank 0's store for the others' last signs
            ranks.barrier("the end")
    finally:
        signs.end()
        dist.destroy_process_group()
