"""AdamW, fused over leaves: one pass over gradients, moments and parameters, in pieces that stay in the cache."""
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from xtf import device, tree
from xtf.ops import LOCAL, Ops
from xtf.optim.core import Optimizer
from xtf.optim.schedules import Schedule
from xtf.parallel.collectives import like, local

Mask = Callable[[str, torch.Tensor], bool]


def adamw(lr: float | Schedule, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
          mask: Mask | None = None) -> Optimizer:
    """Adam with decoupled weight decay. With t = 1, 2, ... and the gradient g of a parameter p:

        m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g²
        update = -lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    `lr` is a number, or a schedule called with t - 1. `mask(path, leaf)` says which leaves decay; without it all do, as in
    torch.optim.AdamW. Moments are float32 (float64 for float64 parameters) and lie as their parameter lies; the update has the dtype of
    the moments. State: `{"step": int64 scalar on the CPU, "m": tree, "v": tree}`.

    Raises ValueError for a gradient at a leaf that was frozen when the state was made, or of another shape than its parameter.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2.

    >>> tx, params = adamw(0.1, weight_decay=0.0), {"w": torch.zeros(2, requires_grad=True)}
    >>> updates, opt = tx.update({"w": torch.tensor([2.0, -3.0])}, tx.init(params), params)
    >>> [round(u, 4) for u in updates["w"].tolist()], int(opt["step"])
    ([-0.1, 0.1], 1)
    """
    def init(params: tree.Tree) -> tree.Tree:
        return {"step": torch.zeros((), dtype=torch.int64), "m": tree.tree_map(_moment, params), "v": tree.tree_map(_moment, params)}

    @torch.no_grad()
    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL) -> tuple[tree.Tree, Any]:
        leaves = tree.zip_leaves(params, grads, state["m"], state["v"])
        decays = [True] * len(leaves) if mask is None else [mask(path, p) for path, p in tree.flatten_with_path(params)]
        rate = float(lr(state["step"])) if callable(lr) else lr
        step = state["step"] + 1
        jobs: dict[tuple, list[tuple]] = {}
        out: list[tuple] = []
        shrink, in_place = -rate * weight_decay, ops.donate
        for i, (p, g, m, v) in enumerate(leaves):
            if g is None:
                out.append((None, m, v))
                continue
            if m is None or g.shape != p.shape:
                path = tree.flatten_with_path(params)[i][0]
                raise ValueError(f"adamw: {path} has a gradient of shape {tuple(g.shape)}, but " + (
                    "its moments are None: it was frozen at init; init the optimizer again" if m is None else f"its parameter has {tuple(p.shape)}"))
            old_m, old_v, u = local(m).contiguous(), local(v).contiguous(), local(g).contiguous()  # themselves, from value_and_grad and init
            in_place = in_place and old_m is local(m) and old_v is local(v)
            new_m, new_v = (old_m, old_v) if ops.donate else (torch.empty_like(old_m), torch.empty_like(old_v))
            u = u.to(old_m.dtype)
            out.append((like(u, m), like(new_m, m), like(new_v, v)))
            if u.numel():
                jobs.setdefault((u.device, u.dtype), []).append((shrink * decays[i], u, local(p), old_m, old_v, new_m, new_v))
        for (where, _), job in jobs.items():
            kernel = _fused if device.has_fused_adamw(where) else _plain
            adam = partial(kernel, step=int(step), lr=rate, beta1=b1, beta2=b2, eps=eps)
            for rates, us, ps, old_ms, old_vs, ms, vs in _buckets(job, device.piece(where)):
                if not ops.donate:
                    torch._foreach_copy_(ms + vs, old_ms + old_vs)
                scratch = torch._foreach_mul([p.to(us[0].dtype) for p in ps], rates)        # the update starts as the decay
                adam(scratch, us, ms, vs)
                torch._foreach_copy_(us, scratch)
        column = lambda i: tree.unflatten([triple[i] for triple in out], params)
        moments = {k: state[k] for k in "mv"} if in_place else {"m": column(1), "v": column(2)}
        return column(0), {"step": step, **moments}
    return Optimizer(init, update)


def _fused(xs: list, gs: list, ms: list, vs: list, *, step: int, **numbers: Any) -> None:
    """Advance the moments and take Adam's part off each x: torch's kernel, which is given x for a parameter."""
    count = torch.full((), step, dtype=torch.float32, device=xs[0].device)
    torch._fused_adamw_(xs, gs, ms, vs, [], [count] * len(xs), weight_decay=0.0, amsgrad=False, maximize=False, **numbers)


def _plain(xs: list, gs: list, ms: list, vs: list, *, step: int, lr: float, beta1: float, beta2: float, eps: float) -> None:
    """The same where torch has no such kernel."""
    torch._foreach_lerp_(ms, gs, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
    root = torch._foreach_sqrt(vs)
    torch._foreach_div_(root, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(root, eps)
    torch._foreach_addcdiv_(xs, ms, root, -lr / (1 - beta1**step))


def _buckets(leaves: list[tuple], limit: int) -> Iterator[tuple[list, ...]]:
    """Large leaves cut into flat pieces, small ones put together, so that about `limit` elements of each kind are worked on at a time."""
    bucket, size = [], 0
    for leaf in leaves:
        decay, u, *_ = leaf
        cut = [leaf] if u.numel() <= limit else [(decay, *piece) for piece in zip(*(x.reshape(-1).split(limit) for x in leaf[1:]), strict=True)]
        for piece in cut:
            bucket.append(piece)
            size += piece[1].numel()
            if size >= limit:
                yield tuple(map(list, zip(*bucket, strict=True)))
                bucket, size = [], 0
    if bucket:
        yield tuple(map(list, zip(*bucket, strict=True)))


def _moment(p: torch.Tensor) -> torch.Tensor | None:
    if not p.requires_grad:
        return None
    return torch.zeros_like(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32), memory_format=torch.contiguous_format)
