"""`assert_equivalent`: whatever the layout, a step computes the same function.

hypothesis draws a layout and a ragged batch; the step runs on one process and, sharded, on real ranks; all gradients
and the updated parameters are compared. A failure shrinks to the smallest mesh and batch, and names the leaf.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from xtf import tree
from xtf._shard import shard
from xtf.data.batch import Batch, cut
from xtf.layout import AXES, PACK_AXES, local
from xtf.ops import Ops
from xtf.parallel._ep import ep, exact, static
from xtf.parallel._fsdp import fsdp
from xtf.parallel._mesh import mesh as make_mesh
from xtf.parallel._ulysses import ulysses
from xtf.spec import init
from xtf.state import TrainState
from xtf.testing._pool import pool
from xtf.transform import Env, Stage, Transform
from xtf.transforms import jit, overlap, remat


@dataclass(frozen=True)
class Layout:
    """A mesh and the transforms on it, as plain values, so that a failing one prints as what to type.

    `store` are fsdp's axes (empty: no fsdp); `experts` is ep's axis (empty: no ep) and `bounds` its static (rows,
    pairs), None for exact sizes; `remat` is None, or the labels kept (empty: whole blocks recomputed); `extra` are
    functions that return further transforms; `reverse` passes all transforms in the opposite order.
    """
    mesh: tuple[tuple[str, int], ...] = ()
    store: tuple[str, ...] = ()
    reshard: bool = True
    experts: str = ""
    bounds: tuple[int, int] | None = None
    overlap: bool = False
    remat: tuple[str, ...] | None = None
    compile: bool = False
    donate: bool = False
    extra: tuple[Callable[[], Transform], ...] = ()
    reverse: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh)

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def pack_ranks(self) -> int:
        """How many ranks hold different packs."""
        return math.prod(n for a, n in self.mesh if a in PACK_AXES)

    def transforms(self) -> tuple[Transform, ...]:
        """The transforms to pass to `shard`."""
        out = [f() for f in self.extra]
        if self.store:
            out.append(fsdp(*self.store, reshard=self.reshard))
        if self.sizes.get("sp", 1) > 1:
            out.append(ulysses("sp"))
        if self.experts:
            out.append(ep(self.experts, exact() if self.bounds is None else static(*self.bounds)))
        if self.overlap:
            out.append(overlap())
        if self.remat is not None:
            out.append(remat(*self.remat))
        if self.compile or self.donate:
            out.append(jit(compile=self.compile, donate=self.donate))
        return tuple(reversed(out)) if self.reverse else tuple(out)


def layouts(max_ranks: int = 4, axes: Sequence[str] = AXES, labels: Sequence[str] = ("attn_out",),
            compile: bool = False, max_sp: int = 4, experts: int = 0) -> st.SearchStrategy[Layout]:
    """Meshes over `axes` with at most `max_ranks` ranks, any storage axes, remat and order of transforms.

    Numbers of ranks are products of 2 and 3 (1, 2, 3, 4, 6, 8, ...): three ranks divide hardly any leaf evenly. `sp`
    divides `max_sp`, which has to divide the model's query heads. `experts` is how many experts a layer of the model
    has: they may live on any axis that divides them, with exact sizes or ample static ones, and the halves of a
    micro-batch may overlap. Shrinks towards one process.

    >>> from hypothesis import find
    >>> find(layouts(6, ["dp"]), lambda layout: layout.num_ranks > 2).mesh
    (('dp', 3),)
    """
    counts = {n: factors for n in range(1, max_ranks + 1) if (factors := _twos_and_threes(n)) is not None
              and (set(axes) - {"sp"} or max_sp % n == 0)}

    @st.composite
    def draw(d: Any) -> Layout:
        sizes = dict.fromkeys(axes, 1)
        for factor in counts[d(st.sampled_from(list(counts)))]:
            fits = [a for a in axes if a != "sp" or max_sp % (sizes[a] * factor) == 0]
            sizes[d(st.sampled_from(fits))] *= factor
        used = [a for a in axes if sizes[a] > 1]
        store = tuple(a for a in used if a != "replicate" and d(st.booleans()))
        axis = d(st.sampled_from(["", *(a for a in used if experts % sizes[a] == 0)])) if experts else ""
        return Layout(tuple((a, sizes[a]) for a in used), store, reshard=not (store and d(st.booleans())),
                      experts=axis, bounds=d(st.sampled_from([None, AMPLE])) if axis else None,
                      overlap=bool(experts) and d(st.booleans()),
                      remat=d(st.sampled_from([None, (), *((label,) for label in labels)])),
                      compile=compile and d(st.booleans()), donate=d(st.booleans()), reverse=d(st.booleans()))
    return draw()


def _twos_and_threes(n: int) -> list[int] | None:
    """The prime factors of n; None if it has others than 2 and 3."""
    factors = []
    for prime in (2, 3):
        while n % prime == 0:
            factors.append(prime)
            n //= prime
    return factors if n == 1 else None


UP_TO_FOUR = layouts(4)
AMPLE = 256, 2048                                     # more rows and pairs than a batch of `token_batches` can make


def token_batches(vocab_size: int, max_packs: int = 2, max_len: int = 8,
                  multiple: int = 1) -> Callable[[Layout], st.SearchStrategy[Batch]]:
    """For a layout, a strategy of whole global batches: ragged documents, random tokens and masks, some padding.

    Packs are at most `max_packs` × `multiple` (for micro-batches; twice that where halves overlap) for each rank that
    holds other packs, their length at most `max_len` times `sp`.
    """
    def strategy(layout: Layout) -> st.SearchStrategy[Batch]:
        @st.composite
        def draw(d: Any) -> Batch:
            P = layout.pack_ranks * multiple * (1 + layout.overlap) * d(st.integers(1, max_packs))
            T = layout.sizes.get("sp", 1) * d(st.integers(1, max_len))
            ends = [sorted({T, *d(st.lists(st.integers(1, T), max_size=3))}) for _ in range(P)]
            g = torch.Generator().manual_seed(d(st.integers(0, 2 ** 16)))
            segments = torch.tensor([[0, *e, *[T] * (4 - len(e))] for e in ends], dtype=torch.int32)
            position = torch.arange(T).expand(P, T)
            start = torch.stack([torch.tensor([0, *e])[torch.searchsorted(torch.tensor(e), torch.arange(T), right=True)]
                                 for e in ends])
            # the last may be padding
            lengths = torch.tensor([e[-2] if len(e) > 1 and d(st.booleans()) else T for e in ends])
            return Batch(input_ids=torch.randint(vocab_size, (P, T), generator=g),
                         labels=torch.randint(vocab_size, (P, T), generator=g),
                         loss_mask=((torch.rand(P, T, generator=g) < 0.8) & (position < lengths[:, None])).float(),
                         positions=position - start, segments=segments, lengths=lengths)
        return draw()
    return strategy


@dataclass
class Equivalence:
    """How far a layout is from one process: the largest deviation of each kind on any rank, relative to a leaf's
    largest value, and where. `metric` is that of all that the step reports beside the loss."""
    loss: float
    grad: float
    grad_leaf: str
    param: float
    param_leaf: str
    metric: float = 0.0
    metric_name: str = ""


def spy(seen: list) -> Transform:
    """A transform that adds every gradient that `value_and_grad` collects to `seen[0]` (local parts)."""
    def wrap(ops: Ops, env: Env) -> Ops:
        def collect(grads: list, leaves: list) -> list:
            out = ops.collect(grads, leaves)
            # a copy: the optimizer may overwrite gradients
            copies = [None if g is None else g.clone() for g in out]
            if seen:
                copies = [a if b is None else b if a is None else a + b
                          for a, b in zip(seen[0], copies, strict=True)]
            seen[:] = [copies]
            return out
        return replace(ops, collect=collect)
    return Transform("xtf.testing.spy", Stage.LAST, wrap)


# making groups takes longer than an example
shared_mesh = lru_cache(maxsize=None)(lambda sizes: make_mesh(**dict(sizes)))


class Part(NamedTuple):
    """What one rank holds of a leaf: where in the leaf it begins, and the values."""
    offset: tuple[int, ...]
    values: torch.Tensor


def part_of(x: torch.Tensor, place: Any, shape: tuple[int, ...]) -> Part:
    """This rank's part of a leaf of `shape` (a copy); `place` is None where the leaf is whole."""
    return Part((0,) * x.ndim if place is None else place.box(shape)[0], local(x).detach().clone())


