"""What every optimizer shares: the pair, `chain`, clipping, and adding the updates to the parameters."""
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from xtf import tree
from xtf.layout import like, local
from xtf.ops import LOCAL, Ops

Mask = Callable[[str, torch.Tensor], bool]


class Init(Protocol):
    def __call__(self, params: tree.Tree) -> tree.Tree: ...


class Update(Protocol):
    def __call__(self, grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
                 **extra: Any) -> tuple[tree.Tree, Any]: ...


class Optimizer(NamedTuple):
    """A pair of pure functions, as in optax.

    init(params) -> state: a tree of tensors; each moment has its parameter's placement, and is None at a frozen leaf.
    update(grads, state, params, ops, **extra) -> (updates, state): what to add to the parameters; None at leaves
        without gradient. It may overwrite `grads` (updates live in their memory, so no two may share any:
        `value_and_grad` sees to that), and the old state and parameters only if `ops.donate`.

    Extras, each of which may be missing, and which nothing waits for on the host:
        norm: the 2-norm of `grads`, a scalar tensor, so that it need not be taken again.
        ok: a bool scalar tensor on the parameters' device, the same on every rank. Where it is False the new state is
            the old one bit for bit, and the updates leave every bit of the parameters (they are zeros), whatever is in
            `grads`: the step is skipped. What only scales gradients for the next in a `chain` passes them on as is.

    >>> scale = lambda grads, state, params, ops=LOCAL, **extra: (tree.tree_map(lambda g: -0.1 * g, grads), state)
    >>> tx = Optimizer(lambda params: (), scale)
    >>> updates, _ = tx.update({"w": torch.ones(2)}, tx.init({}), {"w": torch.zeros(2)})
    >>> updates["w"].tolist() == torch.full((2,), -0.1).tolist()
    True
    """
    init: Init
    update: Update


