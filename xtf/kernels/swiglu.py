"""The gate of a gated MLP."""
import torch
import torch.nn.functional as F

from xtf.kernels import functorch_active

Tensor = torch.Tensor
SMALL = 2 ** 16                 # numbers on a CPU up to which torch's own backward is faster, host time included, and saves too little to matter


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise. Saves its two inputs for backward and nothing else, unless it is small: silu(gate) is computed again there.

    Source: Shazeer, arXiv 2002.05202, eq. 6. Raises ValueError if the shapes or dtypes differ.

    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 2.0])).tolist()
    [0.0, 200.0]
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike")
    if torch.compiler.is_compiling() or functorch_active() or (gate.is_cpu and gate.numel() <= SMALL):
        return F.silu(gate) * up
    return _Swiglu.apply(gate, up)  # type: ignore[return-value]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        dgate = g * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, F.silu(gate).mul_(g)