def run_layout(step: Callable, specs: tree.Tree, opt: Any, layout: Layout, batch: Any, seed: int, steps: int,
               extra: tree.Tree = None) -> tuple[list, tree.Tree, list]:
    """On every rank: its parts of the first step's gradients, that step's metrics, and its parts of the parameters
    after `steps` steps."""
    m = shared_mesh(layout.mesh)
    seen: list = []
    run = shard(step, spy(seen), *layout.transforms(), mesh=m, specs=specs)
    shapes = [p.shape for p in tree.leaves(run.specs)]
    places = [None] * len(shapes) if m is None else tree.leaves(run.layout)
    params = init(run.specs, seed, run.layout)
    state, first = TrainState.create(params, opt.init(params), _fresh(extra), seed), None
    for _ in range(steps):
        state, metrics = run(state, cut(batch, m))
        if first is None:
            first = [None if g is None else part_of(g, place, shape)
                     for g, place, shape in zip(seen[0], places, shapes, strict=True)], tree.tree_map(whole, metrics)
        seen.clear()
    assert first is not None
    return *first, [part_of(*leaf) for leaf in zip(tree.leaves(state.params), places, shapes, strict=True)]


def whole(x: torch.Tensor) -> torch.Tensor:
    """A detached whole tensor on the CPU, whatever holds it."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


def compare(step: Callable, layout: Layout, batch: Any, *, specs: tree.Tree, opt: Any, seed: int = 0, steps: int = 2,
            reference: Callable | None = None, extra: tree.Tree = None) -> Equivalence:
    """Run `reference` (by default `step`) on one process and `step` on `layout`, and say how far apart they are."""
    one: list = []
    # what needs no mesh (adapters, freezing, precision) is a part of the function: one process has it, too
    common = [t for t in (f() for f in layout.extra) if not t.needs_mesh]
    base = shard(reference or step, spy(one), *common, specs=specs)
    params = init(base.specs, seed)
    state, grads, said = TrainState.create(params, opt.init(params), _fresh(extra), seed), None, {}
    for _ in range(steps):
        state, metrics = base(state, batch)
        if grads is None:
            grads, said = one[0], tree.tree_map(whole, metrics)
        one.clear()
    if layout.num_ranks == 1:
        got = [run_layout(step, specs, opt, replace(layout, mesh=()), batch, seed, steps, extra)]
    else:
        got = pool(layout.num_ranks, late=True).run(run_layout, step, specs, opt, layout, batch, seed, steps, extra)
    assert grads is not None
    paths = [path for path, _ in tree.flatten_with_path(base.specs)]

    def worst(ours: list, theirs: list[list]) -> tuple[float, str]:
        # A leaf whose gradient cancels to nothing (a key bias without rope) still has the rounding of its terms,
        # hence a floor at 1e-3 of the tree's largest.
        floor = 1e-3 * max((x.abs().max().item() for x in ours if x is not None and x.numel()), default=0.0)
        return max(((_worst_part(x, parts, floor), path)
                    for path, x, *parts in zip(paths, ours, *theirs, strict=True)), default=(0.0, ""))

    grad = worst(grads, [parts for parts, _, _ in got])
    param = worst([p.detach() for p in tree.leaves(state.params)], [parts for _, _, parts in got])
    metrics = [metrics for _, metrics, _ in got]
    metric = max(((_deviation(x, m[name], 1e-3), name) for m in metrics for name, x in said.items() if name != "loss"),
                 default=(0.0, ""))
    return Equivalence(max(_deviation(said["loss"], m["loss"]) for m in metrics), *grad, *param, *metric)


def _worst_part(ours: torch.Tensor | None, parts: Sequence[Part | None], floor: float) -> float:
    """The deviation of whatever rank is furthest off, of the leaf's largest value."""
    if ours is None or any(part is None for part in parts):
        return 0.0 if ours is None and all(part is None for part in parts) else math.inf
    if sum(part.values.numel() for part in parts if part) < ours.numel():
        return math.inf                                              # nobody holds some of it
    there = [tuple(slice(o, o + n) for o, n in zip(part.offset, part.values.shape, strict=True))
             for part in parts if part]
    largest = max(floor, ours.abs().max().item() if ours.numel() else 0.0)
    return max((_deviation(ours[at], part.values, largest) for at, part in zip(there, parts, strict=True) if part),
               default=0.0)


