"""`fsdp`: leaves stored in parts, computed whole.

FSDP (ZeRO-3) is the difference between two layouts, sharded and unsharded: all-gather ("make whole") on the way in,
reduce-scatter as its adjoint. A block's leaves are gathered into one bucket; the gather of the next block starts before
this one computes, and the bucket is dropped after it. Nothing is computed twice: what autograd saved of a bucket was a
view of it, and a saved-tensor hook keeps (dtype, offset, size, stride) in its place; in backward the first such handle
asks for the bucket again and starts the gather of the block before. With remat the gather moves inside the checkpointed
function, and no handles are needed (hooks do not nest with checkpoint's own).

Bytes of one `value_and_grad` (so of each micro-batch), for a bucket of S bytes (rows padded to a multiple of the W
ranks): each gather sends (W - 1) / W × S from a rank, twice (once with reshard=False, and for a block whose backward
needs no weight); the reduce-scatter sends (W - 1) / W × S in the reduction's dtype.
"""
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes

from xtf import tree
from xtf.layout import local
from xtf.ops import Ops, check_block, run_block
from xtf.parallel import _mesh as M
from xtf.parallel import collectives as C
from xtf.transform import Env, Stage, Transform, computed


def fsdp(*axes: str, reshard: bool = True, reduce_dtype: torch.dtype | None = torch.float32) -> Transform:
    """Store every leaf over `axes` (those that no transform computes over), and gather it where it is used.

    Gathers move the dtype that leaves compute in (`bf16()`: bf16 casts of fp32 masters); gradients are reduced in at
    least `reduce_dtype` (None: as they come). `reshard=False` keeps gathered weights from forward to backward: half the
    gathers, all the weights in memory. Leaves that are whole already but compute in another dtype are treated alike: on
    one process, too, the cast copies of one block at a time are alive. A `replicate` axis left out of `axes` is HSDP:
    parts are stored per group, gradients summed across groups.

    Sources: ZeRO (arXiv 1910.02054), FSDP (arXiv 2304.11277).

    >>> fsdp("dp", "sp").store
    ('dp', 'sp')
    """
    if not axes:
        raise ValueError('fsdp: name the mesh axes to store over, e.g. fsdp("dp", "ep", "sp")')
    wrap = lambda ops, env: _wrap(ops, env, reshard, reduce_dtype) if env.mesh is not None or env.casts else ops
    return Transform("fsdp", Stage.STORAGE, wrap, store=axes)


class Slot(NamedTuple):
    """One leaf in its bucket: where, and how to get the leaf back. `front` is its shape with the storage dim in front.

    `mesh` has the axes it is stored over in front (see `Place`); None for a leaf that is whole here and only cast.
    """
    part: torch.Tensor
    dtype: torch.dtype
    at: int
    dim: int
    front: tuple[int, ...]
    rows: int                                            # rows a rank, ceil(n / W): parts are padded to it
    ranks: int
    mesh: Any

    @property
    def padded(self) -> int:
        return self.rows * math.prod(self.front[1:])

    def whole(self, flat: torch.Tensor) -> torch.Tensor:
        """The leaf as a view of the bucket."""
        return flat[self.at:self.at + math.prod(self.front)].view(self.front).movedim(0, self.dim)

    def mine(self, out: torch.Tensor) -> torch.Tensor:
        """This rank's part of the leaf's gradient, of what a reduce-scatter brought (rows padded)."""
        n = self.part.shape[self.dim]
        return out[:n * math.prod(self.front[1:])].view(n, *self.front[1:]).movedim(0, self.dim)


