"""How the ranks of a fit share its work: which SAEs each trains, or which rows or latents of all SAEs it holds."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from actstore.errors import StoreLocked, UsageError
from trainer.architectures import architecture_names, load_architecture
from trainer.checkpoint import Run, read_run
from trainer.config import SaeConfig
from trainer.distributed import ALONE, Mesh, Parallel, Ranks, lost
from trainer.memory import member_bytes, memory_of
from trainer.sae import Widths

LOOK_SECONDS = 0.2  # between looks at whether another rank has finished its run


def memory_share(device: torch.device, ranks: Ranks) -> int | None:
    """Return the bytes that each rank may take, the same on all; main memory is divided between the ranks of a machine."""
    found = memory_of(device)
    if found is not None and device.type == "cpu":
        found //= int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world) if ranks.world > 1 else 1
    least = -ranks.largest(float("-inf") if found is None else -found, "the memory of each rank")
    return None if found is None or least == float("inf") else int(least)


def chosen_mesh(parallel: Parallel, ranks: Ranks, saes: Sequence[SaeConfig], widths: Widths, limit_bytes: int | None) -> Mesh:
    """Return what the ranks share of each SAE; nothing in a fleet.

    Args:
        parallel: "auto" is "fleet" where there are as many SAEs as ranks, else "latents" where one does not fit, else "data".
        ranks: of the fit.
        saes: of the fleet.
        widths: of the rows.
        limit_bytes: that one rank may take, or None.

    Raises: UsageError: an SAE cannot be trained in this way.
    """
    if ranks.world == 1:
        return ALONE
    if parallel == "auto":
        alone = limit_bytes is None or max(member_bytes(sae, widths) for sae in saes) <= limit_bytes
        parallel = "fleet" if len(set(saes)) >= ranks.world else "data" if alone else "latents"
    if parallel == "fleet":
        return ALONE
    for sae in saes:
        _refuse_unfit(sae, parallel, ranks.world)
    return Mesh(ranks, rows=ranks) if parallel == "data" else Mesh(ranks, latents=ranks)


def _refuse_unfit(sae: SaeConfig, way: Parallel, world: int) -> None:
    known = [name for name in architecture_names() if way in load_architecture(name).spreads]
    if sae.arch not in known:
        reason = f"{sae.arch} SAEs are not trained by --parallel {way}; {', '.join(known)} are"
    elif sae.dead == "resample":
        reason = f"--dead resample draws from whole batches and latents: it does not go with --parallel {way}"
    elif way == "latents" and (sae.skip or dict(sae.options).get("multi_topk")):
        reason = f"{'--skip' if sae.skip else 'multi_topk'} does not go with --parallel latents"
    elif world > (sae.n_latents if way == "latents" else sae.batch_size):
        shared = f"{sae.n_latents} latents" if way == "latents" else f"batches of {sae.batch_size}"
        reason = f"{world} ranks cannot share {shared}"
    else:
        return
    raise UsageError(reason, do="use --parallel fleet: each rank then trains some of the SAEs, of any kind")


def share_of(config: SaeConfig, mesh: Mesh) -> SaeConfig:
    """Return the configuration as large as a rank's part of it, to see what fits into memory."""
    return replace(config, n_latents=-(-config.n_latents // mesh.latents.world)) if mesh.latents.world > 1 else config


def claim(
    create: Callable[[SaeConfig], Run], saes: Sequence[SaeConfig], mesh: Mesh, ranks: Ranks, locks: contextlib.ExitStack
) -> tuple[dict[SaeConfig, Run], list[Run], list[Run]]:
    """Open all runs; lock those this rank writes.

    Args:
        create: makes or opens the run of a configuration.
        saes: of the fleet.
        mesh: what the ranks share of each SAE.
        ranks: of the fit.
        locks: holds the locks.

    Returns: all runs, the unfinished ones, and those of them that this rank trains or helps to train.
    Raises: StoreLocked: another fit trains one. RankLost.
    """
    if ranks.rank:
        ranks.barrier("rank 0 to make the run folders")
    run_of = {sae: create(sae) for sae in dict.fromkeys(saes)}
    if not ranks.rank:
        ranks.barrier("all ranks to have come")
    made = list(run_of.values())
    open_ones = ranks.same_(torch.tensor([run.result is None for run in made], dtype=torch.int32), "which runs are unfinished")
    unfinished = [run for run, is_open in zip(made, open_ones.tolist(), strict=True) if is_open]
    mine = unfinished if mesh.world.world > 1 else unfinished[ranks.rank :: ranks.world]
    for run in mine if mesh.world.rank == 0 else []:
        locks.enter_context(run.lock(f"a fit, rank {ranks.rank}" if ranks.world > 1 else "a fit"))
    ranks.barrier("all ranks to lock their runs")
    return run_of, unfinished, mine


def wait_for(runs: Sequence[Run], stop: Callable[[], BaseException | None], ranks: Ranks) -> None:
    """Wait until other ranks have finished their runs, however long: a rank holds its runs' locks as long as it lives.

    Args:
        runs: all that were unfinished; `claim` gave them to the ranks in turn.
        stop: asked again and again; what it returns is raised.
        ranks: of the fit.

    Raises: RankLost: a run is neither locked nor finished. What `stop` returns.
    """
    for i, run in enumerate(runs):
        while i % ranks.world != ranks.rank:
            try:
                with run.lock("a look at whether it is finished", shared=True):
                    break
            except StoreLocked:
                if (wanted := stop()) is not None:
                    raise wanted from None
                time.sleep(LOOK_SECONDS)
        if read_run(run.path).result is None:
            raise lost([i % ranks.world], ranks, f"run {run.digest[:12]} to be finished")
