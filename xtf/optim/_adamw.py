"""AdamW, fused over leaves: one pass over gradients, moments and parameters, in pieces that stay in the cache."""
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from xtf import device, tree
from xtf.layout import like, local
from xtf.ops import LOCAL, Ops
from xtf.optim import moments as M
from xtf.optim.core import Mask, Optimizer, count, known, of_dtype, refusal
from xtf.optim.schedules import Schedule


def adamw(lr: float | Schedule, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
          mask: Mask | None = None, moments: M.Kind = "fp32") -> Optimizer:
    """Adam with decoupled weight decay.

    With t = 1, 2, ... the number of the step (one that is not `ok` does not count) and g the gradient of a parameter p:

        m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g²
        update = -lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    Args:
        lr: the learning rate, a number, or a schedule that is called with t - 1.
        b1: the decay of the first moment m a step, in [0, 1).
        b2: the decay of the second moment v a step, in [0, 1).
        eps: what is added to the root, in the gradient's unit, so that nothing is divided by zero.
        weight_decay: the part of p that is taken off a step, before it is multiplied by lr.
        mask: `mask(path, leaf)` says which leaves decay; by default all do, as in torch.optim.AdamW.
        moments: how m and v are kept between steps: "fp32" (float64 for float64 parameters), or in fewer bits "bf16"
            and "int8" (`xtf.optim.moments`: 4 or about 2 bytes for each parameter instead of 8).

    Returns: an `Optimizer` with the state `{"step": int64 scalar, "m": tree, "v": tree}`. Moments lie as their
    parameter lies, and an update has their dtype, at least float32.

    Raises: ValueError for other `moments`; when it updates, for a gradient of another shape than its parameter, or at a
    leaf that was frozen when the state was made.

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2.

    >>> tx, params = adamw(0.1, weight_decay=0.0), {"w": torch.zeros(2, requires_grad=True)}
    >>> updates, opt = tx.update({"w": torch.tensor([2.0, -3.0])}, tx.init(params), params)
    >>> [round(u, 4) for u in updates["w"].tolist()], int(opt["step"])
    ([-0.1, 0.1], 1)
    """
    make_m, make_v = M.makers(moments)

    def init(params: tree.Tree) -> tree.Tree:
        return {"step": count(params), "m": tree.tree_map(make_m, params), "v": tree.tree_map(make_v, params)}

    @torch.no_grad()
    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
               **extra: Any) -> tuple[tree.Tree, Any]:
        ok = known(extra, ops)[1]
        leaves = tree.zip_leaves(params, grads, state["m"], state["v"])
        decays = [True] * len(leaves) if mask is None else [mask(path, p) for path, p in tree.flatten_with_path(params)]
        rate = lr(state["step"]) if callable(lr) else lr
        step = state["step"] + 1
        jobs: dict[tuple, list[tuple]] = {}
        packed: list[tuple] = []
        out: list[tuple] = []
        in_place = ops.donate
        for i, (p, g, m, v) in enumerate(leaves):
            if g is None:
                out.append((None, m, v))
                continue
            if m is None or v is None or g.shape != p.shape:
                raise refusal("adamw", tree.flatten_with_path(params)[i][0], g, p)
            u = local(g).contiguous()                                  # itself, from value_and_grad
            if type(m) is dict or m.dtype is torch.bfloat16:
                u = u.to(torch.promote_types(u.dtype, torch.float32))
                new_m, new_v = (x if ops.donate else M.copy(x) for x in (m, v))
                out.append((like(u, g), new_m, new_v))
                packed.append((decays[i], u, p, new_m, new_v))
                continue
            old_m, old_v = local(m).contiguous(), local(v).contiguous()                # themselves, from init
            in_place = in_place and old_m is local(m) and old_v is local(v)
            new_m, new_v = (old_m, old_v) if ops.donate else (torch.empty_like(old_m), torch.empty_like(old_v))
            u = u.to(old_m.dtype)
            out.append((like(u, m), like(new_m, m), like(new_v, v)))
            if u.numel():
                job = jobs.setdefault((u.device, u.dtype, bool(decays[i])), [])
                job.append((u, local(p), old_m, old_v, new_m, new_v))
        numbers = {"step": step, "lr": rate, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": weight_decay,
                   "ok": ok}
        for (where, dtype, decay), job in jobs.items():
            adam = _kernel(where, dtype, decay, **numbers)
            for us, ps, old_ms, old_vs, ms, vs in _buckets(job, device.piece(where)):
                if not ops.donate:
                    torch._foreach_copy_(ms + vs, old_ms + old_vs)
                adam(us, ps, ms, vs)
        for decay, u, p, m, v in packed:
            adam = _kernel(u.device, u.dtype, decay, **numbers)
            M.rows(lambda u, p, m, v, adam=adam: adam([u], [p], [m], [v]), u, p, m, v, step, ok)
        column = lambda i: tree.unflatten([triple[i] for triple in out], params)
        kept = {k: state[k] for k in "mv"} if in_place else {"m": column(1), "v": column(2)}
        return column(0), {"step": step if ok is None else state["step"] + ok, **kept}
    return Optimizer(init, update)


