"""Which layout fits and is fastest: `search` ranks the meshes of so many ranks."""
import sys
from collections.abc import Iterator
from typing import Any

from xtf import models
from xtf.plan._report import Flags, Report, report, text, this_cpu
from xtf.plan.machines import EFFICIENCY, MACHINES


def meshes(world: int, seq_len: int, cfg: Any) -> Iterator[dict[str, int]]:
    """The meshes of dp, ep and sp that a model divides over: `ep` its experts, `sp` its query heads and positions.

    >>> import msgspec
    >>> [mesh for mesh in meshes(2, 64, msgspec.defstruct("Config", ["num_attention_heads"])(2))]
    [{'dp': 2, 'ep': 1, 'sp': 1}, {'dp': 1, 'ep': 1, 'sp': 2}]
    """
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    experts = cfg.router.num_experts if hasattr(cfg, "router") else 1
    for sp in (n for n in divisors if cfg.num_attention_heads % n == 0 and seq_len % n == 0):
        for ep_ in (n for n in divisors if experts % n == 0 and world % (n * sp) == 0):
            yield {"dp": world // (sp * ep_), "ep": ep_, "sp": sp}


def search(flags: Flags) -> list[Report]:
    """The layouts that fit, by tokens a second: each mesh without remat, and with it where it does not fit without."""
    _, cfg = models.from_hf(flags.model)
    machine = this_cpu() if flags.machine == "cpu" else MACHINES[flags.machine]
    found: list[Report] = []
    for sizes in meshes(flags.world, flags.seq_len, cfg):
        for remat_ in (False, True):
            try:
                found.append(report(flags, sizes, remat_, machine.memory * EFFICIENCY["capacity"]))
                break
            except MemoryError:
                print(f"{text(sizes)}{', remat' * remat_}: does not fit", file=sys.stderr, flush=True)
    return sorted(found, key=lambda r: -r.tokens_per_second_per_device)
