"""The gate of a gated MLP, and the same with a weight for each row, as experts have it.

N rows   F their width
"""
import torch
import torch.nn.functional as F

from xtf.kernels import at_least_float32, functorch_active

Tensor = torch.Tensor
# numbers on a CPU up to which torch's own backward is faster, host time included, and saves too little to matter
SMALL = 2 ** 16
PIECE = 2 ** 16  # numbers on a CPU that a chain of passes takes at a time, so that they stay in the second-level cache


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise. Saves its two inputs alone, unless it is small: silu(gate) is computed again.

    Source: Shazeer, arXiv 2002.05202, eq. 6. Raises ValueError if the shapes or dtypes differ.

    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 2.0])).tolist()
    [0.0, 200.0]
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be "
                         "alike")
    if torch.compiler.is_compiling() or functorch_active() or (gate.is_cpu and gate.numel() <= SMALL):
        return F.silu(gate) * up
    return _Swiglu.apply(gate, up)  # type: ignore[return-value]


def weighted_swiglu(gate_NF: Tensor, up_NF: Tensor, weights_N: Tensor) -> Tensor:
    """`silu(gate) * up * weight`, a weight a row, in the dtype of `gate`: what an expert's narrow rows carry home.

    Saves its three inputs and nothing else, unless it is small. The weights may be of a wider dtype, and their gradient
    is summed in at least float32. Raises ValueError if the shapes do not fit.

    >>> weighted_swiglu(torch.tensor([[0.0, 100.0]]), torch.tensor([[5.0, 2.0]]), torch.tensor([0.5])).tolist()
    [[0.0, 100.0]]
    """
    if (gate_NF.shape != up_NF.shape or gate_NF.dtype != up_NF.dtype or gate_NF.dim() != 2
            or weights_N.shape != gate_NF.shape[:1]):
        raise ValueError(f"weighted_swiglu: gate {tuple(gate_NF.shape)} {gate_NF.dtype} and up {tuple(up_NF.shape)} "
                         f"{up_NF.dtype} must be alike, [N, F], and the weights {tuple(weights_N.shape)} [N]")
    if torch.compiler.is_compiling() or functorch_active() or (gate_NF.is_cpu and gate_NF.numel() <= SMALL):
        return (F.silu(gate_NF) * up_NF * weights_N[:, None]).to(gate_NF.dtype)
    return _WeightedSwiglu.apply(gate_NF, up_NF, weights_N)  # type: ignore[return-value]


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


class _WeightedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weights):
        ctx.save_for_backward(gate, up, weights)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for gate_nF, up_nF, weights_n1, out_nF in _pieces(gate, up, weights[:, None], out):
            torch.ops.aten.silu.out(gate_nF, out=out_nF)
            out_nF.mul_(up_nF).mul_(weights_n1)
        return out

    @staticmethod
    def backward(ctx, g):
        gate, up, weights = ctx.saved_tensors
        dgate, dup = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
        dweights = torch.empty_like(weights)
        wide = at_least_float32(g.dtype)
        for g_nF, gate_nF, up_nF, w_n1, dgate_nF, dup_nF, dw_n in _pieces(g, gate, up, weights[:, None], dgate, dup,
                                                                          dweights):
            torch.ops.aten.silu.out(gate_nF, out=dup_nF)
            dup_nF.mul_(g_nF)
            torch.mul(dup_nF, up_nF, out=dgate_nF)
            dw_n.copy_(dgate_nF.sum(-1, dtype=wide))
            dup_nF.mul_(w_n1)
            torch.mul(g_nF, up_nF, out=dgate_nF).mul_(w_n1)
            torch.ops.aten.silu_backward.grad_input(dgate_nF, gate_nF, grad_input=dgate_nF)
        return dgate, dup, dweights


def _pieces(*rows: Tensor):
    """The same rows of each tensor, as many at a time as a CPU's cache holds; on other devices all."""
    N, width = rows[0].shape
    size = max(1, PIECE // width) if rows[0].device.type == "cpu" and width else max(N, 1)
    return zip(*(x.split(size) for x in rows), strict=True)
