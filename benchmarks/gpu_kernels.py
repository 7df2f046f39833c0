"""Kernels on this device beside their formulas in float64, from the same inputs, drawn anew in every run.

N rows   E experts   D, F widths   P packs   T positions or tokens   H query heads   K key-value heads   d head dim
e head dim of values   V vocabulary
"""
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from reported import Case, Part

import xtf
from xtf import device, tree
from xtf.data.batch import Sample, pack_rows, room
from xtf.kernels.attention import attend, reference_attend
from xtf.kernels.cross_entropy import linear_cross_entropy, reference, reference_logprobs, token_logprobs
from xtf.kernels.experts import grouped_linear, reference_grouped_linear
from xtf.kernels.rms_norm import reference_rms_norm, rms_norm
from xtf.optim import adamw, apply_updates, schedules

Tensor = torch.Tensor
BF16, FP32 = torch.bfloat16, torch.float32
BOUND = {BF16: 1e-2, FP32: 1e-5}
ABOUT = ("error: |ours - float64| / |float64| in the 2-norm, of the output or the gradient that is farthest (named). "
         "Bounds: bf16 1e-2 (an output is rounded once, by 1.1e-3 in the mean; flash attention also rounds "
         "probabilities and their gradients, each as much), fp32 1e-5 (a product is off by 6e-8 times the square root "
         "of its terms, at most 200 here: a TensorFloat-32 product, off by 3e-4, is beyond). NaN is beyond any bound")


def part(rehearse: bool) -> Part:
    name = lambda dtype: "bf16" if dtype == BF16 else "fp32"
    cases: list[Case] = []
    add = lambda title, fn, *args: cases.append(Case(title, partial(fn, *args, rehearse)))
    for dtype in (BF16, FP32):
        for D, F in ((256, 384), (256, 4), (4, 256), (20, 12), (7, 1)):
            for bias in (False, True):
                add(f"grouped_linear {name(dtype)} {D} to {F}{', bias' * bias}", grouped, dtype, D, F, bias, "ragged")
        for rows in ("one expert", "none"):
            add(f"grouped_linear {name(dtype)}, rows of {rows}", grouped, dtype, 64, 128, True, rows)
    for dtype in (BF16, FP32):
        for heads, (H, K, d, e) in (("8 heads", (8, 8, 64, 64)), ("8 heads on 2", (8, 2, 128, 128)),
                                    ("MLA", (4, 4, 192, 128))):
            for window in (False, True):
                for sinks in (False, True):
                    add(f"attend {name(dtype)} {heads}{', window' * window}{', sinks' * sinks}", attention, dtype, H, K,
                        d, e, window, sinks)
    for dtype in (BF16, FP32):
        for D in (128, 1000, 5120):                                  # a head, no power of two, more than a block
            add(f"rms_norm {name(dtype)} {D}", norm, dtype, D)
        for z_loss in (0.0, 1e-3):
            add(f"linear_cross_entropy {name(dtype)}{', z-loss' * bool(z_loss)}", cross_entropy, dtype, z_loss)
        add(f"token_logprobs {name(dtype)}", logprobs, dtype)
    for moments in ("fp32", "bf16", "int8"):
        add(f"adamw, {moments} moments, a step that is not ok", nothing_moves, moments)
    add("adamw, three steps", three_steps)
    return Part("kernels against float64", cases, ABOUT)


# ---------------------------------------------------------------- how far

def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, device=device.device()).to(dtype)