def _kernel(where: torch.device, dtype: torch.dtype, decay: bool, *, step: torch.Tensor, lr: Any, beta1: float,
            beta2: float, eps: float, weight_decay: float, ok: torch.Tensor | None) -> Any:
    """run(us, ps, ms, vs): gradients become updates and moments the next ones; where not `ok`, updates are zeros."""
    adam = partial(_fused if device.has_fused_adamw(where) else _plain, step=step.to(dtype), beta1=beta1, beta2=beta2,
                   eps=eps)
    shrink = -lr * weight_decay * decay                                # never +0.0
    if isinstance(lr, torch.Tensor):
        # the accelerator's kernel reads a float32
        shrink, lr = shrink.to(dtype), lr if where.type == "cpu" else lr.float()
    # so that p shrink keep has the sign of p: p + it is p
    keep = None if ok is None else torch.where(ok, 1.0, -0.0).to(dtype)

    def run(us: list, ps: list, ms: list, vs: list) -> None:
        scratch = torch._foreach_mul([p.to(dtype) for p in ps], shrink)                # the update starts as the decay
        adam(scratch, us, ms, vs, lr=lr, skip=None if ok is None else (~ok).float())
        if keep is not None:
            torch._foreach_mul_(scratch, keep)
        torch._foreach_copy_(us, scratch)
    return run


def _fused(xs: list, gs: list, ms: list, vs: list, *, step: torch.Tensor, skip: torch.Tensor | None,
           **numbers: Any) -> None:
    """Advance the moments and take Adam's part off each x: torch's kernel, which is given x for a parameter."""
    torch._fused_adamw_(xs, gs, ms, vs, [], [step.float()] * len(xs), weight_decay=0.0, amsgrad=False, maximize=False,
                        found_inf=skip, **numbers)


def _plain(xs: list, gs: list, ms: list, vs: list, *, step: torch.Tensor, skip: torch.Tensor | None, lr: Any,
           beta1: float, beta2: float, eps: float) -> None:
    """The same where torch has no such kernel."""
    old = None if skip is None else [t.clone() for t in (*xs, *ms, *vs)]
    torch._foreach_lerp_(ms, gs, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
    root = torch._foreach_sqrt(vs)
    torch._foreach_div_(root, (-torch.expm1(step * math.log(beta2))).sqrt())  # 1 - beta2^step without cancellation
    torch._foreach_add_(root, eps)
    torch._foreach_div_(root, of_dtype(lr / torch.expm1(step * math.log(beta1)), step.dtype))
    torch._foreach_addcdiv_(xs, ms, root)
    for new, was in zip((*xs, *ms, *vs), old or (), strict=False):
        new.copy_(torch.where(skip.bool(), was, new))  # pyright: ignore


def _buckets(leaves: list[tuple], limit: int) -> Iterator[tuple[list, ...]]:
    """Large leaves cut into flat pieces, small ones put together: about `limit` elements of each kind at a time."""
    bucket, size = [], 0
    for leaf in leaves:
        cut = [leaf] if leaf[0].numel() <= limit else zip(*(x.reshape(-1).split(limit) for x in leaf), strict=True)
        for piece in cut:
            bucket.append(piece)
            size += piece[0].numel()
            if size >= limit:
                yield tuple(map(list, zip(*bucket, strict=True)))
                bucket, size = [], 0
    if bucket:
        yield tuple(map(list, zip(*bucket, strict=True)))
