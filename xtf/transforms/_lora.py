"""`lora`: products stay frozen, and beside each a product of two narrow ones is learnt.

    y = x Wᵀ + s (x Aᵀ) Bᵀ,   A [rank, in],   B [out, rank],   s = alpha / rank

A product's node gains the leaves `lora_a` and `lora_b` (stacked experts: [E, rank, in] and [E, out, rank]); they are
parameters like any others, so fsdp stores them, ep and tensor parallelism claim their dims by axis, and
`value_and_grad` returns None for all else.

Source: Hu et al., arXiv 2106.09685.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from xtf import tree
from xtf.layout import Place, like, local
from xtf.ops import Ops
from xtf.spec import ZEROS, Param, is_matrix
from xtf.transform import Env, Stage, Transform

A, B = "lora_a", "lora_b"
ADAPTERS = A, B
UNTOUCHED = {"vocab", "router"}  # the loss reads the head's weight itself; routers are scored in full


@dataclass(frozen=True)
class FanIn:
    """Uniform draws within ±1 / sqrt(fan in): how PEFT and torch's own linear layers start."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        bound = 1 / math.sqrt(shape[-1])
        return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


@dataclass(frozen=True)
class Lora(Transform):
    """What `lora` returns: a transform that says its rank and alpha, for `merge` and `xtf.peft`."""
    rank: int = 1
    alpha: float = 1.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def lora(rank: int, alpha: float | None = None, targets: Sequence[str] | None = None,
         base_dtype: torch.dtype | None = None) -> Lora:
    """Adapters of `rank` beside the products that `targets` name; all else is frozen: no gradient, no optimizer state.

    `targets` are node paths or parts of them (`"q"`, `"experts"`, `"layers.0.mlp.up"`); None is every product but
    vocabulary and routers. `alpha` is 2 × rank by default. `base_dtype=torch.bfloat16` stores the frozen float32
    matrices in half the bytes; they compute in float32 nevertheless, unless `bf16()` is there.

    Raises ValueError if rank or alpha is not positive, and, in `shard`, for a target that no product has.

    >>> w = Param((8, 4), torch.float32, ("mlp", "embed"))
    >>> specs = lora(2).specs({"up": {"weight": w}})
    >>> specs["up"]["lora_a"].shape, specs["up"]["lora_b"].axes, specs["up"]["weight"].trainable
    ((2, 4), ('mlp', 'rank'), False)
    """
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise ValueError(f"lora: rank and alpha must be positive, got rank={rank}, alpha={alpha}")
    wide = lambda x: torch.float32 if x.dtype == base_dtype and x.ndim >= 2 else None
    made = Lora("lora", Stage.WEIGHTS, specs=lambda specs: _adapted(specs, rank, targets, base_dtype),
                cast=wide if base_dtype else None, rank=rank, alpha=2.0 * rank if alpha is None else float(alpha))
    return replace(made, wrap=lambda ops, env: _wrap(ops, env, made.scale))