def apart(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; |got| where that is 0; inf where anything is not finite."""
    off, size = (got.double() - want.double()).norm(), want.double().norm()
    value = (off / size if size > 0 else off).item()
    return value if math.isfinite(value) else math.inf


def stale() -> None:
    """Leave NaN in the memory that the allocator gives next: what a kernel does not write shows."""
    where = device.device()
    kept = [torch.full((1 << k,), math.nan, device=where) for k in range(6, 18 if where.type == "cpu" else 25)]
    del kept                                                         # all at once: each had memory of its own


def compared(fast: Callable[..., Tensor], plain: Callable[..., Tensor], bound: float, **inputs: Tensor | None) -> dict:
    """Errors of the output and of each input's gradient. `plain` gets the inputs, and its cotangent, in float64."""
    given = {name: x for name, x in inputs.items() if x is not None}
    narrow = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    none = {name: None for name, x in inputs.items() if x is None}
    stale()
    y = fast(**narrow, **none)
    g = torch.randn_like(y)
    stale()
    gradients = torch.autograd.grad(y, list(narrow.values()), g)
    want = plain(**wide, **none)
    wanted = torch.autograd.grad(want, list(wide.values()), g.double())
    errors = {"output": apart(y.detach(), want.detach())}
    errors |= {f"d{name}": apart(a, b) for name, a, b in zip(narrow, gradients, wanted, strict=True)}
    return judged(errors, bound)


def judged(errors: dict[str, float], bound: float) -> dict:
    worst = max(errors, key=lambda name: errors[name])
    return {"ok": errors[worst] <= bound, "error": errors[worst], "of": worst, "bound": bound, "errors": errors}


# ---------------------------------------------------------------- experts

def grouped(dtype: torch.dtype, D: int, F: int, bias: bool, rows: str, rehearse: bool) -> dict:
    """Sizes of experts are drawn; the first, one in the middle and the last have no row, and 37 rows are nobody's."""
    N, E = (200 if rehearse else 2000), 8
    share_E = torch.rand(E)
    share_E[[0, E // 2, E - 1]] = 0
    if rows == "one expert":
        share_E = torch.eye(E)[1]
    ends = (share_E.cumsum(0) / share_E.sum() * (N - 37)).round().long() if rows != "none" else torch.zeros(E).long()
    offsets_E = ends.to(device.device())
    x_ND, weight_EFD = randn(N, D, dtype=dtype), randn(E, F, D, dtype=dtype)
    # biases stay float32 under bf16()
    bias_EF = randn(E, F) if bias else None

    def fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return grouped_linear(x, {"weight": weight} | ({} if bias is None else {"bias": bias}), offsets_E)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference_grouped_linear(x, weight, bias, offsets_E)
    return compared(fast, plain, BOUND[dtype], x=x_ND, weight=weight_EFD, bias=bias_EF)


# ---------------------------------------------------------------- attention

def attention(dtype: torch.dtype, H: int, K: int, d: int, e: int, window: bool, sinks: bool, rehearse: bool) -> dict:
    """Two packs of documents of all lengths, the second with padding behind them."""
    T = 96 if rehearse else 1024
    some = [[T // 2 - 5, 1, T // 4, 7], [T // 3, T // 8, 2]]
    some[0].append(T - sum(some[0]))
    packs = [[Sample([1] * n, [1] * n) for n in lengths] for lengths in some]
    batch = tree.tree_map(lambda x: x.to(device.device()), pack_rows(packs, T, room(5)))
    options: dict[str, Any] = {"segments": batch.segments, "window": T // 8 + 3 if window else None}
    q, k, v = randn(2, T, H, d, dtype=dtype), randn(2, T, K, d, dtype=dtype), randn(2, T, K, e, dtype=dtype)
    # sinks stay float32 under bf16()
    return compared(partial(_attend, attend, options), partial(_attend, reference_attend, options), BOUND[dtype],
                    q=q, k=k, v=v, sinks=randn(H) if sinks else None)


def _attend(fn: Callable, options: dict, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    return fn(q, k, v, sinks=sinks, **options)


# ---------------------------------------------------------------- norms, losses

def norm(dtype: torch.dtype, D: int, rehearse: bool) -> dict:
    # its weight stays float32 under bf16()
    return compared(partial(rms_norm, eps=1e-6), partial(reference_rms_norm, eps=1e-6), BOUND[dtype],
                    x=randn(2, 30 if rehearse else 300, D, dtype=dtype), weight=1 + randn(D))


def _head(dtype: torch.dtype, rehearse: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(x and the head's weight, labels), of so many tokens that a GPU takes them in two chunks."""
    T, V, D = (50, 403, 32) if rehearse else (2048, 151936, 64)
    inputs = {"x": randn(T, D, dtype=dtype), "weight": (randn(V, D) / D ** 0.5 * 2).to(dtype)}
    return inputs, torch.randint(V, (T,), device=device.device())


def cross_entropy(dtype: torch.dtype, z_loss: float, rehearse: bool) -> dict:
    """A third of the tokens have no weight, the others any."""
    inputs, labels_T = _head(dtype, rehearse)
    weights_T = torch.rand(len(labels_T), device=labels_T.device)
    weights_T *= torch.rand_like(weights_T) > 1 / 3
    fast, plain = (partial(_loss, fn, labels_T, weights_T, z_loss) for fn in (linear_cross_entropy, reference))
    return compared(fast, plain, BOUND[dtype], **inputs)


def _loss(fn: Callable, labels: Tensor, weights: Tensor, z_loss: float, x: Tensor, weight: Tensor) -> Tensor:
    return fn(x, weight, labels, weights, z_loss=z_loss)


def logprobs(dtype: torch.dtype, rehearse: bool) -> dict:
    inputs, labels_T = _head(dtype, rehearse)
    fast, plain = (partial(_logprobs, fn, labels_T) for fn in (token_logprobs, reference_logprobs))
    return compared(fast, plain, BOUND[dtype], **inputs)


def _logprobs(fn: Callable, labels: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return fn(x, weight, labels)


# ---------------------------------------------------------------- AdamW

LR, B1, B2, EPS, DECAY = 0.1, 0.9, 0.95, 1e-8, 0.1


def _params() -> dict[str, Tensor]:
    """A matrix large enough for moments in few bits, a vector with zeros of both signs, a matrix in bf16."""
    vector = randn(77)
    vector[:2] = torch.tensor([0.0, -0.0])
    made = {"matrix": randn(96, 130), "vector": vector, "narrow": randn(64, 80, dtype=BF16)}
    return {name: p.requires_grad_() for name, p in made.items()}


def nothing_moves(moments: Any, rehearse: bool) -> dict:
    """After one step that is ok, one that is not, with gradients of NaN and inf: no bit of anything changes, whether
    the old state may be overwritten or not."""
    tx = adamw(schedules.cosine(LR, 10, 0.2), B1, B2, EPS, DECAY, moments=moments)
    moved = []
    for donate in (False, True):
        ops, params = dataclasses.replace(xtf.LOCAL, donate=donate), _params()
        state = tx.init(params)
        for ok in (True, False):
            grads = tree.tree_map(torch.randn_like, params)
            if not ok:
                grads["matrix"][0], grads["vector"][:] = math.nan, math.inf
            before = tree.tree_map(lambda x: x.detach().clone(), {"params": params, "state": state})
            answer = torch.tensor(ok, device=device.device())
            updates, state = tx.update(grads, state, params, ops, ok=answer)
            params = apply_updates(params, updates, donate=donate)
        after = dict(tree.flatten_with_path({"params": params, "state": state}))
        moved += [path for path, x in tree.flatten_with_path(before) if not torch.equal(bits(x), bits(after[path]))]
    return {"ok": not moved, "moved": ", ".join(moved) or "nothing"}


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def three_steps(rehearse: bool) -> dict:
    """How far float32 leaves have moved, beside the formula in float64."""
    schedule, params = schedules.cosine(LR, 10, 0.2), _params()
    del params["narrow"]                                             # its own steps are smaller than its rounding
    tx = adamw(schedule, B1, B2, EPS, DECAY)
    state, first = tx.init(params), tree.tree_map(lambda p: p.detach().double(), params)
    want, m, v = (dict(tree.tree_map(fn, first)) for fn in (torch.clone, torch.zeros_like, torch.zeros_like))
    for t in range(3):
        grads = tree.tree_map(torch.randn_like, params)
        lr = schedule(torch.tensor(t)).item()
        for name, g in grads.items():
            m[name] = B1 * m[name] + (1 - B1) * g.double()
            v[name] = B2 * v[name] + (1 - B2) * g.double() ** 2
            step = m[name] / (1 - B1 ** (t + 1)) / ((v[name] / (1 - B2 ** (t + 1))).sqrt() + EPS)
            want[name] = want[name] - lr * (step + DECAY * want[name])
        updates, state = tx.update(grads, state, params, ok=torch.tensor(True, device=device.device()))
        params = apply_updates(params, updates)
    errors = {name: apart(p.detach().double() - first[name], want[name] - first[name]) for name, p in params.items()}
    errors |= {f"{which} of {name}": apart(state[which][name], kept[name]) for which, kept in (("m", m), ("v", v))
               for name in params}
    return judged(errors, BOUND[FP32])
