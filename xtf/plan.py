"""What a layout costs, before anyone rents it: one real sharded step over tensors without numbers, as any one of any number of ranks.

    python -m xtf.plan MODEL_DIR --world 1024 --mesh dp=16,ep=32,sp=2 --seq-len 4096 --remat
    python -m xtf.plan MODEL_DIR --world 64 --machine h200 --search

MODEL_DIR needs its config.json alone.
"""
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import msgspec
import torch
import torch.distributed as dist
import tyro
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

import xtf
from xtf import device, models, moe, tree
from xtf.data.batch import Batch
from xtf.data.loader import default_max_documents
from xtf.layout import AXES, PACK_AXES, parse_mesh
from xtf.ledger import Ledger
from xtf.machines import EFFICIENCY, MACHINES, Machine, Times, roofline
from xtf.optim import adamw, chain, clip_by_global_norm, guard, schedules
from xtf.parallel import collectives as C
from xtf.parallel import ep, exact, fsdp, ulysses
from xtf.parallel.collectives import local
from xtf.parallel.mesh import forget
from xtf.shard import Transform
from xtf.spec import num_params
from xtf.transforms import bf16, jit, remat


class Flags(msgspec.Struct, kw_only=True, frozen=True):
    """What to plan."""
    model: Annotated[str, tyro.conf.Positional]
    """Directory with a config.json."""
    world: int = 1
    """Ranks."""
    mesh: str = ""
    """Sizes of replicate, dp, ep, sp, e.g. dp=16,ep=32,sp=2; their product is --world (dp alone takes all ranks if none is named)."""
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
    """JSON file with the pairs that each expert of each layer gets, [layers][experts]; the plan is that of the fullest rank. Balanced without."""
    search: bool = False
    """Rank the meshes of --world, with and without remat, that fit into the machine's memory, by tokens a second."""
    json: bool = False
    """One JSON object instead of the table."""


class Message(msgspec.Struct, frozen=True):
    """All collectives of one kind over the same mesh axes: how many, and the bytes that this rank sends to others in them."""
    kind: str
    axes: tuple[str, ...]
    ranks: int
    count: int
    bytes: int


class Measured(msgspec.Struct, frozen=True):
    """What one rank's step costs. Bytes at the moment when most are alive, by kind; FLOPs by kind of work; `tokens` of the whole step."""
    peak: int
    memory: dict[str, int]
    messages: list[Message]
    flops: dict[str, int]
    tokens: int
    parameters: int
    work: Counter


