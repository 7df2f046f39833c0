"""One real sharded step over tensors without numbers, as any one of any number of ranks, and what it costs."""
import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

import xtf
from xtf import moe, tree
from xtf.data.batch import Batch, room
from xtf.layout import AXES, PACK_AXES, local
from xtf.nn import ModelConfig
from xtf.optim import adamw, chain, clip_by_global_norm, guard, schedules
from xtf.parallel import collectives as C
from xtf.parallel import ep, exact, fsdp, ulysses
from xtf.parallel._mesh import forget
from xtf.plan.ledger import Ledger
from xtf.spec import num_params
from xtf.transform import Transform
from xtf.transforms import bf16, jit, lora, overlap, remat


class Message(msgspec.Struct, frozen=True):
    """All collectives of one kind over the same mesh axes: how many, and bytes that this rank sends to others."""
    kind: str
    axes: tuple[str, ...]
    ranks: int
    count: int
    bytes: int


class Measured(msgspec.Struct, frozen=True):
    """What one rank's step costs. Bytes when most are alive, by kind; FLOPs by kind; `tokens` of the whole step.
    `moments`: as `memory`, in each half of each part of the step (forwards, backwards, update)."""
    peak: int
    memory: dict[str, int]
    messages: list[Message]
    flops: dict[str, int]
    tokens: int
    parameters: int
    work: Counter
    moments: list[dict[str, int]]


