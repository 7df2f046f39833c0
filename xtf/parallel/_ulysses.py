"""`ulysses`: positions divided over an axis; around attention, heads are divided instead.

Each rank holds t = T / W consecutive positions of every pack. Before attention an all-to-all scatters heads and gathers
positions; after it the reverse. Key-value heads fewer than (or not divided by) the axis are repeated exactly as often
as needed, lcm(K, W) / K times; the adjoint of the repetition adds their gradients. Segments stay whole. Nothing else in
a model sees other positions.

Bytes each layer and pass, from a rank: (W - 1) / W × (q + k + v + o), with k and v after repetition; backward the same.
Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""
import math
from dataclasses import replace
from typing import Any

import torch

from xtf import tree
from xtf.ops import Ops
from xtf.parallel.collectives import all_to_all
from xtf.transform import Env, Stage, Transform


def ulysses(axis: str = "sp") -> Transform:
    """Divide the sequence over a mesh axis ("sp", as `xtf.data` does; for another cut labels and masks yourself).

    Raises ValueError if the axis does not divide the query heads: from `shard` where specs tell (a leaf's dim called
    "heads" has all of them, times the dims of one, which q_norm has), else when the step runs; then, too, if it does
    not divide the positions.

    >>> ulysses("sp").tokens
    ('sp',)
    """
    seen: list[tree.Tree] = []

    def specs(specs: tree.Tree) -> tree.Tree:
        seen[:] = [specs]
        return specs

    def wrap(ops: Ops, env: Env) -> Ops:
        if env.size(axis) == 1:
            return ops
        for specs in seen:
            _check(specs, axis, env.size(axis))
        return _wrap(ops, env, axis)
    return Transform("ulysses", Stage.SEQUENCE, wrap, specs=specs, tokens=(axis,))


def _check(specs: tree.Tree, axis: str, W: int) -> None:
    """Raise where a dim called "heads" shows that `axis` does not divide the heads: what is left over of the dim is not
    always enough to tell (6 heads of 2 divide over 4), so the dims of one head are taken out where a leaf has them."""
    leaves = tree.flatten_with_path(specs)
    dims = {p.shape[0] for _, p in leaves if p.axes == ("head_dim",)}
    each = dims.pop() if len(dims) == 1 else 1
    for path, p in leaves:
        for n in (n for n, name in zip(p.shape, p.axes, strict=True) if name == "heads"):
            heads = n // each if len(p.shape) > 1 and n % each == 0 else n
            if heads % W:
                what = f"{heads} query heads" if each > 1 else f'the "heads" of {path}, {n},'
                raise ValueError(f"ulysses: {axis}={W} does not divide {what}; use an axis whose size divides the "
                                 "query heads")


def _wrap(ops: Ops, env: Env, axis: str) -> Ops:
    W, rank, group = env.size(axis), env.rank(axis), env.group(axis).name

    def split(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        if x.shape[dim] % W:
            raise ValueError(f"ulysses: {axis}={W} does not divide {x.shape[dim]} positions; make the sequence length "
                             f"a multiple of {W}")
        return ops.split(x, dim).chunk(W, dim)[rank]

    def scatter_heads(x_PtHd: torch.Tensor) -> torch.Tensor:
        P, t, H, d = x_PtHd.shape
        # [W, P, t, H/W, d], W the source's positions
        by_rank = all_to_all(x_PtHd.view(P, t, W, H // W, d).movedim(2, 0), group)
        return by_rank.movedim(0, 1).reshape(P, W * t, H // W, d)

    def gather_heads(x_PThd: torch.Tensor) -> torch.Tensor:
        P, T, h, d = x_PThd.shape
        # [W, P, t, H/W, d], W the source's heads
        by_rank = all_to_all(x_PThd.reshape(P, W, T // W, h, d).movedim(1, 0), group)
        return by_rank.movedim(0, 2).reshape(P, T // W, W * h, d)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, segments: torch.Tensor,
               sinks: torch.Tensor | None = None, **kw: Any) -> torch.Tensor:
        H, K = q.shape[2], k.shape[2]
        if H % W:
            raise ValueError(f"ulysses: {axis}={W} does not divide {H} query heads; use an axis whose size divides "
                             "the heads")
        repeat = math.lcm(K, W) // K
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        if sinks is not None:
            sinks = sinks.chunk(W)[rank]
        return gather_heads(ops.attend(scatter_heads(q), scatter_heads(k), scatter_heads(v), segments=segments,
                                       sinks=sinks, **kw))

    return replace(ops, split=split, attend=attend)
