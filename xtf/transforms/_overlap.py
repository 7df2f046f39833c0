"""`overlap`: two micro-batches at once, the messages of one under the compute of the other.

Whatever packs a block is given are two halves, and the stages of the block (`xtf.moe.staged`) run in turns: while one
half's tokens are on their way to their experts, the other half computes. Autograd runs backward in the reverse order,
so it interleaves as well. Parameters are made whole once for both.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree  # torch.compile traces it

from xtf import tree
from xtf.moe import interleave
from xtf.ops import Ops
from xtf.transform import Env, Stage, Transform


def overlap() -> Transform:
    """Interleave the two halves of every micro-batch's packs in blocks that have stages; other blocks run as they are.

    Raises ValueError, when the step runs, if the packs of a micro-batch do not divide by two.

    Source: DualPipe's overlap of computation and communication (arXiv 2412.19437, section 3.2.1), within one rank's
    forward and backward.

    >>> overlap().name
    'overlap'
    """
    def wrap(ops: Ops, env: Env) -> Ops:
        def scan(block: Callable, layers: Sequence, x: Any, *shared: Any, **kwargs: Any) -> tuple[Any, list]:
            fn, keywords = block, {}
            if isinstance(block, partial) and not block.args:
                fn, keywords = block.func, block.keywords
            if hasattr(fn, "stages"):
                block = partial(_in_halves, fn, **keywords)         # by its parts, as jit keeps what it has compiled
                shared = tuple(map(_told, shared))
            return ops.scan(block, layers, x, *shared, **kwargs)
        return replace(ops, scan=scan)
    return Transform("overlap", Stage.OVERLAP, wrap)


class _Halves(NamedTuple):
    """What is two halves already."""
    first: torch.Tensor
    second: torch.Tensor


def _told(value: Any) -> Any:
    """Segments that say how long their documents are (`Batch.longest`) as halves that say so: torch.compile, under
    which the rest is divided, cannot tell them."""
    if not hasattr(value, "longest") or len(value) % 2:
        return value
    halves = _Halves(*value.chunk(2))
    for x in halves:
        x.longest = value.longest  # pyright: ignore[reportAttributeAccessIssue]
    return halves


def _in_halves(block: Any, params: tree.Tree, x: torch.Tensor, *shared: Any, **keywords: Any) -> tuple[Any, Any]:
    if len(x) % 2:
        raise ValueError(f"overlap: {len(x)} packs in a micro-batch are not two halves; give micro-batches an even "
                         "number of packs")
    half = lambda i, values: pytree.tree_map(lambda v: v.chunk(2)[i] if isinstance(v, torch.Tensor) else v, values)
    halves = lambda i: [v[i] if isinstance(v, _Halves) else half(i, v) for v in (x, *shared)]
    running = []
    for i in range(2):
        xs = {"xs": half(i, keywords["xs"])} if "xs" in keywords else {}
        running.append(block.stages(params, *halves(i), **(keywords | xs)))
    return pytree.tree_map(lambda *ys: torch.cat(ys) if isinstance(ys[0], torch.Tensor) else ys[0],
                           *interleave(*running))