class Balanced:
    """A strategy of `ep` that knows how many rows go where, unseen: `shares_LE`, each expert's part of a layer's pairs.

    A token chooses K different experts within `top_groups` groups at random, so it misses a rank that holds m of the n
    experts within with probability C(n - m, K) / C(n, K); m is a rank's experts times their load over the even one. The
    rank that is planned is the fullest. `again`: layers are recomputed; `halves`: micro-batches come in so many parts.
    """
    rows = pairs = None

    def __init__(self, router: moe.Router, shares_LE: Sequence[Sequence[float]] | None, again: bool, halves: int = 1):
        self.router, self.calls, self.again, self.halves = router, 0, again, halves
        self.shares_LE = shares_LE or [[1 / router.num_experts] * router.num_experts]

    def sizes(self, announced: Any) -> tuple[list[int], list[int], int]:
        """As `Strategy.sizes` of `xtf.parallel.ep`: layers in order, and in reverse again where recomputed."""
        L, (T, K), R = len(self.shares_LE), announced.experts_TK.shape, len(announced.mine_R)
        at, self.calls = self.calls // self.halves % (2 * L if self.again else L), self.calls + 1
        e = self.router.num_experts // R
        loads_LR = [[sum(row[r * e:(r + 1) * e]) * R for r in range(R)] for row in self.shares_LE]
        full = max(range(R), key=lambda r: sum(load[r] for load in loads_LR))
        loads = loads_LR[min(at, 2 * L - 1 - at)]
        loads[0], loads[full] = loads[full], loads[0]                # the rank that is planned is number 0
        send = [round(T * self.reach(load, e)) for load in loads]
        return send, [send[0]] * R, round(T * K * loads[0])

    def reach(self, load: float, experts: int) -> float:
        """The probability that a token has an expert on a rank of so many, `load` times as busy as the average."""
        r = self.router
        group = r.num_experts // r.groups
        inside, held, n = min(experts, group), max(1, experts // group), r.top_groups * group
        missed = 0.0
        for j in range(min(held, r.top_groups) + 1):  # so many of the rank's groups are among the token's
            ways = math.comb(held, j) * math.comb(r.groups - held, r.top_groups - j)
            chance = ways / math.comb(r.groups, r.top_groups)
            missed += chance * math.prod(max(0.0, n - j * inside * load - i) / (n - i) for i in range(r.top_k))
        return 1 - missed


# ---- one step --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def ranks(sizes: dict[str, int], kind: str) -> Iterator[DeviceMesh | None]:
    """A mesh of ranks that do not exist, this process its number 0; None for one. ValueError where ranks are real."""
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


def training_step(model: ModuleType, cfg: ModelConfig, moments: Any, ledger: Ledger | None = None,
                  micro_packs: int = 1) -> tuple[Any, Any, Any]:
    """(the recipes' step, its optimizer, its guard); a ledger is told of its phases, and which memory is the
    gradients'."""
    tx = chain(clip_by_global_norm(1.0), adamw(schedules.cosine(1e-5, 100, 0.03), weight_decay=0.1, moments=moments))
    watch, has_experts = guard(), hasattr(cfg, "router")

    def train_step(state: Any, batch: Batch, ops: Any = xtf.LOCAL) -> Any:
        num_tokens = batch.loss_tokens(ops)
        num_routed = moe.num_tokens(batch, ops) if has_experts else None

        def share(params: Any, batch: Batch, ops: Any) -> Any:
            if num_routed is None:
                loss, sums = model.loss(params, batch, cfg, ops) / num_tokens, {}
            else:
                nll, routing = model.loss_and_routing(params, batch, cfg, ops)
                loss = nll / num_tokens + 1e-3 * moe.balance(routing, num_routed, ops)
                sums = moe.sums(routing)
            if ledger is not None:
                ledger.phase()
            return loss, sums

        def graded(params: Any, batch: Any, ops: Any) -> Any:
            value, grads = xtf.value_and_grad(share)(params, batch, ops)
            if ledger is not None:  # before the last micro-batch they are in `ops.into`
                ledger.phase()
                ledger.mark("gradients", map(local, tree.leaves(grads) if grads is not None else ops.into.grads[1]))
            return value, grads

        (loss, _), grads = xtf.microbatch(graded, len(batch.input_ids) // micro_packs)(state.params, batch, ops)
        with ledger.entering("optimizer") if ledger is not None else contextlib.nullcontext():
            norm = ops.norm(grads)
            ok, seen = watch.check(state.extra, loss, norm)
            updates, opt = tx.update(grads, state.opt, state.params, ops, norm=norm, ok=ok)
            return state.apply(updates, opt, seen), loss
    return train_step, tx, watch


def transforms(cfg: ModelConfig, dtype: str, remat_: bool, strategy: Any = None, *, rank: int = 0,
               overlap_: bool = False, experts_on: str = "ep") -> list[Transform]:
    """Those of the recipes, without torch.compile: `strategy` is `ep`'s, for models with experts; `rank` is `lora`'s.

    Raises ValueError for --overlap of a model without experts.
    """
    if overlap_ and not hasattr(cfg, "router"):
        raise ValueError("--overlap: the model has no experts, whose messages it would hide; leave it out")
    return [fsdp("dp", "ep", "sp"), ulysses("sp"), jit(compile=False),
            *([ep(experts_on, strategy or exact())] if hasattr(cfg, "router") else []),
            *([bf16()] if dtype == "bf16" else []), *([remat()] if remat_ else []),
            *([lora(rank, base_dtype=torch.bfloat16 if dtype == "bf16" else None)] if rank else []),
            *([overlap()] if overlap_ else [])]


def ordered(sizes: dict[str, int]) -> dict[str, int]:
    """As `xtf.mesh` orders axes.

    >>> ordered({"sp": 2, "dp": 4})
    {'dp': 4, 'sp': 2}
    """
    return {a: sizes[a] for a in (*(a for a in AXES if a in sizes), *(a for a in sizes if a not in AXES))}


def measure(model: ModuleType, cfg: ModelConfig, sizes: dict[str, int], *, seq_len: int, documents: int = 1,
            packs: int = 1, dtype: str = "bf16", remat_: bool = False, moments: Any = "fp32", kind: str = "meta",
            limit: float = math.inf, shares: Sequence[Sequence[float]] | None = None, strategy: Any = None,
            batch: Batch | None = None, rank: int = 0, overlap_: bool = False, experts_on: str = "ep") -> Measured:
    """One training step of rank 0 on the mesh `sizes`, as the recipes write it, with nothing computed.

    kind: "meta" stands for a GPU (kernels for CUDA), "cpu" for this machine. `shares` as in `Balanced`, `strategy` in
    its place. `batch` is this rank's, of real tensors (kind "cpu"); without it packs are full, of `documents` that are
    alike. `rank`, `overlap_`, `experts_on` as in `transforms`.

    Raises ValueError where the model does not divide over the mesh, MemoryError as soon as more than `limit` bytes are
    alive.
    """
    sizes = ordered(sizes)
    ledger, micro_packs = Ledger(), 2 if overlap_ else 1
    if packs % micro_packs:
        raise ValueError(f"--packs {packs}: --overlap takes two at a time; give an even number")
    train_step, tx, watch = training_step(model, cfg, moments, ledger, micro_packs)
    if strategy is None and (router := getattr(cfg, "router", None)) is not None:
        strategy = Balanced(router, shares, remat_, micro_packs)
    chosen = transforms(cfg, dtype, remat_, strategy, rank=rank, overlap_=overlap_, experts_on=experts_on)
    with ranks(sizes, kind) as mesh:
        step = xtf.shard(train_step, *chosen, mesh=mesh, specs=model.specs(cfg))
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
        return Measured(ledger.peak, ledger.at_peak(), _messages(sent, mesh), dict(flops),
                        given.input_ids.numel() * replicas, num_params(step.specs), ledger.work, ledger.peaks())


def _empty(specs: tree.Tree, layout: tree.Tree | None, kind: str) -> tree.Tree:
    """Parameters of which there are shapes alone."""
    made = lambda p, size: torch.empty(size, dtype=p.dtype, device=kind)
    if layout is None:
        return tree.tree_map(lambda p: made(p, p.shape).requires_grad_(p.trainable), specs)
    part = lambda p, place: place.from_local(made(p, place.box(p.shape)[1]), p.shape).requires_grad_(p.trainable)
    return tree.tree_map(part, specs, layout)


def _full(packs: int, seq_len: int, documents: int, sp: int, kind: str) -> Batch:
    """Packs without padding. On a CPU, whose kernels read them, the integers are real."""
    with _disable_current_modes() if kind == "cpu" else contextlib.nullcontext():
        ids = torch.zeros(packs, seq_len, dtype=torch.int64, device=kind)
        mine = ids[:, :seq_len // sp].clone()
        longest = seq_len // documents
        ends = torch.arange(room(-(-seq_len // longest)) + 1, dtype=torch.int32, device=kind) * longest
        return Batch(ids, mine, torch.ones_like(mine, dtype=torch.float32),
                     torch.arange(seq_len, device=kind).repeat(packs, 1), ends.clamp(max=seq_len).repeat(packs, 1),
                     torch.full((packs,), seq_len, device=kind), longest)


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
        out[kind, axes] = Message(kind, axes, size, count + (old.count if old else 0),
                                  nbytes + (old.bytes if old else 0))
    return sorted(out.values(), key=lambda m: (m.kind, m.axes))
