"""AdamW, fused over leaves: one pass over gradients, moments and parameters, in pieces that stay in the cache."""
from collections.abc import Callable, Iterator
from typing import Any

import torch

from xtf import tree
from xtf.ops import LOCAL, Ops
from xtf.optim.core import Optimizer, Taken
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
        stored, treedef = tree.flatten(params)
        gs, ms, vs = (_leaves_like(treedef, what, x) for what, x in (("gradients", grads), ("state m", state["m"]), ("state v", state["v"])))
        decays = [True] * len(stored) if mask is None else [mask(path, p) for path, p in tree.flatten_with_path(params)]
        rate = float(lr(state["step"])) if callable(lr) else lr
        step = state["step"] + 1
        updates: list[Any] = [None] * len(stored)
        jobs: dict[tuple, list[tuple]] = {}
        taken = Taken()
        for i, (g, p, m, v, decay) in enumerate(zip(gs, stored, ms, vs, decays, strict=True)):
            if g is None:
                continue
            if m is None or g.shape != p.shape:
                path = tree.flatten_with_path(params)[i][0]
                raise ValueError(f"adamw: {path} has a gradient of shape {tuple(g.shape)}, but " + (
                    "its moments are None: it was frozen at init; init the optimizer again" if m is None else f"its parameter has {tuple(p.shape)}"))
            old = local(m).contiguous(), local(v).contiguous()
            new = old if ops.donate else (torch.empty_like(old[0]), torch.empty_like(old[1]))
            u = taken.own(local(g), old[0].dtype)
            updates[i], ms[i], vs[i] = like(u, m), like(new[0], m), like(new[1], v)
            if u.numel():
                flat = [x.view(-1) for x in (u, local(p).contiguous(), *old, *new)]
                jobs.setdefault((u.device, u.dtype), []).append((-rate * weight_decay * decay, *flat))
        for (device, dtype), leaves in jobs.items():
            _adamw(leaves, device, dtype, int(step), ops.donate, lr=rate, beta1=b1, beta2=b2, eps=eps)
        return tree.unflatten(updates, treedef), {"step": step, "m": tree.unflatten(ms, treedef), "v": tree.unflatten(vs, treedef)}
    return Optimizer(init, update)


def _adamw(leaves: list[tuple], device: torch.device, dtype: torch.dtype, step: int, donate: bool, **numbers: Any) -> None:
    """Leaves are (decay, u, p, old m, old v, new m, new v), flat; `u` holds the gradient and becomes the update.

    The update starts as the decay, and torch's fused kernel, given it for a parameter, takes Adam's part off it.
    """
    limit = 1 << 19 if device.type == "cpu" else 1 << 26
    scratch = torch.empty(min(limit, sum(u.numel() for _, u, *_ in leaves)), dtype=dtype, device=device)
    count = torch.full((), step, dtype=torch.float32, device=device)
    for decay, us, ps, old_ms, old_vs, ms, vs in _buckets(leaves, limit):
        gs = scratch[:sum(u.numel() for u in us)].split([u.numel() for u in us])
        torch._foreach_copy_(gs, us)
        torch._foreach_copy_(us, ps)
        torch._foreach_mul_(us, decay)
        if not donate:
            torch._foreach_copy_(ms + vs, old_ms + old_vs)
        torch._fused_adamw_(us, gs, ms, vs, [], [count] * len(us), weight_decay=0.0, amsgrad=False, maximize=False, **numbers)


def _buckets(leaves: list[tuple], limit: int) -> Iterator[list[list]]:
    """The leaves' tensors cut into pieces, and pieces put together, so that `limit` elements of each are worked on at a time."""
    bucket, size = [], 0
    for decay, *tensors in leaves:
        for piece in zip(*(x.split(limit) for x in tensors), strict=True):
            if bucket and size + piece[0].numel() > limit:
                yield [list(column) for column in zip(*bucket, strict=True)]
                bucket, size = [], 0
            bucket.append((decay, *piece))
            size += piece[0].numel()
    if bucket:
        yield [list(column) for column in zip(*bucket, strict=True)]


def _moment(p: torch.Tensor) -> torch.Tensor | None:
    if not p.requires_grad:
        return None
    return torch.zeros_like(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32), memory_format=torch.contiguous_format)


def _leaves_like(treedef: Any, what: str, values: tree.Tree) -> list:
    leaves, other = tree.flatten(values)
    if other != treedef:
        raise ValueError(f"adamw: {what} and parameters differ in structure:\n{other}\n{treedef}")
    return leaves
