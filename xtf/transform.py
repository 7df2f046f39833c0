"""`Transform`, a placement rule plus a wrapper of `Ops`; `Stage`, its turn; `Env`, what its wrapper may know."""
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import tree
from xtf.layout import local
from xtf.ops import Ops


@dataclass(frozen=True)
class Env:
    """What a transform's `wrap` may know: the mesh, the token axes, the layout, the dtype that a leaf computes in, and
    whether that is another than it is stored in for any; `group(*axes)` is a process group, `sums` is told when a
    gradient is final (`xtf.parallel.sums`)."""
    mesh: DeviceMesh | None
    tokens: tuple[str, ...]
    layout: Any
    cast: Callable[[torch.Tensor], torch.dtype]
    casts: bool
    size: Callable[[str], int]
    rank: Callable[[str], int]
    group: Callable[..., Any]
    sums: Any = None


class Stage(IntEnum):
    """A transform's turn in `shard`: by ascending stage, whatever order they are given in.

    A later one wraps what the earlier ones made, so its `linear` or `scan` is what the model calls, and calls theirs.

    Choose by what yours does. PRECISION, 0: what leaves compute in. STORAGE, 10: where they are kept (fsdp). SEQUENCE,
    20: positions (ulysses). EXPERTS, 25: tokens to experts (ep). WEIGHTS, 30: what a product is (lora). REMAT, 40: what
    is kept for backward. JIT, 50: what is compiled. OVERLAP, 60: what runs in turns. LAST: what looks at
    all that the others made, as `xtf.testing` does. Any whole number between two of them is a stage too: 5 freezes
    leaves before they are stored, 15 splits products, inside of lora; 55 sees blocks as they are after jit.

    >>> Transform("freeze", 5).stage < Stage.STORAGE < Stage.SEQUENCE
    True
    """
    PRECISION = 0
    STORAGE = 10
    SEQUENCE = 20
    EXPERTS = 25
    WEIGHTS = 30
    REMAT = 40
    JIT = 50
    OVERLAP = 60
    LAST = 1 << 30


def _unchanged(x: Any, *_: Any) -> Any:
    return x


def _no_claim(p: Any) -> dict[str, int]:
    return {}


def _nowhere(p: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Transform:
    """A placement rule plus a wrapper of `Ops`. Everything but name and stage (see `Stage`) has a neutral default.

    wrap(ops, env) -> ops; specs(specs) -> specs; claim(param) -> {mesh axis: tensor dim} that it computes over;
    store: mesh axes it stores leaves over; tokens: mesh axes along which it divides positions; partial(param) -> mesh
    axes along which a whole leaf still sees different work; cast(leaf) -> the dtype it computes in, or None;
    step(run) -> run wraps the step.
    """
    name: str
    stage: int
    wrap: Callable[[Ops, Env], Ops] = _unchanged
    specs: Callable[[tree.Tree], tree.Tree] = _unchanged
    claim: Callable[[Any], dict[str, int]] = _no_claim
    store: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    partial: Callable[[Any], tuple[str, ...]] = _nowhere
    cast: Callable[[torch.Tensor], torch.dtype | None] | None = None
    step: Callable[[Callable], Callable] = _unchanged

    @property
    def needs_mesh(self) -> bool:
        """Whether it places anything: without a mesh such a transform has nothing to do.

        The others belong to the function that a step computes, and `xtf.testing` gives them to the one process that it
        compares with. What wraps `Ops` for the sake of ranks alone leaves them as they are where `env.size(axis)` is 1.

        >>> Transform("freeze", 5).needs_mesh, Transform("store", Stage.STORAGE, store=("dp",)).needs_mesh
        (False, True)
        """
        placing = self.claim is not _no_claim or self.partial is not _nowhere
        return bool(placing or self.store or self.tokens)


def computed(p: torch.Tensor, env: Env) -> torch.Tensor:
    """A leaf that is whole on this rank, as the model sees it: unwrapped, in its compute dtype."""
    x = local(p)
    return x.to(env.cast(x))
