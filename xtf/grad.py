"""`value_and_grad` and `microbatch`: differentiation as functions of functions.

The engine is `torch.autograd.grad` over detached leaves. `torch.func.grad` would refuse saved-tensor hooks (so
checkpointing and fsdp's handles) and autograd Functions without `setup_context`.
"""
from collections.abc import Callable
from typing import Any

import torch

from xtf import tree
from xtf.layout import like, local
from xtf.ops import LOCAL, Ops


class Taken:
    """Which memory the gradients seen so far occupy. Autograd may return one tensor, or overlapping views, for several
    leaves (`a + b` has one gradient), and expanded ones: these must not be overwritten twice."""

    def __init__(self):
        self.owners: dict[int, list[torch.Tensor]] = {}              # by storage

    def own(self, g: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`g` contiguous in `dtype`, in memory that nobody else's gradient uses: its own, or a copy."""
        if (dtype is None or g.dtype == dtype) and g.is_contiguous():
            # the storage itself: fake tensors have no addresses
            owners = self.owners.setdefault(g.untyped_storage()._cdata, [])
            if not any(_span(g)[0] < _span(o)[1] and _span(o)[0] < _span(g)[1] for o in owners):
                owners.append(g)
                return g
        return g.to(dtype or g.dtype, copy=True, memory_format=torch.contiguous_format)


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a contiguous tensor occupies."""
    start = int(x.storage_offset()) * x.itemsize
    return start, start + x.nbytes


def value_and_grad(share: Callable[..., Any]) -> Callable[..., tuple[Any, tree.Tree]]:
    """`share(params, batch, ops)` → a function of the same arguments that returns (loss, grads).

    `share` returns this rank's part of the loss, a scalar: a sum over the tokens it sees, divided by totals over the
    whole global batch; the returned loss is the sum of all shares, the same on every rank. It may return `(share,
    sums)`, a tree of tensors that is summed over ranks alike; then the result is `((loss, sums), grads)`. A gradient
    has its parameter's shape, dtype and placement, and memory of its own, which may be overwritten; it is None at a
    frozen leaf, and zeros at a trainable one that the loss does not touch.

    Raises ValueError if the share is not a scalar or depends on no trainable parameter.

    >>> share = lambda p, x, ops: (p["w"] * x).sum()
    >>> loss, grads = value_and_grad(share)({"w": torch.ones(2, requires_grad=True)}, torch.ones(2))
    >>> loss.item(), grads["w"].tolist()
    (2.0, [1.0, 1.0])
    """
    def run(params: tree.Tree, batch: Any, ops: Ops = LOCAL) -> tuple[Any, tree.Tree]:
        stored, treedef = tree.flatten(params)
        leaves = [local(p).detach().requires_grad_(p.requires_grad) for p in stored]
        with torch.enable_grad():
            out = share(tree.unflatten([like(x, p) for x, p in zip(leaves, stored, strict=True)], treedef), batch, ops)
        loss, sums = out if isinstance(out, tuple) else (out, None)
        if loss.ndim:
            raise ValueError(f"value_and_grad: the share must be a scalar, got shape {tuple(loss.shape)}; sum over "
                             "the tokens and divide by a total")
        wanted = [x for x in leaves if x.requires_grad]
        if not wanted or not loss.requires_grad:
            raise ValueError("value_and_grad: the share depends on no trainable parameter (all leaves frozen, or "
                             "computed under no_grad?)")
        got = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        grads = ops.collect([next(got) if x.requires_grad else None for x in leaves], leaves)
        taken = Taken()
        for i, (g, x) in enumerate(zip(grads, leaves, strict=True)):
            if g is None:
                grads[i] = torch.zeros_like(x) if x.requires_grad else None
            elif g.shape != x.shape or g.dtype != x.dtype:
                path = tree.flatten_with_path(params)[i][0]
                raise RuntimeError(f"value_and_grad: the gradient of {path} is {g.dtype} {tuple(g.shape)}, its "
                                   f"parameter {x.dtype} {tuple(x.shape)}")
            else:
                grads[i] = taken.own(g)
        total = ops.total(loss.detach())
        result = total if sums is None else (total, tree.tree_map(lambda s: ops.total(s.detach()), sums))
        return result, tree.unflatten([None if g is None else like(g, p) for g, p in zip(grads, stored, strict=True)],
                                      treedef)
    return run


def microbatch(vg: Callable[..., tuple[Any, tree.Tree]], k: int) -> Callable[..., tuple[Any, tree.Tree]]:
    """Run `vg` (a `value_and_grad`) over `k` equal parts of the batch along dim 0, and add losses, sums and gradients.

    Because a loss is a sum of shares, the result is that of the whole batch, at a k-th of its activations.

    Raises ValueError if `k` does not divide the batch.

    >>> vg = value_and_grad(lambda p, x, ops: (p["w"] * x).sum())
    >>> loss, grads = microbatch(vg, 2)({"w": torch.ones(3, requires_grad=True)}, torch.ones(4, 3))
    >>> loss.item(), grads["w"].tolist()
    (12.0, [4.0, 4.0, 4.0])
    """
    if k == 1:
        return vg

    def run(params: tree.Tree, batch: Any, ops: Ops = LOCAL) -> tuple[Any, tree.Tree]:
        for path, x in tree.flatten_with_path(batch):
            if x.shape[0] % k:
                raise ValueError(f"microbatch: {k} parts do not divide the {x.shape[0]} rows of `{path}`; change the "
                                 "batch or k")
        value, grads = vg(params, _part(batch, 0, k), ops)
        for i in range(1, k):
            more, g = vg(params, _part(batch, i, k), ops)
            value = tree.tree_map(torch.add, value, more)
            grads = tree.tree_map(_add_, grads, g)
        return value, grads
    return run


def _part(batch: Any, i: int, k: int) -> Any:
    return tree.tree_map(lambda x: x.narrow(0, i * (x.shape[0] // k), x.shape[0] // k), batch)


def _add_(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is not None:
        local(a).add_(local(b))
    return a
