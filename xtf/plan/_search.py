"""Which layout fits and is fastest: `search` ranks the meshes of so many ranks."""
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

from xtf import tree
from xtf.plan._report import Flags, Report, report, specs, subject, text
from xtf.plan.machines import EFFICIENCY

MOMENTS = {"fp32": 8, "bf16": 4, "int8": 2}  # bytes of both of a parameter's, scales left out
EACH = 4                                     # layouts that are worth starting a process for


def meshes(world: int, seq_len: int, cfg: Any, experts_on: str = "ep") -> Iterator[dict[str, int]]:
    """The meshes that a model divides over: the axis `experts_on` its experts, `sp` its query heads and positions.

    >>> import msgspec
    >>> [mesh for mesh in meshes(2, 64, msgspec.defstruct("Config", ["num_attention_heads"])(2))]
    [{'dp': 2, 'ep': 1, 'sp': 1}, {'replicate': 2, 'dp': 1, 'ep': 1, 'sp': 1}, {'dp': 1, 'ep': 1, 'sp': 2}]
    """
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    experts = cfg.router.num_experts if hasattr(cfg, "router") else 1
    for sp in (n for n in divisors if cfg.num_attention_heads % n == 0 and seq_len % n == 0):
        for ep in (n for n in divisors if world % (n * sp) == 0 and (n == 1 or (experts > 1 and experts_on == "ep"))):
            for replicate in (n for n in divisors if world % (n * sp * ep) == 0):
                sizes = {"dp": world // (sp * ep * replicate), "ep": ep, "sp": sp}
                if experts == 1 or experts % sizes[experts_on] == 0:
                    yield {"replicate": replicate, **sizes} if replicate > 1 else sizes


def search(flags: Flags) -> list[Report]:
    """The layouts that fit, by tokens a second: each mesh without remat, and with it where it does not fit without.

    Progress goes to stderr, with what does not fit. Many meshes are tried in processes of their own, one a core: a
    script that calls this guards its main module, as `multiprocessing` wants it.

    Raises as `report` does, and ValueError where no mesh of so many ranks divides the model.
    """
    model, cfg, machine = subject(flags)
    tried = list(meshes(flags.world, flags.seq_len, cfg, flags.experts_on))
    if not tried:
        raise ValueError(f"--world {flags.world}: no mesh of so many ranks divides the model's "
                         f"{cfg.router.num_experts} experts --experts-on {flags.experts_on}; change one of them")
    limit, found = machine.memory * EFFICIENCY["capacity"], []
    whole = sum(math.prod(p.shape) * (p.dtype.itemsize + MOMENTS[flags.moments] * p.trainable)
                for p in tree.leaves(specs(flags, model, cfg)))
    least = lambda sizes: whole * sizes.get("replicate", 1) / flags.world
    columns = SpinnerColumn(), "{task.description}", "{task.completed} of {task.total} meshes", TimeElapsedColumn(), \
        TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("0 fit", total=len(tried))
        hopeless = [sizes for sizes in tried if least(sizes) > limit]
        for sizes in hopeless:
            progress.console.print(f"{text(sizes)}: does not fit: parameters and moments alone are "
                                   f"{least(sizes) / 1e9:.1f} GB a rank")
        progress.advance(task, len(hopeless))
        for sizes, fitting in _each(flags, [sizes for sizes in tried if sizes not in hopeless], limit):
            found += [fitting] if fitting else []
            if fitting is None or fitting.remat:
                progress.console.print(f"{text(sizes)}: does not fit{' without remat' * (fitting is not None)}")
            progress.update(task, advance=1, description=f"{len(found)} fit")
    return sorted(found, key=lambda r: -r.tokens_per_second_per_device)


def _each(flags: Flags, tried: list[dict[str, int]], limit: float) -> Iterator[tuple[dict[str, int], Report | None]]:
    """The meshes with their reports, as they come."""
    if (cores := min(os.cpu_count() or 1, len(tried) // EACH)) < 2:
        yield from ((sizes, _fitting(flags, sizes, limit)) for sizes in tried)
        return
    workers = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
    try:
        asked = {workers.submit(_fitting, flags, sizes, limit): sizes for sizes in tried}
        yield from ((asked[done], done.result()) for done in as_completed(asked))
    finally:
        workers.shutdown(cancel_futures=True)


def _fitting(flags: Flags, sizes: dict[str, int], limit: float) -> Report | None:
    """A mesh without remat, or else with it, or None if it does not fit."""
    for remat in (True,) if flags.remat else (False, True):
        try:
            return report(flags, sizes, remat, limit)
        except MemoryError:
            pass
    return None