def known(extra: dict[str, Any], ops: Ops) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(norm, ok) of an update's extras, `ok` False also where the layout was not up to the step.

    Raises TypeError for any other name.
    """
    if extra.keys() - {"norm", "ok"}:
        raise TypeError(f"update: unknown extras {sorted(extra.keys() - {'norm', 'ok'})}; known are norm and ok")
    return extra.get("norm"), ops.sound(extra.get("ok"))


def count(params: tree.Tree) -> torch.Tensor:
    """The number of steps taken so far, an int64 zero where the parameters are: the host never waits for `ok`."""
    where = next((p.device for p in tree.leaves(params)), "cpu")
    return torch.zeros((), dtype=torch.int64, device=where)


def taken(state: Any) -> torch.Tensor:
    """The count of an optimizer's state: how many steps it has taken, which is what its schedule is called with.

    Optimizers behind a `partition` count alike, but for one that has no leaves and stays at 0.

    Raises ValueError if nothing in the state counts.

    >>> tx, params = clip_by_global_norm(1.0), {"w": torch.ones(1)}
    >>> taken((tx.init(params), {"muon": {"step": torch.tensor(0)}, "adamw": {"step": torch.tensor(7)}})).item()
    7
    """
    counts = list(_counts(state))
    if not counts:
        raise ValueError("taken: this optimizer's state has no count of steps: nothing in it is called `step`")
    return counts[0] if len(counts) == 1 else torch.stack(counts).amax()


def _counts(state: Any) -> Iterator[torch.Tensor]:
    """The scalars called `step` nearest to the root: below them are trees of moments, with names of their own."""
    if isinstance(state, dict) and isinstance(state.get("step"), torch.Tensor):
        yield state["step"]
    elif isinstance(state, dict | tuple | list):
        for child in state.values() if isinstance(state, dict) else state:
            yield from _counts(child)


def moment(p: torch.Tensor) -> torch.Tensor | None:
    """Zeros placed as a leaf, in at least float32; None for a frozen one."""
    if not p.requires_grad:
        return None
    return torch.zeros_like(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32),
                            memory_format=torch.contiguous_format)


def refusal(name: str, path: str, g: torch.Tensor, p: torch.Tensor) -> ValueError:
    """What to raise for a gradient of another shape than its parameter, or at a leaf that was frozen at init."""
    what = "its moments are None: it was frozen at init; init the optimizer again"
    if g.shape != p.shape:
        what = f"its parameter has {tuple(p.shape)}"
    return ValueError(f"{name}: {path} has a gradient of shape {tuple(g.shape)}, but {what}")


def chosen(ok: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor | float) -> torch.Tensor:
    """`new` where the step is taken, else `old`, bit for bit.

    For updates `old` is -0.0: the one number that added to x gives x for every x (0.0 would turn -0.0 into 0.0).
    """
    return new if ok is None else torch.where(ok, new, old)


def by_dtype(tensors: list[torch.Tensor]) -> dict[torch.dtype, list[torch.Tensor]]:
    """Tensors put together by dtype: on CUDA torch takes a list of one dtype in one launch, another leaf by leaf."""
    lists: dict[torch.dtype, list[torch.Tensor]] = {}
    for x in tensors:
        lists.setdefault(x.dtype, []).append(x)
    return lists


def of_dtype(number: Any, dtype: torch.dtype) -> Any:
    """A scalar tensor in the dtype of what it multiplies, to which torch rounds it anyway; a Python number as it is.

    On CUDA a list times a scalar of another dtype goes leaf by leaf, and a tensor through a slower kernel. Narrow
    tensors get float32: one of their own would round the scalar to their 8 bits first.

    >>> of_dtype(torch.tensor(0.1, dtype=torch.float64), torch.bfloat16).dtype, of_dtype(0.1, torch.float32)
    (torch.float32, 0.1)
    """
    return number.to(torch.promote_types(dtype, torch.float32)) if isinstance(number, torch.Tensor) else number


def chain(*txs: Optimizer) -> Optimizer:
    """Each optimizer's updates are the next one's gradients.

    The extra `ok` goes to all of them, `norm` to the first alone, whose gradients it is of.

    Args:
        *txs: the optimizers, in the order in which they see the gradients; the last one's updates are the chain's.

    Returns: an `Optimizer` whose state is the tuple of theirs.

    Raises: what they raise.

    >>> tx = chain(clip_by_global_norm(1.0))
    >>> params = {"w": torch.zeros(2, requires_grad=True)}
    >>> updates, (clip,) = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    >>> [round(u, 3) for u in updates["w"].tolist()], clip["norm"].item()
    ([0.6, 0.8], 5.0)
    """
    def init(params: tree.Tree) -> tree.Tree:
        return tuple(tx.init(params) for tx in txs)

    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
               **extra: Any) -> tuple[tree.Tree, Any]:
        states = []
        for tx, old in zip(txs, state, strict=True):
            grads, new = tx.update(grads, old, params, ops, **extra)
            extra.pop("norm", None)                                    # it was that of the gradients that came in
            states.append(new)
        return grads, tuple(states)
    return Optimizer(init, update)


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """Scale all gradients down to a 2-norm, that of all of them together.

    With norm = sqrt(Σ g²) over every stored element of every rank, counted once:

        update = g min(1, max_norm / norm)

    A norm that is not finite makes all gradients NaN. Given the extra `norm`, nothing is measured.

    Args:
        max_norm: the largest norm that passes unscaled; inf measures and does not clip.

    Returns: an `Optimizer` to stand first in a `chain`. Its state `{"norm": float64 scalar}` is the norm before
    clipping, for the step to report; nothing waits for it.

    Raises: ValueError if `max_norm` is not positive.

    Reference: Pascanu et al., On the difficulty of training recurrent neural networks, 2013, algorithm 1.

    >>> tx, params = clip_by_global_norm(1.0), {"w": torch.zeros(2)}
    >>> updates, state = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    >>> [round(u, 3) for u in updates["w"].tolist()], state["norm"].item()
    ([0.6, 0.8], 5.0)
    """
    if not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm must be positive, got {max_norm}")

    def init(params: tree.Tree) -> tree.Tree:
        device = next((p.device for p in tree.leaves(params)), "cpu")
        return {"norm": torch.zeros((), dtype=torch.float64, device=device)}

    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
               **extra: Any) -> tuple[tree.Tree, Any]:
        norm, ok = known(extra, ops)
        norm = (ops.norm(grads) if norm is None else norm).double()
        present = [local(g) for g in tree.leaves(grads) if g is not None]
        scale = (max_norm / norm).clamp(max=1)
        for dtype, same in by_dtype(present).items():
            torch._foreach_mul_(same, of_dtype(scale, dtype))
        return grads, {"norm": chosen(ok, norm, state["norm"])}
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
