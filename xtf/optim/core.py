"""What every optimizer shares: the pair, `chain`, clipping, and adding the updates to the parameters."""
from typing import Any, NamedTuple, Protocol

import torch

from xtf import tree
from xtf.ops import LOCAL, Ops
from xtf.parallel.collectives import like, local


class Init(Protocol):
    def __call__(self, params: tree.Tree) -> tree.Tree: ...


class Update(Protocol):
    def __call__(self, grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL) -> tuple[tree.Tree, Any]: ...


class Optimizer(NamedTuple):
    """A pair of pure functions, as in optax.

    init(params) -> state: a tree of tensors; each moment has its parameter's placement, and is None at a frozen leaf.
    update(grads, state, params, ops) -> (updates, state): what to add to the parameters; None at leaves without gradient.
        It may overwrite `grads` (updates live in their memory, so no two may share any: `value_and_grad` sees to that), and the
        old state and parameters only if `ops.donate`.

    >>> sgd = Optimizer(lambda params: (), lambda grads, state, params, ops=LOCAL: (tree.tree_map(lambda g: -0.1 * g, grads), state))
    >>> updates, _ = sgd.update({"w": torch.ones(2)}, sgd.init({}), {"w": torch.zeros(2)})
    >>> updates["w"].tolist() == torch.full((2,), -0.1).tolist()
    True
    """
    init: Init
    update: Update


def chain(*txs: Optimizer) -> Optimizer:
    """Each optimizer's updates are the next one's gradients; the state is the tuple of theirs.

    >>> tx = chain(clip_by_global_norm(1.0))
    >>> params = {"w": torch.zeros(2, requires_grad=True)}
    >>> updates, (clip,) = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    >>> [round(u, 3) for u in updates["w"].tolist()], clip["norm"].item()
    ([0.6, 0.8], 5.0)
    """
    def init(params: tree.Tree) -> tree.Tree:
        return tuple(tx.init(params) for tx in txs)

    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL) -> tuple[tree.Tree, Any]:
        states = []
        for tx, old in zip(txs, state, strict=True):
            grads, new = tx.update(grads, old, params, ops)
            states.append(new)
        return grads, tuple(states)
    return Optimizer(init, update)


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """Scale all gradients by `min(1, max_norm / norm)`, with the 2-norm over every stored element of every rank, counted once.

    The norm before clipping is left in the state, `{"norm": float64 scalar}`, for the step to report; nothing waits for it.
    `max_norm=inf` measures and does not clip. A norm that is not finite makes all gradients NaN.

    Raises ValueError if `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm must be positive, got {max_norm}")

    def init(params: tree.Tree) -> tree.Tree:
        device = next((p.device for p in tree.leaves(params)), "cpu")
        return {"norm": torch.zeros((), dtype=torch.float64, device=device)}

    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL) -> tuple[tree.Tree, Any]:
        norm = ops.norm(grads).double()
        present = [local(g) for g in tree.leaves(grads) if g is not None]
        if present:
            torch._foreach_mul_(present, (max_norm / norm).clamp(max=1))
        return grads, {"norm": norm}
    return Optimizer(init, update)


@torch.no_grad()
def apply_updates(params: tree.Tree, updates: tree.Tree, donate: bool = False) -> tree.Tree:
    """`params + updates`: each leaf keeps its dtype (the sum is rounded once), placement and `requires_grad`.

    Fresh leaves, or the memory of the old ones if `donate`. A leaf whose update is None is returned as it is.

    Raises ValueError if the trees differ in structure.

    >>> apply_updates({"w": torch.ones(2), "frozen": torch.ones(1)}, {"w": torch.full((2,), -0.5), "frozen": None})
    {'w': tensor([0.5000, 0.5000]), 'frozen': tensor([1.])}
    """
    pairs = tree.zip_leaves(params, updates)
    moved = [(p, local(p).detach(), local(u)) for p, u in pairs if u is not None]
    if not moved:
        return params
    old, add = [p for _, p, _ in moved], [u for *_, u in moved]
    if donate:
        torch._foreach_add_(old, add)
    new = old if donate else torch._foreach_add(old, add)
    sums = iter([like(x.to(p.dtype), p).requires_grad_(p.requires_grad) for x, (p, *_) in zip(new, moved, strict=True)])
    return tree.unflatten([p if u is None else next(sums) for p, u in pairs], params)
