"""Moments in fewer bits: bf16, or 8 bits with a scale for each block; rounded without bias, alike on every layout.

Both keep the leading bits of a float32. The bits that are dropped are not rounded to nearest: an average that moves by
a thousandth a step would never leave its place. A dither u in [0, 1) is added before they are cut, so that the mean
over steps is exact. u walks through the unit interval evenly (Roberts' R sequence: the fractional part of Σ index_d
α^(d+1), with one more term for the step), so that errors of successive steps cancel instead of adding up; it depends on
an element's place in the whole leaf and on the step alone.

"int8": with the largest magnitude s of a block of 256 along the last dim, the code of x is the number of steps of 1/8
octave that |x| / s + c lies above c: so steps are at most (|x| + c s) / 8, and zero is a code. m has a sign and c =
2^-15; v has none and c = 2^-31, and its zero counts as c s / 8: where m's last bit is left but v's is not, their
quotient would have no bound. Blocks are those of the whole leaf: scales have its placement, but are whole along the
last dim, where ranks agree by a maximum.

Leaves of less than two dims or 4096 elements keep float32: they are no memory to speak of.

Block-wise scales: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section 2 (with another code:
theirs is rounded to nearest).
"""
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard

from xtf import device, tree
from xtf.layout import Place, like, local
from xtf.parallel import collectives as C

Kind = Literal["fp32", "bf16", "int8"]
BLOCK, LEAST = 256, 4096
DROPPED = 20  # bits of a float32 that an 8-bit code leaves out: 3 of its 23 stay
SMALLEST = {torch.int8: 2.0**-15, torch.uint8: 2.0**-31}  # c


def makers(kind: Kind) -> tuple[Callable, Callable]:
    """(first moment of a leaf, second moment), zeros; None for a frozen leaf.

    >>> m, v = makers("int8")
    >>> v(torch.ones(32, 300, requires_grad=True))["codes"].dtype, m(torch.ones(3, requires_grad=True)).dtype
    (torch.uint8, torch.float32)
    """
    if kind not in ("fp32", "bf16", "int8"):
        raise ValueError(f'adamw: moments must be "fp32", "bf16" or "int8", got {kind!r}')

    def make(p: torch.Tensor, codes: torch.dtype) -> Any:
        if not p.requires_grad:
            return None
        zeros = lambda dtype: torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.contiguous_format)
        if kind == "fp32" or p.ndim < 2 or p.numel() < LEAST:
            return zeros(torch.promote_types(p.dtype, torch.float32))
        return zeros(torch.bfloat16) if kind == "bf16" else {"codes": zeros(codes), "scales": _scales(p)}
    return lambda p: make(p, torch.int8), lambda p: make(p, torch.uint8)


