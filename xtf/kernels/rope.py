"""Rotary position embedding.

P packs   T positions   H heads   d head dim   r dims of it that are turned (the last)   k = d - r
"""
import torch
import torch.nn.functional as F

from xtf.kernels import functorch_active

Tensor = torch.Tensor


def apply_rope(x_PTHd: Tensor, cos_PTr: Tensor, sin_PTr: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pair i of each head's last r dims by its position's angle i: in the dtype of cos, returned in that of x.

    Pair i is dims (i, i + r / 2) of them, or (2 i, 2 i + 1) if `interleaved` (DeepSeek). `cos_PTr` and `sin_PTr` hold
    the r / 2 angles twice, as transformers lays them out (`interleaved` reads the first half); nothing but them is
    saved for backward, which turns the other way. The d - r dims before stay as they are. Source: Su et al., arXiv
    2104.09864, eq. 34. Raises ValueError where shapes do not fit.

    >>> x, cos, sin = torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> apply_rope(x, cos, sin).flatten().tolist()                         # a quarter turn
    [0.0, 1.0]
    >>> x, cos, sin = torch.tensor([[[[5.0, 1.0, 0.0, 1.0, 0.0]]]]), torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    >>> apply_rope(x, cos, sin, interleaved=True).flatten().tolist()
    [5.0, 0.0, 1.0, 0.0, 1.0]
    """
    r = cos_PTr.shape[-1]
    if (x_PTHd.dim() != 4 or cos_PTr.shape != sin_PTr.shape or cos_PTr.shape[-2:-1] != x_PTHd.shape[1:2]
            or r % 2 or r > x_PTHd.shape[-1]):
        raise ValueError(f"apply_rope: x {tuple(x_PTHd.shape)} [P, T, H, d], cos {tuple(cos_PTr.shape)} and sin "
                         f"{tuple(sin_PTr.shape)} [P, T, r] do not fit: T must agree, r be even and at most d")
    if torch.compiler.is_compiling() or functorch_active() or cos_PTr.requires_grad or sin_PTr.requires_grad:
        return reference_rope(x_PTHd, cos_PTr, sin_PTr, interleaved)
    return _Rope.apply(x_PTHd, cos_PTr, sin_PTr, interleaved)  # type: ignore[return-value]


def reference_rope(x_PTHd: Tensor, cos_PTr: Tensor, sin_PTr: Tensor, interleaved: bool = False) -> Tensor:
    """`apply_rope` in plain torch: its meaning, and what `torch.func` transforms and torch.compile see."""
    cos, sin = _laid_out(cos_PTr, sin_PTr, interleaved)
    kept, x = x_PTHd.to(cos.dtype).split((x_PTHd.shape[-1] - cos.shape[-1], cos.shape[-1]), -1)
    first, second = _pairs(x, interleaved)
    across = torch.stack([-second, first], -1).flatten(-2) if interleaved else torch.cat([-second, first], -1)
    return torch.cat([kept, x * cos + across * sin], -1).to(x_PTHd.dtype)


def _laid_out(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [P, T, 1, r], each dim's own."""
    by_dim = lambda t: t.chunk(2, -1)[0].repeat_interleave(2, -1) if interleaved else t
    return by_dim(cos).unsqueeze(-2), by_dim(sin).unsqueeze(-2)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.tensor_split(2, -1)  # type: ignore[return-value]


def _turn(x_PTHd: Tensor, cos_PTr: Tensor, sin_PTr: Tensor, sign: int, interleaved: bool) -> Tensor:
    """The rotation by +1 or -1 times the angles: three passes, and no halves put together."""
    k = x_PTHd.shape[-1] - cos_PTr.shape[-1]
    x, (cos, sin) = x_PTHd.to(cos_PTr.dtype), _laid_out(cos_PTr, sin_PTr, interleaved)
    y = x * (F.pad(cos, (k, 0), value=1.0) if k else cos)
    (x_first, x_second), (y_first, y_second) = _pairs(x[..., k:], interleaved), _pairs(y[..., k:], interleaved)
    sin_first, sin_second = _pairs(sin, interleaved)[::sign]
    y_first.addcmul_(x_second, sin_first, value=-sign)
    y_second.addcmul_(x_first, sin_second, value=sign)
    return y.to(x_PTHd.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return _turn(g, cos, sin, -1, ctx.interleaved), None, None, None
