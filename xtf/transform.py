"""`Transform`, a placement rule plus a wrapper of `Ops`, and `Env`, what its wrapper may know."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import tree
from xtf.layout import local
from xtf.ops import Ops


@dataclass(frozen=True)
class Env:
    """What a transform's `wrap` may know: the mesh, the token axes, the layout, the dtype that a leaf computes in, and
    whether that is another than it is stored in for any."""
    mesh: DeviceMesh | None
    tokens: tuple[str, ...]
    layout: Any
    cast: Callable[[torch.Tensor], torch.dtype]
    casts: bool
    size: Callable[[str], int]
    rank: Callable[[str], int]
    group: Callable[..., Any]


def _unchanged(x: Any, *_: Any) -> Any:
    return x


@dataclass(frozen=True)
class Transform:
    """A placement rule plus a wrapper of `Ops`. Everything but name and stage has a neutral default.

    wrap(ops, env) -> ops; specs(specs) -> specs; claim(param) -> {mesh axis: tensor dim} that it computes over;
    store: mesh axes it stores leaves over; tokens: mesh axes along which it divides positions; partial(param) -> mesh
    axes along which a whole leaf still sees different work; cast(leaf) -> the dtype it computes in, or None; step(run)
    -> run wraps the step. `shard` applies transforms by ascending stage: 0 precision, 10 storage, 20 sequence, 25
    experts, 30 weights, 40 remat, 50 jit, 60 overlap.
    """
    name: str
    stage: int
    wrap: Callable[[Ops, Env], Ops] = _unchanged
    specs: Callable[[tree.Tree], tree.Tree] = _unchanged
    claim: Callable[[Any], dict[str, int]] = lambda p: {}
    store: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    partial: Callable[[Any], tuple[str, ...]] = lambda p: ()
    cast: Callable[[torch.Tensor], torch.dtype | None] | None = None
    step: Callable[[Callable], Callable] = _unchanged


def computed(p: torch.Tensor, env: Env) -> torch.Tensor:
    """A leaf that is whole on this rank, as the model sees it: unwrapped, in its compute dtype."""
    x = local(p)
    return x.to(env.cast(x))
