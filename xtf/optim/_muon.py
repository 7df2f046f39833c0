"""Muon: momentum, made orthogonal matrix by matrix."""
import math
from typing import Any, Literal

import torch

from xtf import tree
from xtf.kernels import product_dtype
from xtf.layout import like, local
from xtf.ops import LOCAL, Ops
from xtf.optim.core import Mask, Optimizer, chosen, count, known, moment, of_dtype, refusal
from xtf.optim.schedules import Schedule
from xtf.spec import matrices

COEFFICIENTS = 3.4445, -4.7750, 2.0315


def muon(lr: float | Schedule, momentum: float = 0.95, nesterov: bool = True, steps: int = 5, weight_decay: float = 0.1,
         mask: Mask | None = None, adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
         dtype: torch.dtype | None = torch.bfloat16) -> Optimizer:
    """Momentum whose singular values are brought near 1, with decoupled weight decay.

    With g the gradient of a matrix p [a, b]:

        m = momentum m + (1 - momentum) g      u = momentum m + (1 - momentum) g if nesterov else m
        update = -lr (scale orthogonalise(u) + weight_decay p)

    Leaves are [a, b], or stacks [..., a, b] of matrices, each for itself (experts). Those that are stored in parts are
    brought together by `ops.matrices`, each on one rank. Embeddings, the head and vectors want another optimizer: see
    `partition` and `hidden_matrices`.

    Args:
        lr: the learning rate, a number, or a schedule that is called with the number of steps done.
        momentum: the decay of m a step, in [0, 1).
        nesterov: whether the update looks one step of momentum ahead.
        steps: how many steps `orthogonalise` takes.
        weight_decay: the part of p that is taken off a step, before it is multiplied by lr.
        mask: `mask(path, leaf)` says which leaves decay; by default all do.
        adjust: the scale. "match_rms_adamw" is 0.2 sqrt(max(a, b)), with which updates are as large as AdamW's and take
            its learning rate and decay (Liu et al.); "original" is sqrt(max(1, a / b)) (Jordan et al.).
        dtype: in which `orthogonalise` computes; None is that of the moments. On processors without bf16 products it is
            float32 for bf16.

    Returns: an `Optimizer` with the state `{"step": int64 scalar, "m": tree}`. m has at least float32 and lies as its
    parameter lies.

    Raises: ValueError for another `adjust`; when it makes its state, for a leaf that is no matrix; when it updates, for
    a gradient of another shape than its parameter, or at a leaf that was frozen when the state was made.

    Reference: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024. Liu et al., Muon is
    Scalable for LLM Training, 2025, equation 4.

    >>> tx, params = muon(0.1, weight_decay=0.0, adjust="original"), {"w": torch.zeros(2, 2, requires_grad=True)}
    >>> updates, _ = tx.update({"w": torch.tensor([[1.0, 0.0], [0.0, 100.0]])}, tx.init(params), params)
    >>> updates["w"].diagonal().lt(-0.05).tolist()
    [True, True]
    """
    if adjust not in ("match_rms_adamw", "original"):
        raise ValueError(f'muon: adjust must be "match_rms_adamw" or "original", got {adjust!r}')

    def init(params: tree.Tree) -> tree.Tree:
        for path, p in tree.flatten_with_path(params):
            if p.requires_grad and p.ndim < 2:
                raise ValueError(f"muon: {path} of shape {tuple(p.shape)} is no matrix; give it to another optimizer "
                                 "with `partition`")
        return {"step": count(params), "m": tree.tree_map(moment, params)}

    @torch.no_grad()
    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
               **extra: Any) -> tuple[tree.Tree, Any]:
        ok = known(extra, ops)[1]
        rate = lr(state["step"]) if callable(lr) else lr
        named, together = tree.flatten_with_path(params), tree.zip_leaves(params, grads, state["m"])
        leaves = [(path, *rest) for (path, _), rest in zip(named, together, strict=True)]
        directions, moved = [], []
        for path, p, g, old in leaves:
            if g is None:
                moved.append(old)
                continue
            if old is None or g.shape != p.shape:
                raise refusal("muon", path, g, p)
            m, g_ = local(old), local(g).to(old.dtype)
            new = torch.lerp(m, g_, 1 - momentum)
            u = torch.lerp(g_, new, momentum) if nesterov else new
            moved.append(like(m.copy_(chosen(ok, new, m)) if ops.donate else chosen(ok, new, m), old))
            directions.append(like(u.to(product_dtype(dtype or u.dtype, u.device)), g))
        turned = iter(ops.matrices(lambda x_Nab: orthogonalise(x_Nab, steps), directions))
        updates = []
        for path, p, g, old in leaves:
            if g is None:
                updates.append(None)
                continue
            a, b = p.shape[-2:]
            scale = 0.2 * math.sqrt(max(a, b)) if adjust == "match_rms_adamw" else math.sqrt(max(1, a / b))
            o = local(next(turned)).to(old.dtype)
            decay = weight_decay if mask is None or mask(path, p) else 0.0
            move = (scale * o + decay * local(p)) * of_dtype(-rate, o.dtype)
            u = local(g).to(old.dtype).copy_(chosen(ok, move, -0.0))
            updates.append(like(u, g))
        step = state["step"] + (1 if ok is None else ok)
        return tree.unflatten(updates, params), {"step": step, "m": tree.unflatten(moved, params)}
    return Optimizer(init, update)


def orthogonalise(x_Nab: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Each matrix U S V' brought near U V', whatever the scale of S.

    The singular values, divided by their 2-norm, go `steps` times through a quintic that pushes (0, 1] towards
    [0.7, 1.2].

    Args:
        x_Nab: N matrices; products run in their dtype.
        steps: how many times the quintic is applied.

    Returns: N matrices of the same shape and dtype.

    Reference: the iteration and its coefficients are those of Jordan et al. (see `muon`).

    >>> x = orthogonalise(torch.diag(torch.tensor([3.0, 0.5])).unsqueeze(0))
    >>> x.diagonal(dim1=1, dim2=2).sub(1).abs().max().item() < 0.4
    True
    """
    a, b, c = COEFFICIENTS
    wide = x_Nab.shape[-2] <= x_Nab.shape[-1]
    x = x_Nab if wide else x_Nab.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def hidden_matrices(specs: tree.Tree) -> Mask:
    """`(path, leaf) -> whether Muon is meant for the leaf`: a matrix or a stack of them by its axes (`specs` are the
    model's), and neither embedding nor head.

    >>> from xtf.spec import Param
    >>> specs = {name: {"weight": Param((2, 2), torch.float32, axes)} for name, axes in (
    ...     ("q", ("heads", "embed")), ("embed", ("vocab", "embed")), ("bias", ("expert", "embed")))}
    >>> hidden = hidden_matrices(specs)
    >>> [hidden(f"{name}.weight", torch.ones(2, 2)) for name in specs]
    [True, False, False]
    """
    matrix = matrices(specs)
    return lambda path, leaf: matrix(path, leaf) and not {"embed", "head"} & set(path.split("."))