def _scales(p: torch.Tensor) -> torch.Tensor:
    """Zeros: one number for each block, placed as the leaf but whole along the last dim."""
    shape = (*p.shape[:-1], -(-p.shape[-1] // BLOCK))
    zeros = torch.zeros(*local(p).shape[:-1], shape[-1], device=local(p).device)
    if not isinstance(p, DTensor):
        return zeros
    along = [Replicate() if isinstance(x, Shard) and x.dim == p.ndim - 1 else x for x in p.placements]
    return Place(p.device_mesh, tuple(along)).from_local(zeros, shape)


def copy(node: Any) -> Any:
    """A moment in memory of its own."""
    return tree.tree_map(lambda x: like(local(x).clone(), x), node)


def rows(adam: Callable, u: torch.Tensor, p: torch.Tensor, m: Any, v: Any, step: torch.Tensor,
         ok: torch.Tensor | None) -> None:
    """`adam(u, p, m, v)` on float32 moments, some rows (along the last dim) of a leaf at a time; m and v are
    overwritten where `ok`."""
    n, here, number = p.shape[-1], local(p).shape[-1], local(p).shape[:-1].numel()
    flat = lambda x: x.reshape(number, x.shape[-1])                    # not -1: there may be no element
    open_ = lambda node: {k: flat(local(x)) for k, x in node.items()} if isinstance(node, dict) else flat(local(node))
    m, v, columns = open_(m), open_(v), _box(p)[0][-1]
    u, whole = flat(u), flat(local(p))
    by_row, by_column = dither(p, step)
    # by the whole leaf, so that ranks take the same number of pieces
    most = max(1, device.piece(u.device) // max(n, 1))
    for at in range(0, number, most):
        cut = slice(at, at + most)
        some = [{k: x[cut] for k, x in node.items()} if isinstance(node, dict) else node[cut] for node in (m, v)]
        wide = [decode(x, columns, here).to(u.dtype) for x in some]
        adam(u[cut], whole[cut], *wide)
        u_ = by_row[cut, None] + by_column
        u_ -= u_.floor()
        for node, x in zip(some, wide, strict=True):
            encode(node, x.float(), u_, columns, p, ok)


def dither(p: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (by row [rows], by column [n]) whose sum's fractional part is u for each element here, at this step."""
    where, box = local(p).device, _box(p)
    alpha = _golden(p.ndim + 1)
    parts = [(o + torch.arange(s, dtype=torch.float64, device=where)) * alpha ** (d + 1) % 1
             for d, (o, s) in enumerate(zip(*box, strict=True))]
    by_row = (step.to(torch.float64) * alpha ** (p.ndim + 1) % 1).reshape(1)
    for part in parts[:-1]:
        by_row = (by_row[:, None] + part).reshape(-1) % 1
    return by_row.float(), parts[-1].float()


@functools.cache
def _golden(dims: int) -> float:
    """1 / x with x^(dims + 1) = x + 1: the generalised golden ratio."""
    x = 2.0
    for _ in range(60):
        x = (1 + x) ** (1 / (dims + 1))
    return 1 / x


def _box(p: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offset, size) of this rank's part of a leaf."""
    if isinstance(p, DTensor):
        return Place(p.device_mesh, p.placements).box(tuple(p.shape))
    return (0,) * p.ndim, tuple(p.shape)


def decode(node: Any, first: int, n: int) -> torch.Tensor:
    """float32 [rows, n] of a moment's rows, whose first column is column `first` of the leaf."""
    if not isinstance(node, dict):
        return node.float()
    codes, c = node["codes"], SMALLEST[node["codes"].dtype]
    x_RkB, blocks = _blocks(codes.to(torch.int32), first)
    y_RkB = ((x_RkB.abs() << DROPPED) + _bits(c)).view(torch.float32).sub_(c)
    y_RkB = y_RkB.clamp_(min=c / 8) if codes.dtype is torch.uint8 else y_RkB.mul_(x_RkB.sign())
    return y_RkB.mul_(node["scales"][:, blocks, None]).flatten(1)[:, first % BLOCK:first % BLOCK + n].contiguous()


def encode(node: Any, x: torch.Tensor, u: torch.Tensor, first: int, p: torch.Tensor, ok: torch.Tensor | None) -> None:
    """Write float32 [rows, n] into a moment's rows, rounded with the dither `u`, where `ok`."""
    put = lambda old, new: old.copy_(new if ok is None else torch.where(ok, new, old))
    if not isinstance(node, dict):
        put(node, _cut(x, u, 16).to(torch.bfloat16))
        return
    c = SMALLEST[node["codes"].dtype]
    x_RkB, blocks = _blocks(x, first)
    scales = torch.zeros_like(node["scales"])
    scales[:, blocks] = x_RkB.abs().amax(-1)
    C.max_along(scales, p, p.ndim - 1)
    s_Rk1 = scales[:, blocks, None]
    y_RkB = (x_RkB.abs() / torch.where(s_Rk1 == 0, 1.0, s_Rk1)).add_(c)
    codes = ((y_RkB.view(torch.int32) - _bits(c) + (_blocks(u, first)[0] * 2**DROPPED).to(torch.int32)) >> DROPPED)
    codes = codes.clamp_(max=torch.iinfo(node["codes"].dtype).max)
    if node["codes"].dtype is torch.int8:
        codes = codes * x_RkB.sign().to(torch.int32)
    put(node["codes"], codes.flatten(1)[:, first % BLOCK:first % BLOCK + x.shape[1]].to(node["codes"].dtype))
    put(node["scales"], scales)


def _cut(x: torch.Tensor, u: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 with the last `bits` bits zero: those of x, and of u in [0, 1) of the next step away from zero."""
    return (((x.contiguous().view(torch.int32) + (u * 2**bits).to(torch.int32)) >> bits) << bits).view(torch.float32)


@functools.cache
def _bits(c: float) -> int:
    return int(torch.tensor(c, dtype=torch.float32).view(torch.int32))


def _blocks(x: torch.Tensor, first: int) -> tuple[torch.Tensor, slice]:
    """[rows, n] as [rows, blocks, BLOCK] from column `first` of the leaf on, padded with zeros; and which blocks of the
    leaf they are."""
    before = first % BLOCK
    x = F.pad(x, (before, -(before + x.shape[1]) % BLOCK)).unflatten(1, (-1, BLOCK))
    return x, slice(first // BLOCK, first // BLOCK + x.shape[1])
