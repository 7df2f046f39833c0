"""Rotary position embedding.

P packs   T positions   H heads   d head dim   h = d / 2
"""
import torch

from xtf.kernels import functorch_active

Tensor = torch.Tensor


def apply_rope(x_PTHd: Tensor, cos_PTd: Tensor, sin_PTd: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d / 2]) of a head by its position's angle i. Returns the dtype of x; computed in that of cos.

    `cos_PTd` and `sin_PTd` hold each of the d / 2 angles twice, as transformers lays them out. Nothing but them is saved for backward.
    Source: Su et al., arXiv 2104.09864, eq. 34.

    >>> x, cos, sin = torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> apply_rope(x, cos, sin).flatten().tolist()                         # a quarter turn
    [0.0, 1.0]
    """
    if torch.compiler.is_compiling() or functorch_active() or not (torch.is_grad_enabled() and x_PTHd.requires_grad):
        return reference_rope(x_PTHd, cos_PTd, sin_PTd)
    return _Rope.apply(x_PTHd, cos_PTd, sin_PTd)  # type: ignore[return-value]


def reference_rope(x_PTHd: Tensor, cos_PTd: Tensor, sin_PTd: Tensor) -> Tensor:
    """`apply_rope` in plain torch."""
    first, second = x_PTHd.chunk(2, -1)
    return (x_PTHd * cos_PTd.unsqueeze(-2) + torch.cat([-second, first], -1) * sin_PTd.unsqueeze(-2)).to(x_PTHd.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return reference_rope(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return reference_rope(g, cos, -sin), None, None
