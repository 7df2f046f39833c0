"""An exponential moving average of the parameters."""
from typing import NamedTuple, Protocol

import torch

from xtf import tree
from xtf.layout import like, local
from xtf.ops import LOCAL, Ops
from xtf.optim.core import chosen


class EmaUpdate(Protocol):
    def __call__(self, average: tree.Tree, params: tree.Tree, ops: Ops = LOCAL,
                 ok: torch.Tensor | None = None) -> tree.Tree: ...


class EmaInit(Protocol):
    def __call__(self, params: tree.Tree) -> tree.Tree: ...


class Ema(NamedTuple):
    """See `ema`."""
    init: EmaInit
    update: EmaUpdate


def ema(decay: float) -> Ema:
    """An exponential moving average of the parameters over steps, for `TrainState.extra`.

    With p a parameter after the step:

        e = decay e + (1 - decay) p

    Args:
        decay: the part of the average that stays a step, in [0, 1).

    Returns: an `Ema`, the pair of init(params) -> average and update(average, params, ops, ok=None) -> the next one.
    The average begins as a copy of the parameters, so that there is no bias to correct. It has at least float32, lies
    as the parameters lie, and is None at frozen leaves. The next one is in the old one's memory if `ops.donate`; where
    `ok` is False it is the old one. `averaged(average, params)` is the tree to evaluate or save.

    Raises: ValueError for a decay that is not in [0, 1).

    Reference: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992.

    >>> tx, params = ema(0.75), {"w": torch.zeros(1, requires_grad=True)}
    >>> tx.update(tx.init(params), {"w": torch.ones(1, requires_grad=True)})
    {'w': tensor([0.2500])}
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}")

    def start(p: torch.Tensor) -> torch.Tensor | None:
        wide = torch.promote_types(p.dtype, torch.float32)
        return like(local(p).detach().to(wide, copy=True), p.detach()) if p.requires_grad else None

    @torch.no_grad()
    def update(average: tree.Tree, params: tree.Tree, ops: Ops = LOCAL, ok: torch.Tensor | None = None) -> tree.Tree:
        def move(p: torch.Tensor, e: torch.Tensor | None) -> torch.Tensor | None:
            if e is None:
                return None
            new = chosen(ok, torch.lerp(local(e), local(p).to(e.dtype), 1 - decay), local(e))
            return like(local(e).copy_(new) if ops.donate else new, e)
        return tree.tree_map(move, params, average)
    return Ema(lambda params: tree.tree_map(start, params), update)


@torch.no_grad()
def averaged(average: tree.Tree, params: tree.Tree) -> tree.Tree:
    """The parameters with their averages in their place, in the parameters' dtypes; frozen ones as they are.

    >>> averaged({"w": torch.ones(1), "frozen": None}, {"w": torch.zeros(1).bfloat16(), "frozen": torch.zeros(1)})
    {'w': tensor([1.], dtype=torch.bfloat16), 'frozen': tensor([0.])}
    """
    cast = lambda p, e: like(local(e).to(p.dtype), p).requires_grad_(p.requires_grad)
    return tree.tree_map(lambda p, e: p if e is None else cast(p, e), params, average)
