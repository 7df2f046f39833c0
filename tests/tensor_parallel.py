"""Tensor parallelism written from outside: heads and MLP widths divided over a mesh axis, in public names alone.

Rows of q, k, v, gate and up, columns of o and down: the axes that a product names say which (Megatron-LM, arXiv
1909.08053).
"""
from dataclasses import replace

import torch

import xtf
from xtf.parallel import collectives

SPLIT = "heads", "kv_heads", "mlp"


class Enter(torch.autograd.Function):
    """Identity; its adjoint sums, since each rank used the input for its own outputs."""
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return collectives.all_sum(grad, ctx.group), None


class Leave(torch.autograd.Function):
    """The sum of the ranks' parts; every rank goes on with the whole, so its adjoint is the identity."""
    @staticmethod
    def forward(ctx, x, group):
        return collectives.all_sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def tensor_parallel(head_dim, axis="tp"):
    """Experts stay whole. Raises ValueError, when the step runs, if the axis does not divide the heads or the key-value
    heads."""
    def wrap(ops, env):
        size = env.size(axis)
        if size == 1:
            return ops
        group = env.group(axis).name

        def linear(x, node, axes):
            source, target = axes
            if target in SPLIT:                          # rows are divided: each rank makes its own outputs
                if target != "mlp" and node["weight"].shape[0] % head_dim:
                    raise ValueError(f"tensor_parallel: {axis}={size} does not divide the "
                                     f"{node['weight'].shape[0] * size // head_dim} {target}")
                return ops.linear(Enter.apply(x, group), node, axes)
            if source in SPLIT:  # columns are divided: outputs are sums, to which a bias is added once
                y = Leave.apply(ops.linear(x, {"weight": node["weight"]}, axes), group)
                return y + node["bias"] if "bias" in node else y
            return ops.linear(x, node, axes)
        return replace(ops, linear=linear)

    def claim(p):
        dims = [dim for dim, name in enumerate(p.axes) if name in SPLIT]
        return {axis: dims[0]} if dims and "expert" not in p.axes else {}

    def partial(p):  # q_norm and k_norm are whole, but each rank's are of its own heads
        return (axis,) if p.axes == ("head_dim",) else ()

    return xtf.Transform("tensor_parallel", 15, wrap, claim=claim, partial=partial)
