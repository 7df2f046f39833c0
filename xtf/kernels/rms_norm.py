"""Root-mean-square normalisation of rows: plain torch, kernels for CPU and CUDA (Triton), one operator over them.

N rows   D their width
"""
import importlib.util
from typing import Any

import torch

from xtf.kernels import as_cuda, at_least_float32, functorch_active, is_fake, traced

Tensor = torch.Tensor
HAS_TRITON = importlib.util.find_spec("triton") is not None
SMALL = 2 ** 12  # numbers on a CPU up to which torch's own backward has less host time than this file's passes save
MAX_BLOCK = 4096                # columns at a time; wider rows are read in turns


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x ** 2) + eps)` over the last dim, in the dtype of x; `weight` [D].

    Statistics are in at least float32.

    The normalised row is rounded to the dtype of x before it meets the weight, as in transformers. Source: Zhang and
    Sennrich, arXiv 1910.07467, eq. 4. Raises ValueError if the weight is not one number a column.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)                     # rms of the row: sqrt(12.5)
    tensor([[0.8485, 1.1314]])
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, but rows of x {tuple(x.shape)} are "
                         f"{x.shape[-1]} wide")
    if torch.compiler.is_compiling() or functorch_active() or (x.is_cpu and x.numel() <= SMALL):
        return reference_rms_norm(x, weight, eps)  # compiled, inductor fuses it with its neighbours
    if traced() or (is_fake(x) and as_cuda(x)):  # a kernel cannot be launched on a fake
        return torch.ops.xtf.rms_norm(x, weight, eps)[0]
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[return-value]


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch: the meaning of the kernels, and what `torch.func` transforms and torch.compile see."""
    wide = x.to(at_least_float32(x.dtype))
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)).to(x.dtype)


# ----------------------------------------------- CPU: as few passes as torch's operators allow, in place where they may

def _forward_cpu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms of each row as [..., 1] in at least float32)."""
    wide = x.contiguous().to(at_least_float32(x.dtype))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = (wide * scale).to(x.dtype)
    return (normed.mul_(weight) if weight.dtype == x.dtype else (normed * weight).to(x.dtype)), scale


def _backward_cpu(g: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    wide, weight_D, scale_N1 = scale.dtype, weight.to(scale.dtype), scale.view(-1, 1)
    g_ND, x_ND = g.reshape(-1, D).to(wide), x.reshape(-1, D).to(wide)
    buffer = g_ND * x_ND
    along_N = torch.mv(buffer, weight_D)
    dweight_D = buffer.mul_(scale_N1).sum(0)  # torch's sum halves recursively, a product would not
    dx_ND = torch.mul(g_ND, weight_D, out=buffer).mul_(scale_N1)
    dx_ND.addcmul_(x_ND, scale_N1.pow(3).mul_(along_N[:, None]), value=-1 / D)
    return dx_ND.view(x.shape).to(x.dtype), dweight_D.to(weight.dtype)


# ---------------------------------------------------------------- Triton

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(x_ptr, weight_ptr, y_ptr, scale_ptr, D, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.cast(tl.program_id(0), tl.int64)
        total = tl.zeros([BLOCK], WIDE)
        for start in range(0, D, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * D + at, mask=at < D, other=0.0).to(WIDE)
            total += x * x
        scale = 1 / tl.sqrt(tl.sum(total) / D + eps)
        tl.store(scale_ptr + row, scale)
        for start in range(0, D, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * D + at, mask=at < D, other=0.0)
            normed = (x.to(WIDE) * scale).to(x.dtype)
            weight = tl.load(weight_ptr + at, mask=at < D, other=0.0)
            tl.store(y_ptr + row * D + at, (normed.to(WIDE) * weight.to(WIDE)).to(x.dtype), mask=at < D)

    @triton.jit
    def _backward_kernel(g_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, dweight_ptr, N, D, WIDE: tl.constexpr,
                         BLOCK: tl.constexpr):
        # Each program takes every num_programs-th row and sums its part of the weight's gradient in a row of its own.
        # A thread reads there what it wrote itself: BLOCK is at least the number of threads.
        program = tl.program_id(0)
        for row in range(program, N, tl.num_programs(0)):
            first = tl.cast(row, tl.int64) * D
            scale = tl.load(scale_ptr + row)
            total = tl.zeros([BLOCK], WIDE)
            for start in range(0, D, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + first + at, mask=at < D, other=0.0).to(WIDE)
                g = tl.load(g_ptr + first + at, mask=at < D, other=0.0).to(WIDE)
                total += g * x * tl.load(weight_ptr + at, mask=at < D, other=0.0).to(WIDE)
            along = tl.sum(total) * scale * scale / D
            for start in range(0, D, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + first + at, mask=at < D, other=0.0)
                g = tl.load(g_ptr + first + at, mask=at < D, other=0.0).to(WIDE)
                weight = tl.load(weight_ptr + at, mask=at < D, other=0.0).to(WIDE)
                dx = scale * (g * weight - x.to(WIDE) * along)
                tl.store(dx_ptr + first + at, dx.to(x.dtype), mask=at < D)
                mine = dweight_ptr + program * D + at
                tl.store(mine, tl.load(mine, mask=at < D, other=0.0) + g * x.to(WIDE) * scale, mask=at < D)


def _launch(x: Tensor) -> dict[str, Any]:
    """Constants of a launch: columns a block, warps (at least one column a thread), the dtype of statistics."""
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(x.shape[-1])))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256)),
            "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}


def _forward_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, D = x.contiguous(), x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=at_least_float32(x.dtype))
    if x.numel():
        _forward_kernel[(x.numel() // D,)](x, weight.contiguous(), y, scale, D, eps, **_launch(x))
    return y, scale


def _backward_triton(g: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    g, x, D = g.contiguous(), x.contiguous(), x.shape[-1]
    N = x.numel() // D if D else 0
    programs = min(N, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count) if x.is_cuda else min(N, 4)
    dx, parts = torch.empty_like(x), scale.new_zeros(programs, D)
    if N:
        _backward_kernel[(programs,)](g, x, weight.contiguous(), scale, dx, parts, N, D, **_launch(x))
    return dx, parts.sum(0).to(weight.dtype)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (_forward_triton if x.is_cuda and HAS_TRITON else _forward_cpu)(x, weight, eps)


def _backward(g: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (_backward_triton if x.is_cuda and HAS_TRITON else _backward_cpu)(g, x, weight, scale)


# ----------------------------------------------------- autograd: a Function (15 us of host time less), and one operator

class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, g):
        return *_backward(g, *ctx.saved_tensors), None


@torch.library.custom_op("xtf::rms_norm", mutates_args=(), device_types="cpu")
def _op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward_cpu(x, weight, eps)


@torch.library.custom_op("xtf::rms_norm_backward", mutates_args=(), device_types="cpu")
def _op_backward(g: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_cpu(g, x, weight, scale)


_op.register_kernel("cuda")(_forward)
_op_backward.register_kernel("cuda")(_backward)


@_op.register_fake
def _(x, weight, eps):
    scale = x.new_empty((*x.shape[:-1], 1), dtype=at_least_float32(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale


@_op_backward.register_fake
def _(g, x, weight, scale):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, g, _):
    return *torch.ops.xtf.rms_norm_backward(g, *ctx.saved_tensors), None


_op.register_autograd(_gradients, setup_context=_save)
