"""What a step costs on a machine: `report` measures one layout, `table` prints it."""
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
import tyro

from xtf import device, models
from xtf.plan.machines import EFFICIENCY, MACHINES, Machine, Times, roofline
from xtf.plan.step import Message, measure, ordered


class Flags(msgspec.Struct, kw_only=True, frozen=True):
    """What to plan."""
    model: Annotated[str, tyro.conf.Positional]
    """Directory with a config.json."""
    world: int = 1
    """Ranks."""
    mesh: str = ""
    """Sizes of replicate, dp, ep, sp, e.g. dp=16,ep=32,sp=2; their product is --world (dp alone takes all ranks if none
    is named)."""
    seq_len: int = 4096
    """Tokens of a pack, which is a micro-batch."""
    documents: int = 1
    """Documents of a pack, equally long: attention stays within them."""
    packs: int = 1
    """Packs of each rank (of each group of sp ranks) in a step."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Computation; parameters and reductions are fp32."""
    remat: bool = False
    """Recompute each block in backward."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """How AdamW keeps its moments."""
    machine: Literal["h100", "h800", "h200", "b200", "a3", "cpu"] = "h100"
    """What it runs on; cpu is this one, and takes CPU kernels' memory."""
    counts: str | None = None
    """JSON file with the pairs that each expert of each layer gets, [layers][experts]; the plan is that of the fullest
    rank. Balanced without."""
    search: bool = False
    """Rank the meshes of --world, with and without remat, that fit into the machine's memory, by tokens a second."""
    json: bool = False
    """One JSON object instead of the table."""


class Report(msgspec.Struct, frozen=True):
    """What `python -m xtf.plan` prints, with --json one object. Bytes, seconds; `flops` and `memory` of one rank."""
    model: str
    parameters: int
    machine: str
    world: int
    mesh: dict[str, int]
    seq_len: int
    documents: int
    packs: int
    dtype: str
    remat: bool
    moments: str
    memory: dict[str, int]
    peak: int
    usable: int
    fits: bool
    messages: list[Message]
    flops: dict[str, int]
    seconds: dict[str, float]
    tokens: int
    tokens_per_second_per_device: float
    mfu: float


def report(flags: Flags, sizes: dict[str, int], remat_: bool, limit: float = math.inf) -> Report:
    """Measure a step, and say what it costs on the machine. Raises as `measure` does."""
    model, cfg = models.from_hf(flags.model)
    machine = this_cpu() if flags.machine == "cpu" else MACHINES[flags.machine]
    if flags.documents < 1 or flags.seq_len % flags.documents:
        raise ValueError(f"--documents {flags.documents}: must divide --seq-len {flags.seq_len}")
    seen = measure(model, cfg, sizes, seq_len=flags.seq_len, documents=flags.documents, packs=flags.packs,
                   dtype=flags.dtype, remat_=remat_, moments=flags.moments,
                   kind="cpu" if flags.machine == "cpu" else "meta", limit=limit, shares=_shares(flags.counts, cfg))
    near = lambda axes: _near(axes, ordered(sizes), machine.node)
    times: Times = roofline(machine, seen.work, [(m.kind, m.ranks, near(m.axes), m.bytes) for m in seen.messages],
                            flags.machine != "cpu")
    rate = seen.tokens / times.step / flags.world
    lengths = [flags.seq_len // flags.documents] * flags.documents
    useful = 3 * model.flops(cfg, lengths) / flags.seq_len
    usable = int(machine.memory * EFFICIENCY["capacity"])
    return Report(Path(flags.model).name, seen.parameters, flags.machine, flags.world, sizes, flags.seq_len,
                  flags.documents, flags.packs, flags.dtype, remat_, flags.moments, seen.memory, seen.peak, usable,
                  seen.peak <= usable, seen.messages, seen.flops, {**times._asdict(), "step": times.step}, seen.tokens,
                  rate, rate * useful / machine.flops)


def this_cpu() -> Machine:
    """This machine as one device: best product and bandwidth, measured; all ranks are on it, messages are copies."""
    import time
    x = torch.ones(1 << 25)
    took = math.inf
    for _ in range(3):
        start = time.perf_counter()
        x.clone()
        took = min(took, time.perf_counter() - start)
    bandwidth = 2 * x.nbytes / took
    return Machine(device.peak_flops(torch.float32), device.total_memory(), bandwidth, 1 << 30, bandwidth / 2,
                   bandwidth / 2)


def _near(axes: Sequence[str], sizes: dict[str, int], node: int) -> int:
    """How many ranks of rank 0's group over these axes are in its node; the last axis numbers ranks fastest."""
    members, stride = [0], 1
    for axis, size in reversed(sizes.items()):
        if axis in axes:
            members = [m + stride * i for m in members for i in range(size)]
        stride *= size
    return sum(m < node for m in members)


def _shares(file: str | None, cfg: Any) -> list[list[float]] | None:
    if file is None:
        return None
    counts = json.loads(Path(file).read_text())
    experts = cfg.router.num_experts if hasattr(cfg, "router") else 0
    sound = lambda row: isinstance(row, list) and len(row) == experts and sum(row)
    if not isinstance(counts, list) or not all(map(sound, counts)):
        raise ValueError(f"--counts {file}: must be a JSON list with a row of {experts} counts, not all zero, for "
                         "each layer with experts")
    return [[count / sum(row) for count in row] for row in counts]


def text(sizes: dict[str, int]) -> str:
    """A mesh as one word, axes of one rank left out."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one rank"


def table(r: Report) -> str:
    """A report for people: memory, messages and work of one rank, and the step's time."""
    lines = [f"{r.model}, {r.parameters / 1e9:.3g} B parameters, on {r.world} × {r.machine}: {text(r.mesh)}, "
             f"{r.packs} × {r.seq_len} tokens a rank{' of dp × ep' * (r.mesh.get('sp', 1) > 1)}, "
             f"{r.dtype}{', remat' * r.remat}, {r.moments} moments", "",
             "memory of a rank at its peak     GB"]
    lines += [f"  {kind:<22}{held / 1e9:>11.3f}" for kind, held in r.memory.items()]
    lines += [f"  {'total':<22}{r.peak / 1e9:>11.3f}   {'fits' if r.fits else 'DOES NOT FIT'} into "
              f"{r.usable / 1e9:.1f} GB that are usable", "",
              "messages         over           ranks    number   GB sent by a rank"]
    lines += [f"  {m.kind:<15}{' × '.join(m.axes):<14}{m.ranks:>6}{m.count:>10}{m.bytes / 1e9:>14.3f}"
              for m in r.messages]
    lines += ["", "work of a rank             TFLOP   seconds"]
    lines += [f"  {kind:<18}{r.flops.get(kind, 0) / 1e12:>12.2f}{r.seconds[kind]:>10.3f}" for kind in Times._fields[:5]]
    lines += [f"  messages, exposed{'':>13}{r.seconds['exposed']:>10.3f}",
              f"  messages, hidden under compute{r.seconds['hidden']:>10.3f}",
              f"  step{'':>26}{r.seconds['step']:>10.3f}", "",
              f"{r.tokens_per_second_per_device:,.0f} tokens/s a device, {r.mfu:.1%} of the peak in the model's own "
              "FLOPs"]
    return "\n".join(lines)
