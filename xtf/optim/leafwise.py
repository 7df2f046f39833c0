"""Optimizers that treat each number by itself: stochastic gradient descent and Lion, written as rules."""
from collections.abc import Callable
from typing import Any

import torch

from xtf import device, tree
from xtf.layout import like, local
from xtf.ops import LOCAL, Ops
from xtf.optim.core import Mask, Optimizer, chosen, count, known, moment, of_dtype, refusal
from xtf.optim.schedules import Schedule


def sgd(lr: float | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
        mask: Mask | None = None) -> Optimizer:
    """Stochastic gradient descent, with momentum if there is any.

    With g the gradient of a parameter p, and g' = g + weight_decay p:

        m = momentum m + g'                    update = -lr (g' + momentum m if nesterov else m)

    Args:
        lr: the learning rate, a number, or a schedule that is called with the number of steps done.
        momentum: the decay of m a step, in [0, 1); by default there is no m.
        nesterov: whether the update looks one step of momentum ahead.
        weight_decay: the part of p that is added to its gradient, and so enters the momentum as in torch.optim.SGD.
        mask: `mask(path, leaf)` says which leaves decay; by default all do.

    Returns: an `Optimizer` with the state `{"step": int64 scalar, "m": tree}`, without "m" where momentum is 0. m has
    at least float32 and lies as its parameter lies.

    Raises: ValueError, when it updates, for a gradient of another shape than its parameter, or at a leaf that was
    frozen when the state was made.

    Reference: Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.

    >>> tx, params = sgd(0.1), {"w": torch.zeros(2, requires_grad=True)}
    >>> updates, _ = tx.update({"w": torch.tensor([2.0, -3.0])}, tx.init(params), params)
    >>> [round(u, 4) for u in updates["w"].tolist()]
    [-0.2, 0.3]
    """
    def rule(g: torch.Tensor, p: torch.Tensor, *ms: torch.Tensor, rate: Any, decay: bool) -> tuple[torch.Tensor, ...]:
        g = g + weight_decay * p if decay else g
        if not ms:
            return (g * -rate,)
        m = momentum * ms[0] + g
        return (g + momentum * m if nesterov else m) * -rate, m
    return _leafwise("sgd", "m" if momentum else "", rule, lr, mask)


def lion(lr: float | Schedule, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.1,
         mask: Mask | None = None) -> Optimizer:
    """The sign of a momentum, with decoupled weight decay.

    With g the gradient of a parameter p:

        update = -lr (sign(b1 m + (1 - b1) g) + weight_decay p)                    m = b2 m + (1 - b2) g

    Args:
        lr: the learning rate, a number, or a schedule that is called with the number of steps done; a third to a tenth
            of AdamW's.
        b1: the part of m in the sign, in [0, 1).
        b2: the decay of m a step, in [0, 1).
        weight_decay: the part of p that is taken off a step, before it is multiplied by lr: three to ten times AdamW's.
        mask: `mask(path, leaf)` says which leaves decay; by default all do.

    Returns: an `Optimizer` with the state `{"step": int64 scalar, "m": tree}`. m has at least float32 and lies as its
    parameter lies.

    Raises: ValueError, when it updates, for a gradient of another shape than its parameter, or at a leaf that was
    frozen when the state was made.

    Reference: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, program 1.

    >>> tx, params = lion(0.1), {"w": torch.zeros(2, requires_grad=True)}
    >>> updates, _ = tx.update({"w": torch.tensor([2.0, -3.0])}, tx.init(params), params)
    >>> [round(u, 4) for u in updates["w"].tolist()]
    [-0.1, 0.1]
    """
    def rule(g: torch.Tensor, p: torch.Tensor, m: torch.Tensor, *, rate: Any, decay: bool) -> tuple[torch.Tensor, ...]:
        step = (b1 * m + (1 - b1) * g).sign_()
        return (step + weight_decay * p if decay else step) * -rate, b2 * m + (1 - b2) * g
    return _leafwise("lion", "m", rule, lr, mask)


def _leafwise(name: str, slots: str, rule: Callable[..., tuple[torch.Tensor, ...]], lr: float | Schedule,
              mask: Mask | None) -> Optimizer:
    """`rule(g, p, *old slots, rate=, decay=) -> (update, *new slots)` on flat pieces of a leaf, at least float32."""
    def init(params: tree.Tree) -> tree.Tree:
        return {"step": count(params), **{s: tree.tree_map(moment, params) for s in slots}}

    @torch.no_grad()
    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
               **extra: Any) -> tuple[tree.Tree, Any]:
        ok = known(extra, ops)[1]
        rate = lr(state["step"]) if callable(lr) else lr
        out: list[tuple] = []
        paths = tree.flatten_with_path(params)
        leaves = tree.zip_leaves(params, grads, *(state[s] for s in slots))
        for (path, p), (_, g, *old) in zip(paths, leaves, strict=True):
            if g is None:
                out.append((None, *old))
                continue
            if g.shape != p.shape or any(x is None for x in old):
                raise refusal(name, path, g, p)
            u = local(g).to(torch.promote_types(g.dtype, torch.float32)).contiguous()
            new = [local(x).contiguous() if ops.donate else local(x).clone(memory_format=torch.contiguous_format)
                   for x in old]
            pieces = zip(*(x.reshape(-1).split(device.piece(u.device)) for x in (u, local(p), *new)), strict=True)
            rate_ = of_dtype(rate, u.dtype)
            for g_, p_, *slots_ in pieces:
                step, *moved = rule(g_, p_.to(g_.dtype), *slots_, rate=rate_, decay=mask is None or mask(path, p))
                g_.copy_(chosen(ok, step, -0.0))
                for slot, x in zip(slots_, moved, strict=True):
                    slot.copy_(chosen(ok, x, slot))
            out.append((like(u, g), *[like(x, o) for x, o in zip(new, old, strict=True)]))
        columns = [tree.unflatten(column, params) for column in zip(*out, strict=True)] or [params]
        return columns[0], {"step": state["step"] + (1 if ok is None else ok),
                            **dict(zip(slots, columns[1:], strict=False))}
    return Optimizer(init, update)
