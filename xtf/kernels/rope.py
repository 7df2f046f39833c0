"""Rotary position embedding.

P packs   T positions   H heads   d head dim   h = d / 2
"""
import torch

from xtf.kernels import functorch_active

Tensor = torch.Tensor


def apply_rope(x_PTHd: Tensor, cos_PTd: Tensor, sin_PTd: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d / 2]) of a head by its position's angle i, computed in the dtype of cos, returned in that of x.

    `cos_PTd` and `sin_PTd` hold the d / 2 angles twice, as transformers lays them out; nothing but them
    is saved for backward, which turns the other way. Source: Su et al., arXiv 2104.09864, eq. 34. Raises ValueError where shapes do not fit.

    >>> x, cos, sin = torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> apply_rope(x, cos, sin).flatten().tolist()                         # a quarter turn
    [0.0, 1.0]
    """
    if x_PTHd.dim() != 4 or cos_PTd.shape != sin_PTd.shape or cos_PTd.shape[-2:] != x_PTHd.shape[1::2] or x_PTHd.shape[-1] % 2:
        raise ValueError(f"apply_rope: x {tuple(x_PTHd.shape)} [P, T, H, d], cos {tuple(cos_PTd.shape)} and sin {tuple(sin_PTd.shape)} "
                         "[P, T, d] do not fit: T and d must agree, d be even")
    if torch.compiler.is_compiling() or functorch_active() or cos_PTd.requires_grad or sin_PTd.requires_grad:
        return reference_rope(x_PTHd, cos_PTd, sin_PTd)
    return _Rope.apply(x_PTHd, cos_PTd, sin_PTd)  # type: ignore[return-value]


def reference_rope(x_PTHd: Tensor, cos_PTd: Tensor, sin_PTd: Tensor) -> Tensor:
    """`apply_rope` in plain torch: its meaning, and what `torch.func` transforms and torch.compile see."""
    x, cos, sin = x_PTHd.to(cos_PTd.dtype), cos_PTd.unsqueeze(-2), sin_PTd.unsqueeze(-2)
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x_PTHd.dtype)


def _turn(x_PTHd: Tensor, cos_PTd: Tensor, sin_PTd: Tensor, sign: int) -> Tensor:
    """The rotation by +1 or -1 times the angles: three passes, and no halves put together."""
    h = x_PTHd.shape[-1] // 2
    x, (sin_first, sin_second) = x_PTHd.to(cos_PTd.dtype), sin_PTd.unsqueeze(-2).chunk(2, -1)[::sign]
    y = x * cos_PTd.unsqueeze(-2)
    y[..., :h].addcmul_(x[..., h:], sin_first, value=-sign)
    y[..., h:].addcmul_(x[..., :h], sin_second, value=sign)
    return y.to(x_PTHd.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return _turn(g, cos, sin, -1), None, None
