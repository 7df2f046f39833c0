"""`bf16`: matrices move and multiply in bfloat16, while the stored masters, the moments and the gradients' sums stay as
they are. `fp64`: all of it in float64."""
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from xtf import tree
from xtf.layout import local
from xtf.spec import is_matrix
from xtf.transform import Stage, Transform

# what is bf16 already is said to stay so: `lora` would widen a base that it stores in bf16
CAST = torch.float32, torch.float64, torch.bfloat16


def bf16(routers: bool = False) -> Transform:
    """Matrices (`xtf.spec.is_matrix`) compute in bfloat16; norms, biases (those of stacked experts too) and sinks stay,
    since kernels take their statistics in at least float32 anyway, and gathering them costs nothing.

    So do the routers of families that score tokens in float32 (`Param.wide`), unless `routers` asks for them.

    Casts stand before fsdp's gather, so half the bytes move. Gradients come back in the masters' dtype.

    >>> bf16().cast(torch.ones(2, 2)), bf16().cast(torch.ones(2))
    (torch.bfloat16, None)
    """
    stay: set[str] = set()       # paths of leaves with two dims or more that are not to be cast
    here: set[int] = set()       # the memory that they are in, while a step runs: `cast` is given tensors, not paths

    def specs(specs: tree.Tree) -> tree.Tree:
        stay.clear()
        stay.update(path for path, p in tree.flatten_with_path(specs)
                    if len(p.shape) > 1 and (not is_matrix(p) or (p.wide and not routers)))
        return specs

    def step(run: Callable) -> Callable:
        def marked(state: Any, batch: Any) -> Any:
            if stay:
                named = tree.flatten_with_path(getattr(state, "params", state))
                here.update(_memory(p) for path, p in named if path in stay)
            try:
                return run(state, batch)
            finally:
                here.clear()
        return marked

    def narrow(x: torch.Tensor) -> torch.dtype | None:
        return torch.bfloat16 if x.ndim > 1 and x.dtype in CAST and not (here and _memory(x) in here) else None
    return Transform("bf16", Stage.PRECISION, specs=specs, cast=narrow, step=step)


def _memory(x: torch.Tensor) -> int:
    """Which storage a leaf's part is in: the same for all its aliases, and there for fake tensors too."""
    return local(x).untyped_storage()._cdata


def fp64() -> Transform:
    """Everything in float64: to tell a mistake, or what discrete choices make of rounding, from the rounding.

    >>> from xtf.spec import Param
    >>> fp64().specs({"w": Param((2,), torch.float32, ("embed",))})["w"].dtype
    torch.float64
    """
    wide = lambda p: replace(p, dtype=torch.float64) if p.dtype.is_floating_point else p
    return Transform("fp64", Stage.PRECISION, specs=lambda specs: tree.tree_map(wide, specs))
