"""Which layout fits and is fastest: `search` ranks the meshes of so many ranks."""
import itertools
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

from xtf import tree
from xtf.nn import ModelConfig
from xtf.plan._report import Flags, Report, report, specs, subject, text
from xtf.plan.machines import EFFICIENCY

MOMENTS = {"fp32": 8, "bf16": 4, "int8": 2}  # bytes of both of a parameter's, scales left out
EACH = 4                                     # groups of layouts that are worth starting a process for


def meshes(world: int, seq_len: int, cfg: ModelConfig, experts_on: str = "ep") -> Iterator[dict[str, int]]:
    """The meshes that a model divides over: the axis `experts_on` its experts, `sp` its query heads and positions.

    >>> import msgspec
    >>> [mesh for mesh in meshes(2, 64, msgspec.defstruct("Config", ["num_attention_heads"])(2))]
    [{'dp': 2, 'ep': 1, 'sp': 1}, {'replicate': 2, 'dp': 1, 'ep': 1, 'sp': 1}, {'dp': 1, 'ep': 1, 'sp': 2}]
    """
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    router = getattr(cfg, "router", None)
    experts = 1 if router is None else router.num_experts
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

    Raises as `report` does.
    """
    model, cfg, machine = subject(flags)
    tried = list(meshes(flags.world, flags.seq_len, cfg, flags.experts_on))
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
            if fitting is None or fitting.remat > flags.remat:
                progress.console.print(f"{text(sizes)}: does not fit{' without remat' * (fitting is not None)}")
            progress.update(task, advance=1, description=f"{len(found)} fit")
    return sorted(found, key=lambda r: -r.tokens_per_second_per_device)


Tried = tuple[dict[str, int], Report | None]


def _each(flags: Flags, tried: list[dict[str, int]], limit: float) -> Iterator[Tried]:
    """The meshes with their reports, as they come."""
    rest = lambda sizes: (sizes["ep"], sizes["sp"])
    groups = [list(group) for _, group in itertools.groupby(sorted(tried, key=rest), rest)]
    if (cores := min(os.cpu_count() or 1, len(groups) // EACH)) < 2:
        yield from (one for group in groups for one in _fitting(flags, group, limit))
        return
    workers = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
    try:
        asked = [workers.submit(_fitting, flags, group, limit) for group in groups]
        yield from (one for done in as_completed(asked) for one in done.result())
    finally:
        workers.shutdown(cancel_futures=True)


def _fitting(flags: Flags, group: list[dict[str, int]], limit: float) -> list[Tried]:
    """Meshes that are alike but for `replicate`: each without remat, or else with it, or None if it does not fit. With
    more replicas a rank holds more, so what did not fit is not tried again."""
    ways, out = [True] if flags.remat else [False, True], []
    for sizes in sorted(group, key=lambda sizes: sizes.get("replicate", 1)):
        made = None
        while ways and made is None:
            try:
                made = report(flags, sizes, ways[0], limit)
            except MemoryError:
                del ways[0]
        out.append((sizes, made))
    return out
