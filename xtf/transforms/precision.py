"""`bf16`: matrices move and multiply in bfloat16, while the stored masters, the moments and the gradients' sums stay as
they are. `fp64`: all of it in float64."""
from dataclasses import replace

import torch

from xtf import tree
from xtf.transform import Stage, Transform

# what is bf16 already is said to stay so: `lora` would widen a base that it stores in bf16
CAST = torch.float32, torch.float64, torch.bfloat16


def bf16() -> Transform:
    """Leaves with two dims or more compute in bfloat16; vectors (norms, biases, sinks) stay, since kernels take their
    statistics in at least float32 anyway, and gathering them costs nothing.

    Casts stand before fsdp's gather, so half the bytes move. Gradients come back in the masters' dtype.

    >>> bf16().cast(torch.ones(2, 2)), bf16().cast(torch.ones(2))
    (torch.bfloat16, None)
    """
    narrow = lambda x: torch.bfloat16 if x.ndim >= 2 and x.dtype in CAST else None
    return Transform("bf16", Stage.PRECISION, cast=narrow)


def fp64() -> Transform:
    """Everything in float64: to tell a mistake, or what discrete choices make of rounding, from the rounding.

    >>> from xtf.spec import Param
    >>> fp64().specs({"w": Param((2,), torch.float32, ("embed",))})["w"].dtype
    torch.float64
    """
    wide = lambda p: replace(p, dtype=torch.float64) if p.dtype.is_floating_point else p
    return Transform("fp64", Stage.PRECISION, specs=lambda specs: tree.tree_map(wide, specs))
