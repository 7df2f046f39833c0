"""The gate of a gated MLP."""
import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of any one shape."""
    return F.silu(gate) * up
