"""Runs Triton kernels in Triton's interpreter, on CPU; started by test_rms_norm.py in a process of its own, with
TRITON_INTERPRET=1.

The interpreter (3.7.1) multiplies bf16 as raw bits in `tl.dot`, truncates float32 to bf16, and loses the carry when it
rounds to fp8. `repair` makes casts those of torch and products those of float32; `canary` proves it, and fails on the
interpreter as it comes.
"""
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from xtf.kernels import rms_norm as kernel

FLOATS = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.bfloat16: torch.bfloat16,
          tl.float16: torch.float16, tl.float32: torch.float32}
NARROW = (tl.float8e4nv, tl.float8e5, tl.bfloat16)  # numpy has no such numbers: they travel as unsigned integers


def bits_to_torch(array: np.ndarray, dtype) -> torch.Tensor:
    whole = np.ascontiguousarray(array).view(f"u{dtype.primitive_bitwidth // 8}")
    return torch.from_numpy(whole.copy()).view(FLOATS[dtype])


def repair() -> None:
    as_shipped = interpreter._convert_float

    def convert(array, source, target, rounding):
        if source not in FLOATS or target not in FLOATS:
            return as_shipped(array, source, target, rounding)
        x = bits_to_torch(array, source).float()
        if target in (tl.float8e4nv, tl.float8e5):                              # the hardware's cast saturates
            x = torch.where(x.isnan(), x, x.clamp(-(most := torch.finfo(FLOATS[target]).max), most))
        bits = x.to(FLOATS[target]).view(getattr(torch, f"uint{target.primitive_bitwidth}"))
        return bits.numpy().reshape(np.shape(array))

    def dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        a, b = (bits_to_torch(x.data, x.dtype.scalar).float().numpy() if x.dtype.scalar in NARROW else x.data
                for x in (a, b))
        return interpreter.TensorHandle(np.matmul(a, b, dtype=total.data.dtype) + total.data, total.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


@triton.jit
def cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def canary() -> bool:
    """Whether casts are bit for bit those of torch, and products of narrow numbers exact."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2 ** torch.linspace(-8, 8, 4096)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        y = torch.empty(4096, dtype=dtype)
        cast_kernel[(1,)](x, y, 4096)
        most = torch.finfo(dtype).max
        if not torch.equal(y.float(), x.clamp(-most, most).to(dtype).float()):
            return False
    a, b, c = torch.randint(-8, 9, (16, 16)).bfloat16(), torch.randint(-8, 9, (16, 16)).bfloat16(), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, 16)
    return torch.equal(c, a.float() @ b.float())  # integers below 2 ** 24: exact in any order


def check_rms_norm() -> None:
    """The Triton kernels against the plain formula in float64: rows of one block, of a part of one, of several; more
    rows than programs."""
    kernel.MAX_BLOCK = 64
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for N, D in ((1, 1), (5, 24), (7, 64), (9, 150)):
            draw = lambda *shape, dtype=dtype: torch.randn(shape, dtype=torch.float64).to(dtype)
            x, weight, g = draw(N, D), draw(D), draw(N, D)
            y, scale = kernel._forward_triton(x, weight, 1e-5)
            dx, dweight = kernel._backward_triton(g, x, weight, scale)
            leaves = [t.double().requires_grad_() for t in (x, weight)]
            exact = kernel.reference_rms_norm(*leaves, 1e-5)
            exact_dx, exact_dweight = torch.autograd.grad(exact, leaves, g.double())
            # Sums of D or N terms in at least float32; the row rounded before it meets a weight (below 5), and the
            # result; each of them to half a unit, or to half the smallest number that there is.
            unit, wide = torch.finfo(dtype).eps, torch.finfo(scale.dtype).eps
            smallest = torch.finfo(dtype).tiny * unit
            rows = g.double() * leaves[1].detach()
            normed = x.double() * scale.double()
            terms = (exact.abs(),
                     scale.double() * (rows.abs() + normed.abs() * (rows * normed).abs().mean(-1, keepdim=True)),
                     (g.double() * normed).abs().sum(0))
            for got, want, size in zip((y, dx, dweight), (exact, exact_dx, exact_dweight), terms, strict=True):
                assert got.dtype == dtype and got.shape == want.shape
                assert ((got.double() - want).abs() <= (1.1 * unit + (D + N + 8) * wide) * size + 3
                        * smallest).all(), (dtype, N, D)
    assert kernel._forward_triton(torch.ones(0, 8), torch.ones(8), 1e-5)[0].shape == (0, 8)
    assert kernel._backward_triton(torch.ones(0, 8), torch.ones(0, 8), torch.ones(8),
                                   torch.ones(0, 1))[1].tolist() == [0] * 8


if __name__ == "__main__":
    if sys.argv[1:] == ["as-shipped"]:
        sys.exit(0 if canary() else 3)
    repair()
    assert canary(), "the repaired interpreter does not round and multiply like torch"
    check_rms_norm()
    print("exact")
