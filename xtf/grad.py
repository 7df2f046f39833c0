"""`value_and_grad` and `microbatch`: differentiation as functions of functions.

The engine is `torch.autograd.backward` into detached leaves: what autograd, or fsdp's reduce-scatter, has of a leaf's
gradient is added to its `.grad` at once, so over all micro-batches there is one tree of gradients. `torch.func.grad`
would refuse saved-tensor hooks (so checkpointing and fsdp's handles) and autograd Functions without `setup_context`.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
        earlier, before = (None, None) if ops.into is None else ops.into.take()
        # 1. forward
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
        # 2. backward: gradients are added to those of the micro-batches before
        if earlier is not None:
            for x, g in zip(leaves, earlier, strict=True):
                x.grad = g
        adding = None if ops.into is None or ops.into.last else ops.into
        if adding is None:
            ops.watch(leaves)
        torch.autograd.backward(loss, inputs=wanted)
        value = tree.tree_map(torch.Tensor.detach, loss if sums is None else (loss, sums))
        value = value if before is None else tree.tree_map(torch.add, before, value)
        grads: list[Any] = [x.grad for x in leaves]
        del out, loss, sums, before
        # 3. gradients have memory of their own before the next micro-batch's are added to it
        if adding is not None:
            _forget(leaves)
            adding.give(grads if earlier is not None else _own(grads), value)
            return value, None
        value = tree.tree_map(ops.total, value)
        grads = ops.collect(grads, leaves)
        _forget(leaves)
        for i, (g, x) in enumerate(zip(grads, leaves, strict=True)):
            if g is None:
                grads[i] = torch.zeros_like(x) if x.requires_grad else None
            elif g.shape != x.shape or g.dtype != x.dtype:
                path = tree.flatten_with_path(params)[i][0]
                raise RuntimeError(f"value_and_grad: the gradient of {path} is {g.dtype} {tuple(g.shape)}, its "
                                   f"parameter {x.dtype} {tuple(x.shape)}")
        _own(grads)
        return value, tree.unflatten([None if g is None else like(g, p) for g, p in zip(grads, stored, strict=True)],
                                     treedef)
    return run


def _forget(leaves: list) -> None:
    for x in leaves:
        x.grad = None


def _own(grads: list) -> list:
    """Put each gradient into memory of its own, in this list, one after the other."""
    taken = Taken()
    for i, g in enumerate(grads):
        if g is not None:
            grads[i] = taken.own(g)
    return grads


@dataclass
class Adding:
    """What `microbatch` tells `value_and_grad` through `Ops.into`: whether this micro-batch is the `last`, and the
    gradients and shares so far, kept here meanwhile. A function that calls `value_and_grad` more than once has some for
    each call."""
    last: bool = False
    call: int = 0
    grads: dict[int, list] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)

    def take(self) -> tuple[list | None, Any]:
        """Gradients and shares of the micro-batches before, for this call of `value_and_grad`; None at the first."""
        self.call += 1
        return self.grads.pop(self.call, None), self.values.pop(self.call, None)

    def give(self, grads: list, value: Any) -> None:
        self.grads[self.call], self.values[self.call] = grads, value


def microbatch(vg: Callable[..., tuple[Any, tree.Tree]], k: int) -> Callable[..., tuple[Any, tree.Tree]]:
    """Run `vg` (a `value_and_grad`) over `k` equal parts of the batch along dim 0, and add losses, sums and gradients.

    Because a loss is a sum of shares, the result is that of the whole batch, at a k-th of its activations. There is one
    tree of gradients at any k, which each micro-batch adds to, and what is summed over ranks by all-reduces is summed
    once: until the last micro-batch `value_and_grad` returns this rank's shares so far, and None for gradients. A `vg`
    of your own around it, which does something with them, asks `ops.into is None or ops.into.last`; one that returns
    trees each time (it gave `value_and_grad` other `ops`) has them, and the losses, added.

    Raises ValueError if `k` does not divide the batch.

    >>> vg = value_and_grad(lambda p, x, ops: (p["w"] * x).sum())
    >>> loss, grads = microbatch(vg, 2)({"w": torch.ones(3, requires_grad=True)}, torch.ones(4, 3))
    >>> loss.item(), grads["w"].tolist()
    (12.0, [4.0, 4.0, 4.0])
    """
    if k == 1:
        return vg

    def run(params: tree.Tree, batch: Any, ops: Ops = LOCAL) -> tuple[Any, tree.Tree]:
        adding, value, grads = Adding(), None, None
        for i, part in enumerate(parts(batch, k)):
            adding.last, adding.call = i == k - 1, 0
            more, g = vg(params, part, replace(ops, into=adding))
            if g is not None:                                        # else the last call's are those of all
                value = more if grads is None else tree.tree_map(torch.add, value, more)
                grads = g if grads is None else tree.tree_map(_add_, grads, g)
        return value, grads
    return run


def parts(batch: Any, k: int) -> Iterator[Any]:
    """`k` equal parts of a batch along dim 0, views of it.

    Raises ValueError if `k` does not divide it.

    >>> [part.tolist() for part in parts(torch.arange(4), 2)]
    [[0, 1], [2, 3]]
    """
    for path, x in tree.flatten_with_path(batch):
        if x.shape[0] % k:
            raise ValueError(f"microbatch: {k} parts do not divide the {x.shape[0]} rows of `{path}`; change the "
                             "batch or k")
    for i in range(k):
        yield tree.tree_map(lambda x, i=i: x.narrow(0, i * (x.shape[0] // k), x.shape[0] // k), batch)


def _add_(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is not None:
        local(a).add_(local(b))
    return a
