"""What a step costs on a machine: `report` measures one layout, `table` prints it."""
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import msgspec
import torch
import tyro

from xtf import device, models, tree
from xtf.data.read import model_path
from xtf.nn import ModelConfig
from xtf.plan.layers import estimate
from xtf.plan.machines import EFFICIENCY, MACHINES, Machine, Times, roofline
from xtf.plan.step import Message, ordered, transforms


class Flags(msgspec.Struct, kw_only=True, frozen=True):
    """What to plan."""
    model: Annotated[str, tyro.conf.Positional]
    """Directory with a config.json, or an id on the hub, whose config.json alone is downloaded."""
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
    """Recompute each block in backward (--search tries without first)."""
    lora: int = 0
    """Freeze the model and train adapters of this rank."""
    experts_on: Literal["ep", "sp", "dp"] = "ep"
    """The mesh axis that experts are divided over."""
    overlap: bool = False
    """Micro-batches of two packs, the messages of one under the compute of the other."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """How AdamW keeps its moments."""
    machine: Literal["a100", "h100", "h800", "h200", "b200", "mi300x", "a3", "cpu"] = "h100"
    """What it runs on; cpu is this one, and takes CPU kernels' memory."""
    counts: str | None = None
    """JSON file with the pairs that each expert of each layer gets, [layers][experts]; the plan is that of the fullest
    rank. Balanced without."""
    search: bool = False
    """Rank the meshes of --world that fit into the machine's memory, without remat or else with, by tokens a second."""
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
    lora: int
    experts_on: str
    overlap: bool
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
    model, cfg, machine = subject(flags)
    more: dict[str, Any] = {"rank": flags.lora, "overlap_": flags.overlap, "experts_on": flags.experts_on}
    seen = estimate(model, cfg, sizes, seq_len=flags.seq_len, documents=flags.documents, packs=flags.packs,
                    dtype=flags.dtype, remat_=remat_, moments=flags.moments,
                    kind="cpu" if flags.machine == "cpu" else "meta", limit=limit, shares=_shares(flags.counts, cfg),
                    **more)
    near = lambda axes: _near(axes, ordered(sizes), machine.node)
    hidden = ("all_to_all",) if flags.overlap else ()
    times: Times = roofline(machine, seen.work, [(m.kind, m.ranks, near(m.axes), m.bytes) for m in seen.messages],
                            flags.machine != "cpu", hidden)
    rate = seen.tokens / times.step / flags.world
    lengths = [flags.seq_len // flags.documents] * flags.documents
    useful = model.flops(cfg, lengths, specs(flags, model, cfg)) / flags.seq_len
    usable = int(machine.memory * EFFICIENCY["capacity"])
    return Report(Path(flags.model).name, seen.parameters, flags.machine, flags.world, sizes, flags.seq_len,
                  flags.documents, flags.packs, flags.dtype, remat_, flags.lora, flags.experts_on, flags.overlap,
                  flags.moments, seen.memory, seen.peak, usable, seen.peak <= usable, seen.messages, seen.flops,
                  {**times._asdict(), "step": times.step}, seen.tokens, rate, rate * useful / machine.flops)


def subject(flags: Flags) -> tuple[ModuleType, Any, Machine]:
    """(the model's family, its config, the machine).

    Raises ValueError or OSError naming the flag, or the file and field, that is wrong.
    """
    for name in ("world", "seq_len", "documents", "packs"):
        if (given := getattr(flags, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: must be at least 1")
    if flags.seq_len % flags.documents:
        raise ValueError(f"--documents {flags.documents}: must divide --seq-len {flags.seq_len}")
    if flags.lora < 0:
        raise ValueError(f"--lora {flags.lora}: a rank is positive; 0 trains everything")
    model, cfg = models.from_hf(model_path(flags.model, ["config.json"]), lambda text: print(text, file=sys.stderr))
    return model, cfg, this_cpu() if flags.machine == "cpu" else MACHINES[flags.machine]


def specs(flags: Flags, model: ModuleType, cfg: ModelConfig) -> tree.Tree:
    """The model's specs as the transforms leave them: what is trained and adapted."""
    made = model.specs(cfg)
    for transform in sorted(transforms(cfg, flags.dtype, flags.remat, rank=flags.lora), key=lambda t: t.stage):
        made = transform.specs(made)
    return made


@functools.cache
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


def _shares(file: str | None, cfg: ModelConfig) -> list[list[float]] | None:
    if file is None:
        return None
    if (router := getattr(cfg, "router", None)) is None:
        raise ValueError(f"--counts {file}: the model has no experts; leave it out")
    try:
        counts = json.loads(Path(file).read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"--counts {file}: not JSON: {e}") from None
    experts = router.num_experts
    number = lambda n: type(n) in (int, float) and 0 <= n < math.inf
    sound = lambda row: isinstance(row, list) and len(row) == experts and all(map(number, row)) and sum(row)
    if not isinstance(counts, list) or not counts or not all(map(sound, counts)):
        raise ValueError(f"--counts {file}: must be a JSON list with a row of {experts} counts, not all zero, for "
                         "each layer with experts")
    return [[count / sum(row) for count in row] for row in counts]


def text(sizes: dict[str, int]) -> str:
    """A mesh as one word, axes of one rank left out."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one rank"


def ways(r: Report) -> list[str]:
    """What of a layout is not in its mesh."""
    return [r.dtype, *["remat"] * r.remat, *[f"lora {r.lora}"] * bool(r.lora), *["overlap"] * r.overlap,
            *[f"experts on {r.experts_on}"] * (r.experts_on != "ep")]


def table(r: Report) -> str:
    """A report for people: memory, messages and work of one rank, and the step's time."""
    lines = [f"{r.model}, {r.parameters / 1e9:.3g} B parameters, on {r.world} × {r.machine}: {text(r.mesh)}, "
             f"{r.packs} × {r.seq_len} tokens a rank{' of dp × ep' * (r.mesh.get('sp', 1) > 1)}, "
             f"{', '.join(ways(r))}, {r.moments} moments", "",
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