def _fresh(extra: tree.Tree) -> tree.Tree:
    return None if extra is None else tree.tree_map(torch.clone, extra)


def _deviation(ours: torch.Tensor | None, theirs: torch.Tensor | None, floor: float = 0.0) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()) or ours.shape != theirs.shape:
        return math.inf
    if not ours.numel():
        return 0.0
    ours, theirs = (x if x.is_floating_point() else x.double() for x in (ours, theirs))
    return ((ours - theirs).abs().max() / ours.abs().max().clamp_min(max(floor, torch.finfo(ours.dtype).tiny))).item()


def assert_equivalent(step: Callable, layouts: st.SearchStrategy[Layout] | Sequence[Layout] = UP_TO_FOUR, *,
                      specs: tree.Tree, opt: Any, batches: Callable[[Layout], st.SearchStrategy] | None = None,
                      vocab_size: int | None = None, seed: int = 0, steps: int = 2, reference: Callable | None = None,
                      extra: tree.Tree = None, tolerance: float | None = None, examples: int = 25,
                      derandomize: bool = True) -> None:
    """Assert that `step(state, batch, ops)` is the same function on every drawn layout (laws 1 to 3 and 5).

    `specs` describe its parameters, `opt` is an (init, update) pair, the step's metrics have `"loss"`.
    `batches(layout)` is a strategy of global batches that `xtf.data.cut` can cut; by default
    `token_batches(vocab_size)`. `layouts` is a strategy or a list. `reference` is the step that one process runs, where
    it is another one (whole batches against micro-batches). `extra` is what `TrainState.extra` holds before the first
    step.

    The loss, all gradients and whatever scalars the step reports must agree to `tolerance`, relative to each leaf's
    largest value (at least a thousandth of the tree's): by default 4096 roundings of the narrowest dtype in `specs`
    (the drawn sums have fewer terms), and parameters to 1000 times that, since AdamW divides by sqrt(v) + 1e-8 and so
    amplifies the rounding of gradients near zero.

    Raises AssertionError that names the layout, the leaf and the deviation, shrunk to the smallest mesh and batch.
    """
    if batches is None:
        if vocab_size is None:
            raise ValueError("assert_equivalent: give vocab_size, or batches(layout) for batches of your own")
        batches = token_batches(vocab_size)
    bound = tolerance if tolerance is not None else 4096 * max(torch.finfo(p.dtype).eps for p in tree.leaves(specs))
    draw_layout = layouts if isinstance(layouts, st.SearchStrategy) else st.sampled_from(list(layouts))

    @settings(max_examples=examples, deadline=None, derandomize=derandomize, database=None, print_blob=False,
              report_multiple_bugs=False,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
              phases=[Phase.explicit, Phase.generate, Phase.shrink])
    @given(st.data())
    def check(data: Any) -> None:
        layout = data.draw(draw_layout, label="layout")
        batch = data.draw(batches(layout), label="batch")
        e = compare(step, layout, batch, specs=specs, opt=opt, seed=seed, steps=steps, reference=reference, extra=extra)
        where = f"on {layout}, batch of {', '.join(f'{k} {tuple(v.shape)}' for k, v in tree.flatten_with_path(batch))}"
        assert e.grad <= bound, (f"gradient of {e.grad_leaf} differs by {e.grad:.2e} of its largest "
                                 f"(bound {bound:.1e}) {where}")
        assert e.loss <= bound, f"loss differs by {e.loss:.2e} (bound {bound:.1e}) {where}"
        assert e.metric <= bound, f"metric {e.metric_name} differs by {e.metric:.2e} (bound {bound:.1e}) {where}"
        assert e.param <= 1000 * bound, (f"parameter {e.param_leaf} differs by {e.param:.2e} after {steps} steps "
                                         f"(bound {1000 * bound:.1e}) {where}")

    check()


__all__ = ["Equivalence", "Layout", "assert_equivalent", "compare", "layouts", "run_layout", "shared_mesh", "spy",
           "token_batches", "whole"]