class Balanced:
    """A strategy of `ep` that knows how many rows go where without seeing them: `shares_LE`, each expert's part of its layer's pairs.

    A token chooses K different experts within `top_groups` groups at random, so it misses a rank that holds m of the n experts within with
    probability C(n - m, K) / C(n, K); m is a rank's experts times their load over the even one. The rank that is planned is the fullest.
    """
    rows = pairs = None

    def __init__(self, router: moe.Router, shares_LE: Sequence[Sequence[float]] | None, again: bool):
        self.router, self.calls, self.again = router, 0, again
        self.shares_LE = shares_LE or [[1 / router.num_experts] * router.num_experts]

    def sizes(self, plan: Any) -> tuple[list[int], list[int], int]:
        """As `xtf.parallel.ep.Strategy.sizes`. Layers come in their order, and in backward once more in reverse where they are recomputed."""
        L, (T, K), R = len(self.shares_LE), plan.experts_TK.shape, len(plan.mine_R)
        at, self.calls = self.calls % (2 * L if self.again else L), self.calls + 1
        e = self.router.num_experts // R
        loads_LR = [[sum(row[r * e:(r + 1) * e]) * R for r in range(R)] for row in self.shares_LE]
        full = max(range(R), key=lambda r: sum(load[r] for load in loads_LR))
        loads = loads_LR[min(at, 2 * L - 1 - at)]
        loads[0], loads[full] = loads[full], loads[0]                # the rank that is planned is number 0
        send = [round(T * self.reach(load, e)) for load in loads]
        return send, [send[0]] * R, round(T * K * loads[0])

    def reach(self, load: float, experts: int) -> float:
        """The probability that a token has an expert on a rank of so many experts, `load` times as busy as the average."""
        r = self.router
        group = r.num_experts // r.groups
        inside, held, n = min(experts, group), max(1, experts // group), r.top_groups * group
        missed = 0.0
        for j in range(min(held, r.top_groups) + 1):                 # so many of the rank's groups are among the token's
            chance = math.comb(held, j) * math.comb(r.groups - held, r.top_groups - j) / math.comb(r.groups, r.top_groups)
            missed += chance * math.prod(max(0.0, n - j * inside * load - i) / (n - i) for i in range(r.top_k))
        return 1 - missed


# ---- one step ---------------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def ranks(sizes: dict[str, int], kind: str) -> Iterator[DeviceMesh | None]:
    """A mesh over ranks that do not exist, of which this process is number 0; None for one rank. Raises ValueError where there are real ones."""
    if dist.is_initialized():
        raise ValueError("plan: this process has joined a process group; plan in a process of its own")
    if math.prod(sizes.values()) == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend
    dist.init_process_group("fake", rank=0, world_size=math.prod(sizes.values()), store=FakeStore())
    try:
        yield init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        dist.destroy_process_group()
        forget()


def training_step(model: ModuleType, cfg: Any, moments: Any, ledger: Ledger | None = None) -> tuple[Any, Any, Any]:
    """(the step of the recipes, its optimizer, its guard); the ledger, if there is one, is told which memory is the gradients'."""
    tx = chain(clip_by_global_norm(1.0), adamw(schedules.cosine(1e-5, 100, 0.03), weight_decay=0.1, moments=moments))
    watch, has_experts = guard(), hasattr(cfg, "router")

    def train_step(state: Any, batch: Batch, ops: Any = xtf.LOCAL) -> Any:
        num_tokens = ops.total(batch.loss_mask.sum()).clamp(min=1)
        num_routed = moe.num_tokens(batch, ops) if has_experts else None

        def share(params: Any, batch: Batch, ops: Any) -> Any:
            if num_routed is None:
                return model.loss(params, batch, cfg, ops) / num_tokens, {}
            nll, routing = model.loss_and_routing(params, batch, cfg, ops)
            return nll / num_tokens + 1e-3 * moe.balance(routing, num_routed, ops), moe.sums(routing)

        def graded(*args: Any) -> Any:
            value, grads = xtf.value_and_grad(share)(*args)
            if ledger is not None:
                ledger.mark("gradients", map(local, tree.leaves(grads)))
            return value, grads

        (loss, _), grads = xtf.microbatch(graded, len(batch.input_ids))(state.params, batch, ops)
        with ledger.entering("optimizer") if ledger is not None else contextlib.nullcontext():
            norm = ops.norm(grads)
            ok, seen = watch.check(state.extra, loss, norm)
            updates, opt = tx.update(grads, state.opt, state.params, ops, norm=norm, ok=ok)
            return state.apply(updates, opt, seen), loss
    return train_step, tx, watch


def transforms(cfg: Any, dtype: str, remat_: bool, strategy: Any = None) -> list[Transform]:
    """Those of the recipes, without torch.compile: `strategy` is `ep`'s, for models with experts."""
    return [fsdp("dp", "ep", "sp"), ulysses("sp"), jit(compile=False), *([ep("ep", strategy or exact())] if hasattr(cfg, "router") else []),
            *([bf16()] if dtype == "bf16" else []), *([remat()] if remat_ else [])]


def ordered(sizes: dict[str, int]) -> dict[str, int]:
    """As `xtf.mesh` orders axes.

    >>> ordered({"sp": 2, "dp": 4})
    {'dp': 4, 'sp': 2}
    """
    return {a: sizes[a] for a in (*(a for a in AXES if a in sizes), *(a for a in sizes if a not in AXES))}


def measure(model: ModuleType, cfg: Any, sizes: dict[str, int], *, seq_len: int, documents: int = 1, packs: int = 1, dtype: str = "bf16", 
            remat_: bool = False, moments: Any = "fp32", kind: str = "meta", limit: float = math.inf, shares: Sequence[Sequence[float]] | None = None,
            strategy: Any = None, batch: Batch | None = None) -> Measured:
    """One training step of rank 0 on the mesh `sizes`, as the recipes write it, with nothing computed.

    kind: "meta" stands for a GPU (kernels for CUDA), "cpu" for this machine. `shares` as in `Balanced`, `strategy` in its place. `batch` is
    this rank's, of real tensors (kind "cpu"); without it packs are full, of `documents` that are alike.

    Raises ValueError where the model does not divide over the mesh, MemoryError as soon as more than `limit` bytes are alive.
    """
    sizes = ordered(sizes)
    ledger = Ledger(documents)
    train_step, tx, watch = training_step(model, cfg, moments, ledger)
    if strategy is None and hasattr(cfg, "router"):
        strategy = Balanced(cfg.router, shares, remat_)
    with ranks(sizes, kind) as mesh:
        step = xtf.shard(train_step, *transforms(cfg, dtype, remat_, strategy), mesh=mesh, specs=model.specs(cfg))
        with ledger, C.record() as sent:
            with ledger.entering("parameters"):
                params = _empty(step.specs, step.layout, kind)
            with ledger.entering("optimizer"):
                state = xtf.TrainState.create(params, tx.init(params), watch.init(kind))
            given = batch or _full(packs, seq_len, documents, sizes.get("sp", 1), kind)
            ledger.mark("activations", tree.leaves(given))
            ledger.start(limit)                                      # moments were made through shapes of whole leaves
            step(state, given)
            del state, params
        flops = Counter()
        for (what, n, _), count in ledger.work.items():
            flops[what] += n * count
        replicas = math.prod(sizes.get(a, 1) for a in PACK_AXES)
        return Measured(ledger.peak, ledger.at_peak(), _messages(sent, mesh), dict(flops), given.input_ids.numel() * replicas,
                        num_params(step.specs), ledger.work)


def _empty(specs: tree.Tree, layout: tree.Tree | None, kind: str) -> tree.Tree:
    """Parameters of which there are shapes alone."""
    made = lambda p, size: torch.empty(size, dtype=p.dtype, device=kind)
    if layout is None:
        return tree.tree_map(lambda p: made(p, p.shape).requires_grad_(p.trainable), specs)
    return tree.tree_map(lambda p, place: place.from_local(made(p, place.box(p.shape)[1]), p.shape).requires_grad_(p.trainable), specs, layout)


def _full(packs: int, seq_len: int, documents: int, sp: int, kind: str) -> Batch:
    """Packs without padding. On a CPU, whose kernels read them, the integers are real."""
    with _disable_current_modes() if kind == "cpu" else contextlib.nullcontext():
        ids = torch.zeros(packs, seq_len, dtype=torch.int64, device=kind)
        mine = ids[:, :seq_len // sp].clone()
        ends = torch.arange(max(documents, default_max_documents(seq_len)) + 1, dtype=torch.int32, device=kind) * (seq_len // documents)
        return Batch(ids, mine, torch.ones_like(mine, dtype=torch.float32), torch.arange(seq_len, device=kind).repeat(packs, 1),
                     ends.clamp(max=seq_len).repeat(packs, 1), torch.full((packs,), seq_len, device=kind))


def _messages(sent: list[C.Sent], mesh: DeviceMesh | None) -> list[Message]:
    """Collectives by kind and axes: those in which the ranks of a group differ."""
    totals: dict[tuple[str, str], list[int]] = {}
    for s in sent:
        total = totals.setdefault((s.kind, s.group), [s.ranks, 0, 0])
        total[1], total[2] = total[1] + 1, total[2] + s.bytes
    if mesh is None:
        return []
    out: dict[tuple, Message] = {}
    for (kind, name), (size, count, nbytes) in totals.items():
        members = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))  # pyright: ignore
        where = [(mesh.mesh == rank).nonzero()[0] for rank in members]
        varies = (torch.stack(where) != where[0]).any(0).tolist()
        axes = tuple(a for a, v in zip(mesh.mesh_dim_names or (), varies, strict=True) if v)
        old = out.get((kind, axes))
        out[kind, axes] = Message(kind, axes, size, count + (old.count if old else 0), nbytes + (old.bytes if old else 0))
    return sorted(out.values(), key=lambda m: (m.kind, m.axes))


# ---- what it means on a machine ---------------------------------------------------------------------------------------------------------

class Report(msgspec.Struct, frozen=True):
    """What `python -m xtf.plan` prints, and as one object with --json. Bytes, seconds; `flops` and `memory` are one rank's."""
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
    seen = measure(model, cfg, sizes, seq_len=flags.seq_len, documents=flags.documents, packs=flags.packs, dtype=flags.dtype, remat_=remat_,
                   moments=flags.moments, kind="cpu" if flags.machine == "cpu" else "meta", limit=limit, shares=_shares(flags.counts, cfg))
    near = lambda axes: _near(axes, ordered(sizes), machine.node)
    times: Times = roofline(machine, seen.work, [(m.kind, m.ranks, near(m.axes), m.bytes) for m in seen.messages], flags.machine != "cpu")
    rate = seen.tokens / times.step / flags.world
    lengths = [flags.seq_len // flags.documents] * flags.documents
    useful = 3 * model.flops(cfg, lengths) / flags.seq_len
    usable = int(machine.memory * EFFICIENCY["capacity"])
    return Report(Path(flags.model).name, seen.parameters, flags.machine, flags.world, sizes, flags.seq_len, flags.documents, flags.packs,
                  flags.dtype, remat_, flags.moments, seen.memory, seen.peak, usable, seen.peak <= usable, seen.messages, seen.flops,
                  {**times._asdict(), "step": times.step}, seen.tokens, rate, rate * useful / machine.flops)


def this_cpu() -> Machine:
    """This machine as one device: its best product and its memory's bandwidth, measured; ranks are on it together, and messages are copies."""
    import time
    x = torch.ones(1 << 25)
    took = math.inf
    for _ in range(3):
        start = time.perf_counter()
        x.clone()
        took = min(took, time.perf_counter() - start)
    bandwidth = 2 * x.nbytes / took
    return Machine(device.peak_flops(torch.float32), device.total_memory(), bandwidth, 1 << 30, bandwidth / 2, bandwidth / 2)


def _near(axes: Sequence[str], sizes: dict[str, int], node: int) -> int:
    """How many ranks of rank 0's group over these axes are in its node; ranks are numbered with the last axis fastest."""
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
    if not isinstance(counts, list) or any(not isinstance(row, list) or len(row) != experts or not sum(row) for row in counts):
        raise ValueError(f"--counts {file}: must be a JSON list with a row of {experts} counts, not all zero, for each layer with experts")
    return [[count / sum(row) for count in row] for row in counts]


def meshes(world: int, seq_len: int, cfg: Any) -> Iterator[dict[str, int]]:
    """The meshes of dp, ep and sp that a model divides over: `ep` divides its experts, `sp` its query heads and positions.

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
                print(f"{_text(sizes)}{', remat' * remat_}: does not fit", file=sys.stderr, flush=True)
    return sorted(found, key=lambda r: -r.tokens_per_second_per_device)


# ---- printing ---------------------------------------------------------------------------------------------------------------------------

def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one rank"


def table(r: Report) -> str:
    """A report for people: memory, messages and work of one rank, and the step's time."""
    lines = [f"{r.model}, {r.parameters / 1e9:.3g} B parameters, on {r.world} × {r.machine}: {_text(r.mesh)}, {r.packs} × {r.seq_len} tokens a rank"
             f"{' of dp × ep' * (r.mesh.get('sp', 1) > 1)}, {r.dtype}{', remat' * r.remat}, {r.moments} moments", "",
             "memory of a rank at its peak     GB"]
    lines += [f"  {kind:<22}{held / 1e9:>11.3f}" for kind, held in r.memory.items()]
    lines += [f"  {'total':<22}{r.peak / 1e9:>11.3f}   {'fits' if r.fits else 'DOES NOT FIT'} into {r.usable / 1e9:.1f} GB that are usable", "",
              "messages         over           ranks    number   GB sent by a rank"]
    lines += [f"  {m.kind:<15}{' × '.join(m.axes):<14}{m.ranks:>6}{m.count:>10}{m.bytes / 1e9:>14.3f}" for m in r.messages]
    lines += ["", "work of a rank             TFLOP   seconds"]
    lines += [f"  {kind:<18}{r.flops.get(kind, 0) / 1e12:>12.2f}{r.seconds[kind]:>10.3f}" for kind in Times._fields[:5]]
    lines += [f"  messages, exposed{'':>13}{r.seconds['exposed']:>10.3f}", f"  messages, hidden under compute{r.seconds['hidden']:>10.3f}",
              f"  step{'':>26}{r.seconds['step']:>10.3f}", "",
              f"{r.tokens_per_second_per_device:,.0f} tokens/s a device, {r.mfu:.1%} of the peak in the model's own FLOPs"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run `python -m xtf.plan`."""
    flags = tyro.cli(Flags, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    sizes = parse_mesh(flags.mesh) or {"dp": flags.world}
    if math.prod(sizes.values()) != flags.world:
        raise SystemExit(f"--mesh {flags.mesh}: the sizes multiply to {math.prod(sizes.values())}, --world is {flags.world}; make them agree")
    try:
        if not flags.search:
            found = [report(flags, sizes, flags.remat)]
            print(msgspec.json.encode(found[0]).decode() if flags.json else table(found[0]))
            return
        found = search(flags)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None
    if flags.json:
        print(msgspec.json.encode(found).decode())
    elif not found:
        raise SystemExit(f"no mesh of {flags.world} ranks fits; take more ranks, a shorter --seq-len or fewer bytes of --moments")
    for r in found if not flags.json else ():
        print(f"{r.tokens_per_second_per_device:>10,.0f} tokens/s a device{r.peak / 1e9:>9.1f} GB   {_text(r.mesh)}{', remat' * r.remat}")


if __name__ == "__main__":
    main()
