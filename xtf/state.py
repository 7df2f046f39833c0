"""All that a run is, as one value."""
from dataclasses import field, replace
from typing import Any

import torch

from xtf import tree
from xtf.optim.core import apply_updates, taken


@tree.dataclass_tree
class TrainState:
    """Step count, parameters, optimizer state, whatever else the step updates, and the random key.

    `step` is an int64 scalar tensor; `extra` holds what the step itself updates beside the parameters; `key`, an int64
    scalar, is for steps that draw at random. No step of today's recipes does; those of reinforcement learning will.

    >>> state = TrainState.create({"w": torch.ones(2, requires_grad=True)}, opt=())
    >>> int(state.step)
    0
    """
    step: torch.Tensor
    params: Any
    opt: Any
    extra: Any
    key: torch.Tensor
    donated: bool = field(default=False, metadata={"static": True})

    @classmethod
    def create(cls, params: tree.Tree, opt: tree.Tree, extra: Any = None, seed: int = 0) -> "TrainState":
        """The state before the first step."""
        return cls(torch.zeros((), dtype=torch.int64), params, opt, {} if extra is None else extra, torch.tensor(seed))

    @property
    def taken(self) -> torch.Tensor:
        """How many steps the optimizer has taken: its own count, on its device, without those that it skipped.

        This, not `step`, is what its schedule is called with: `schedule(state.taken)` is the rate of the step at hand.
        """
        return taken(self.opt)

    def apply(self, updates: tree.Tree, opt: tree.Tree, extra: Any = None) -> "TrainState":
        """The next state: parameters plus updates (None where frozen), the new optimizer state, one step more."""
        return replace(self, step=self.step + 1, params=apply_updates(self.params, updates, donate=self.donated),
                       opt=opt, extra=self.extra if extra is None else extra)

    def poison(self) -> None:
        """Make every later use raise: this state's memory is now the next state's."""
        for name in ("step", "params", "opt", "extra", "key"):
            object.__setattr__(self, name, _Donated(name))


class _Donated:
    """What stands where a donated field was; anything done with it raises."""

    def __init__(self, field: str):
        object.__setattr__(self, "_field", field)

    def _raise(self, *args: Any, **kwargs: Any) -> Any:
        name = object.__getattribute__(self, "_field")
        raise RuntimeError(f"TrainState.{name} was donated to a step and overwritten; use the state that the step "
                           "returned, or jit(donate=False)")

    __getattribute__ = __getitem__ = __iter__ = __len__ = __int__ = __float__ = __bool__ = __add__ = __radd__ = _raise