class Bucket:
    """One block's leaves that are stored in parts or in another dtype, whole in one buffer a dtype when needed."""

    def __init__(self, leaves: Sequence[torch.Tensor], env: Env, stats: dict[str, int]):
        self.slots: list[Slot] = []
        self.sizes: dict[torch.dtype, int] = {}
        self.stats = stats
        for leaf in leaves:
            part = local(leaf)
            dtype = env.cast(part)
            dim, mesh = (leaf.placements[0].dim, leaf.device_mesh) if _in_parts(leaf) else (0, None)  # pyright: ignore
            shape = list(part.shape)
            shape[dim] = leaf.shape[dim] if mesh else shape[dim]
            front = (shape[dim], *shape[:dim], *shape[dim + 1:])
            ranks = mesh.size(0) if mesh else 1
            slot = Slot(part, dtype, self.sizes.get(dtype, 0), dim, front, -(-shape[dim] // ranks), ranks, mesh)
            self.sizes[dtype] = slot.at + ranks * slot.padded
            self.slots.append(slot)
        self.flat: dict[torch.dtype, torch.Tensor] = {}
        self.works: list[tuple[Any, list[torch.Tensor]]] = []
        self.next: Bucket | None = None
        self.prev: Bucket | None = None
        self.inside = False  # forward gave the block's inputs a border that backward has not passed

    def start(self) -> None:
        """Start gathering, unless that is done or under way."""
        if self.flat:
            return
        with _disable_current_modes():  # the schedule is no part of what selective checkpoint replays or counts
            self.flat = {d: self.slots[0].part.new_empty(n, dtype=d) for d, n in self.sizes.items()}
            messages: dict[Any, tuple[list, list]] = {}
            for s in self.slots:
                whole = self.flat[s.dtype][s.at:s.at + s.ranks * s.padded]
                if s.mesh is None:
                    whole.view(s.front).copy_(s.part.detach())
                    continue
                part = s.part.detach().to(s.dtype).movedim(s.dim, 0).reshape(-1)
                if part.numel() < s.padded:
                    part = F.pad(part, (0, s.padded - part.numel()))
                outs, parts = messages.setdefault((s.mesh, s.dtype), ([], []))
                outs.append(whole)
                parts.append(part)
            for (mesh, _), (outs, parts) in messages.items():
                self.works.append((C.gather_start(outs, parts, M.group_of(mesh, "weights")), parts))
        self.stats["gathers"] += 1
        self.stats["alive"] += 1
        self.stats["most_alive"] = max(self.stats["most_alive"], self.stats["alive"])

    def need(self, ahead: "Bucket | None") -> dict[torch.dtype, torch.Tensor]:
        """The gathered buffers, once `ahead` has been started behind them."""
        self.start()
        self.wait()
        if ahead is not None and any(s.mesh for s in ahead.slots):  # a mere cast has nothing to wait for
            ahead.start()
        return self.flat

    def wait(self) -> None:
        for work, _ in self.works:
            work.wait()
        self.works = []

    def drop(self) -> None:
        """Give the memory back."""
        if self.flat:
            self.wait()
            self.flat = {}
            self.stats["alive"] -= 1

    def handles(self) -> Any:
        """The hook that keeps a handle for every saved view of this bucket."""
        # fake tensors have no addresses
        bases = {flat.untyped_storage()._cdata: dtype for dtype, flat in self.flat.items() if flat.numel()}

        def pack(t: torch.Tensor) -> Any:
            if bases.get(t.untyped_storage()._cdata) is t.dtype:
                return t.dtype, t.size(), t.stride(), t.storage_offset()
            return t

        def unpack(h: Any) -> torch.Tensor:
            return h if isinstance(h, torch.Tensor) else self.need(self.prev)[h[0]].as_strided(*h[1:])

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Pending(NamedTuple):
    """Gradients on their way in one message: their leaves, their parts of the sums (once `work` is done), and what the
    message reads."""
    leaves: list[torch.Tensor]
    grads: list[torch.Tensor]
    work: Any = None
    reads: list[torch.Tensor] | None = None


class Gather(torch.autograd.Function):
    """Parts → whole leaves. One output a leaf (slices of one flat output cost ten times as much in backward).

    Gradients are summed over ranks here, over the axes that a leaf is stored over; those of leaves that are whole in
    xtf/parallel/sums.py. Backward starts the reduce-scatter and returns None; `settle` adds the parts to their leaves'
    `.grad`, where autograd adds those of leaves that are whole: it would itself add a tied leaf's two gradients before
    they are there.
    """
    @staticmethod
    def forward(ctx, bucket, ahead, schedule, *parts):
        ctx.bucket, ctx.schedule = bucket, schedule
        ctx.set_materialize_grads(False)
        flat = bucket.need(ahead)
        out = tuple(s.whole(flat[s.dtype]) for s in bucket.slots)
        ctx.mark_non_differentiable(*[o for o, p in zip(out, parts, strict=True) if not p.requires_grad])
        return out

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.bucket.inside:
            ctx.bucket.drop()
        # 1. those of the block before flew under this one's compute; the last are settled when backward ends
        schedule = ctx.schedule
        if not schedule.pending:
            torch.autograd.Variable._execution_engine.queue_callback(schedule.settle)  # pyright: ignore
        schedule.settle()
        # 2. one message for all gradients that are reduced over the same ranks in the same dtype
        cast, messages = Pending([], []), {}
        for g, s in zip(grads, ctx.bucket.slots, strict=True):
            if g is None or not s.part.requires_grad:
                continue
            if s.mesh is None:
                cast.leaves.append(s.part)
                cast.grads.append(g.to(s.part.dtype))
                continue
            dtype = g.dtype if schedule.reduce_dtype is None else torch.promote_types(g.dtype, schedule.reduce_dtype)
            whole = g.movedim(s.dim, 0).to(dtype).reshape(-1)
            if whole.numel() < s.ranks * s.padded:
                whole = F.pad(whole, (0, s.ranks * s.padded - whole.numel()))
            messages.setdefault((s.mesh, dtype), []).append((s, whole.contiguous()))
        if cast.leaves:
            schedule.pending.append(cast)
        for (mesh, _), sent in messages.items():
            outs, wholes = [whole.new_empty(s.padded) for s, whole in sent], [whole for _, whole in sent]
            work = C.scatter_start(outs, wholes, M.group_of(mesh, "gradients"))
            grads_here = [s.mine(out) for (s, _), out in zip(sent, outs, strict=True)]
            schedule.pending.append(Pending([s.part for s, _ in sent], grads_here, work, wholes))
        return (None,) * (3 + len(grads))


class Schedule:
    """What is under way in a backward pass, and how often buckets were gathered."""

    def __init__(self, reduce_dtype: torch.dtype | None, sums: Any):
        self.reduce_dtype, self.sums = reduce_dtype, sums
        self.pending: list[Pending] = []
        self.stats = {"gathers": 0, "alive": 0, "most_alive": 0}

    def settle(self) -> None:
        """Wait for what is under way, add it to the leaves' gradients, and let go of the messages: whole gradients are
        alive for two blocks at most."""
        pending, self.pending = self.pending, []
        for leaves, grads, work, _ in pending:
            if work is not None:
                work.wait()
            for leaf, g in zip(leaves, grads, strict=True):
                g = g.to(leaf.dtype).contiguous()
                if leaf.grad is None:
                    leaf.grad = g
                elif self.sums is None:                              # autograd's own may be another leaf's, too
                    leaf.grad = leaf.grad + g
                else:                                                # on a mesh such a leaf is never used but gathered
                    leaf.grad.add_(g)
                if self.sums is not None:
                    self.sums.added(leaf)


class Border(torch.autograd.Function):
    """Identity on a block's inputs. Its adjoint runs last in the block, frozen leaves or not, and drops the bucket."""
    @staticmethod
    def forward(ctx, bucket, *xs):
        ctx.bucket = bucket
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx, *grads):
        ctx.bucket.inside = False
        ctx.bucket.drop()
        return (None, *grads)


def _border(bucket: Bucket, args: tuple) -> tuple:
    leaves, treedef = tree.flatten(args)
    idx = [i for i, a in enumerate(leaves) if isinstance(a, torch.Tensor) and a.requires_grad]
    if not idx or not torch.is_grad_enabled():
        return args
    bucket.inside = True
    for i, x in zip(idx, Border.apply(bucket, *[leaves[i] for i in idx]), strict=True):  # pyright: ignore
        leaves[i] = x
    return tree.unflatten(leaves, treedef)


def _in_parts(leaf: torch.Tensor) -> bool:
    return isinstance(leaf, DTensor) and isinstance(leaf.placements[0], Shard) and leaf.device_mesh.size(0) > 1


class Prepared(NamedTuple):
    """The parameters of one block, ready to be made whole: all leaves, the tree's structure, which of them (`stored`)
    are in the bucket, and the bucket, None where none is."""
    leaves: list
    treedef: Any
    stored: list[int]
    bucket: Bucket | None


def _wrap(ops: Ops, env: Env, reshard: bool, reduce_dtype: torch.dtype | None) -> Ops:
    schedule = Schedule(reduce_dtype, env.sums)
    for p in () if env.layout is None else tree.leaves(env.layout):
        for kind in ("weights", "gradients") if p.store else ():
            M.group_of(p.mesh, kind)  # making groups is a collective: here, in one order, and not inside a step

    def prepare(params: tree.Tree) -> Prepared:
        leaves, treedef = tree.flatten(params)
        stored = [i for i, p in enumerate(leaves) if _in_parts(p) or env.cast(local(p)) != p.dtype]
        if env.sums is not None and torch.is_grad_enabled():
            for i in stored:
                env.sums.used(local(leaves[i]))
        bucket = Bucket([leaves[i] for i in stored], env, schedule.stats) if stored else None
        return Prepared(leaves, treedef, stored, bucket)

    def whole(prepared: Prepared, ahead: Bucket | None) -> tree.Tree:
        """The parameters unsharded: those of the bucket as views of it, the others unwrapped and cast."""
        leaves, treedef, stored, bucket = prepared
        out = list(leaves)
        if bucket is not None:
            parts = [s.part for s in bucket.slots]
            gathered: Any = Gather.apply(bucket, ahead, schedule, *parts)
            for i, x in zip(stored, gathered, strict=True):
                out[i] = x
        for i in set(range(len(out))) - set(stored):
            out[i] = computed(out[i], env)
        return tree.unflatten(out, treedef)

    def call(fn: Callable, prepared: Prepared, *args: Any) -> Any:
        """Make whole, run, drop; backward gathers again through the handles."""
        bucket = prepared.bucket
        if bucket is None:
            return fn(whole(prepared, None), *args)
        # 1. wait for this bucket's all-gather, behind which the next one's starts
        params = whole(prepared, bucket.next)
        # 2. mark the inputs, so that backward knows when it is through with the block
        args = _border(bucket, args)
        if not reshard and torch.is_grad_enabled():
            return fn(params, *args)
        # 3. run; what autograd saves of the bucket becomes a handle
        with bucket.handles():
            out = fn(params, *args)
        # 4. reshard: the first handle that backward asks for gathers again
        bucket.drop()
        return out

    def use(fn: Callable, params: tree.Tree, *args: Any) -> Any:
        return call(fn, prepare(params), *args)

    def scan(block: Callable, layers: Sequence, x: Any, /, *shared: Any, xs: Sequence | None = None,
             around: Callable | None = None) -> tuple[Any, list]:
        check_block(block, xs, len(layers))
        # 1. one bucket a layer; each knows the one to gather ahead, in forward and in backward
        all_prepared = [prepare(params) for params in layers]
        buckets = [prepared.bucket for prepared in all_prepared]
        for a, b in itertools.pairwise(buckets):
            if a is not None and b is not None:
                a.next, b.prev = b, a
        ys = []
        for i, prepared in enumerate(all_prepared):
            extra = () if xs is None else (xs[i],)

            def run(params: tree.Tree, x: Any, *shared: Any, extra: tuple = extra) -> tuple[Any, Any]:
                return run_block(block, params, x, *shared, extra=extra)

            # 2. without remat: gather outside of the block, handles for what is saved
            if around is None:
                x, y = call(run, prepared, x, *shared)
                ys.append(y)
                continue
            # 3. with remat: gather inside of the checkpointed call, which saves nothing of the bucket
            again: list[bool] = []  # filled by the first run: the second is backward's recomputation

            def inside(x: Any, *shared: Any, prepared: Prepared = prepared, run: Callable = run,
                       again: list = again) -> tuple[Any, Any]:
                bucket = prepared.bucket
                params = whole(prepared, bucket and (bucket.prev if again else bucket.next))
                again.append(True)
                return run(params, *(_border(bucket, (x, *shared)) if bucket else (x, *shared)))

            x, y = around(inside)(x, *shared)
            if prepared.bucket is not None:
                prepared.bucket.drop()
            ys.append(y)
        return x, ys

    use.stats = schedule.stats                           # for the tests of the schedule
    return replace(ops, use=use, scan=scan)