def _adapted(specs: tree.Tree, rank: int, targets: Sequence[str] | None, base_dtype: torch.dtype | None) -> tree.Tree:
    products: list[str] = []
    used: set[str] = set()

    def frozen(p: Param) -> Param:
        narrow = base_dtype is not None and p.dtype == torch.float32 and is_matrix(p)
        return replace(p, trainable=False, dtype=base_dtype if narrow else p.dtype)

    def visit(path: str, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(visit(f"{path}{i}.", child) for i, child in enumerate(x))
        if not isinstance(x, dict):
            return frozen(x)
        out = {key: visit(f"{path}{key}.", child) for key, child in x.items()}
        if _is_product(x.get("weight")):
            products.append(path[:-1])
            hits = [t for t in targets or () if f".{t}." in f".{path}"]
            used.update(hits)
            if targets is None or hits:
                out |= _adapter(x["weight"], rank)
        return out

    out = visit("", specs)
    if unknown := sorted(set(targets or ()) - used):
        known = sorted({".".join("*" if part.isdigit() else part for part in path.split(".")) for path in products})
        raise ValueError(f"lora: targets {unknown} name no product; the model's products are {', '.join(known)}")
    if not products:
        raise ValueError("lora: the specs have no product to adapt: no node with a `weight` of axes (out, in)")
    return out


def _is_product(p: Any) -> bool:
    return isinstance(p, Param) and is_matrix(p) and not UNTOUCHED & set(p.axes)


def _adapter(w: Param, rank: int) -> dict[str, Param]:
    *experts, rows, columns = zip(w.shape, w.axes, strict=True)
    spec = lambda init, *dims: Param(tuple(n for n, _ in dims), w.dtype, tuple(a for _, a in dims), init)
    narrow = rank, "rank"
    return {A: spec(FanIn(), *experts, narrow, columns), B: spec(ZEROS, *experts, rows, narrow)}


def _wrap(ops: Ops, env: Env, scale: float) -> Ops:
    """The adapters go through the inner `linear` too, so what splits products splits them."""
    def adapted(product: Callable, x: torch.Tensor, node: dict, axes: tuple[str, str], *offsets: Any) -> torch.Tensor:
        y = product(x, {k: v for k, v in node.items() if k not in ADAPTERS}, *offsets, axes)
        if A not in node:
            return y
        narrow = product(x, {"weight": node[A]}, *offsets, (axes[0], "rank")) * scale
        return y + product(narrow, {"weight": node[B]}, *offsets, ("rank", axes[1]))

    return replace(ops, linear=lambda x, node, axes: adapted(ops.linear, x, node, axes),
                   grouped_linear=lambda x, node, offsets, axes: adapted(ops.grouped_linear, x, node, axes, offsets))


# ---- trees with and without adapters ---------------------------------------------------------------------------------

def base(values: tree.Tree) -> tree.Tree:
    """A tree (of specs, parameters, places) without its adapters.

    >>> base({"q": {"weight": 0, "lora_a": 1, "lora_b": 2}})
    {'q': {'weight': 0}}
    """
    if isinstance(values, dict):
        return {key: base(child) for key, child in values.items() if key not in ADAPTERS}
    return type(values)(map(base, values)) if type(values) in (list, tuple) else values


def adapters(values: tree.Tree) -> tree.Tree:
    """The adapters alone, at the paths that they have in the tree.

    >>> adapters({"norm": {"weight": 0}, "layers": [{"q": {"weight": 0, "lora_a": 1, "lora_b": 2}}]})
    {'norm': {}, 'layers': [{'q': {'lora_a': 1, 'lora_b': 2}}]}
    """
    if isinstance(values, dict):
        kept = {key: child if key in ADAPTERS else adapters(child) for key, child in values.items()}
        return {key: child for key, child in kept.items() if child is not None}
    return type(values)(map(adapters, values)) if type(values) in (list, tuple) else None


def join(values: tree.Tree, more: tree.Tree) -> tree.Tree:
    """`base` and `adapters` undone.

    >>> join({"q": {"weight": 0}}, {"q": {"lora_a": 1, "lora_b": 2}})
    {'q': {'weight': 0, 'lora_a': 1, 'lora_b': 2}}
    """
    if isinstance(values, dict):
        return {key: join(child, more[key]) if key in more else child for key, child in values.items()} | \
            {key: child for key, child in more.items() if key in ADAPTERS}
    return type(values)(map(join, values, more)) if type(values) in (list, tuple) else values


@torch.no_grad()
def merge(params: tree.Tree, adapter: Lora) -> tree.Tree:
    """The same function's parameters without adapters: W + scale B A, in at least float32, rounded once to W's dtype.

    Leaves may be DTensors: each rank keeps its part of W, and gathers A and B of one product at a time (all ranks call
    this). Leaves without adapters are the same tensors.

    >>> node = {"weight": torch.zeros(1, 2), "lora_a": torch.tensor([[1.0, 2.0]]), "lora_b": torch.tensor([[3.0]])}
    >>> merge({"q": node}, lora(1, alpha=10.0))
    {'q': {'weight': tensor([[30., 60.]])}}
    """
    def visit(x: Any) -> Any:
        if isinstance(x, dict):
            out = {key: visit(child) for key, child in x.items() if key not in ADAPTERS}
            return out | {"weight": _merged(x["weight"], x[A], x[B], adapter)} if A in x else out
        return type(x)(map(visit, x)) if type(x) in (list, tuple) else x
    return visit(params)


def _merged(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapter: Lora) -> torch.Tensor:
    if a.shape[-2] != adapter.rank:
        raise ValueError(f"lora.merge: the adapters have rank {a.shape[-2]}, the transform {adapter.rank}; pass the "
                         "one that they were trained with")
    part = local(w).detach()
    wide = torch.promote_types(part.dtype, torch.float32)
    a, b = (x.full_tensor() if isinstance(x, DTensor) else x for x in (a, b))
    if isinstance(w, DTensor):
        offset, size = Place(w.device_mesh, w.placements).box(tuple(w.shape))
    else:
        offset, size = (0,) * w.ndim, tuple(w.shape)
    *experts, rows, columns = (slice(o, o + n) for o, n in zip(offset, size, strict=True))
    product = b[(*experts, rows)].to(wide) @ a[(*experts, slice(None), columns)].to(wide)
    return like((part.to(wide) + adapter.scale * product).to(part.dtype), w)
