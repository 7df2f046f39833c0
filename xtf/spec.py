"""What a parameter is before it exists: shape, dtype, logical axes, initialiser, trainable or not.

A model's `specs(cfg)` is a tree of `Param` with the structure of its parameters. Placements, initial values, name maps,
counts and memory plans are all maps over that one tree.
"""
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xtf import tree
from xtf.layout import Place

Init = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Normal:
    """Independent normal draws with standard deviation `std` around `mean`."""
    std: float = 0.02
    mean: float = 0.0

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(self.std).add_(self.mean)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""
    value: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, self.value)


ZEROS, ONES = Constant(0.0), Constant(1.0)


@dataclass(frozen=True)
class Param:
    """The description of one parameter.

    `axes` names each dim by its logical axis (`("mlp", "embed")`); transforms place leaves by these names. `wide`:
    though a matrix, it is to compute in the dtype that it is stored in (routers of families that score in float32).

    Raises ValueError if `shape` and `axes` differ in length.

    >>> Param((8, 4), torch.float32, ("mlp", "embed")).shape
    (8, 4)
    """
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[str, ...]
    init: Init = Normal()
    trainable: bool = True
    wide: bool = False

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Param: shape {self.shape} has {len(self.shape)} dims but axes {self.axes} names "
                             f"{len(self.axes)}")


def is_matrix(p: Param) -> bool:
    """Whether a leaf is a matrix, or a stack of them, one an expert: two axes besides a leading "expert".

    What asks whether to cast, to decay, to make orthogonal or to adapt a leaf asks this, and not how many dims it has:
    the biases of stacked experts have two, and are no matrix.

    >>> [is_matrix(Param((2,) * len(axes), torch.float32, axes))
    ...  for axes in (("mlp", "embed"), ("expert", "mlp", "embed"), ("expert", "mlp"), ("embed",))]
    [True, True, False, False]
    """
    return len(p.axes) - (p.axes[:1] == ("expert",)) == 2


def matrices(specs: tree.Tree) -> Callable[[str, Any], bool]:
    """A mask `(path, leaf) -> whether it is a matrix`, for what is asked of leaves by their paths (optimizers).

    `specs` are a model's; what a transform puts beside a product's weight (adapters) is what the weight is. The mask
    raises ValueError for a leaf that stands beside none.

    >>> decays = matrices({"up": {"weight": Param((8, 4), torch.float32, ("mlp", "embed")),
    ...                           "bias": Param((8,), torch.float32, ("mlp",))}})
    >>> [decays(path, None) for path in ("up.weight", "up.bias", "up.lora_a")]
    [True, False, True]
    """
    known = {path: is_matrix(p) for path, p in tree.flatten_with_path(specs)}

    def mask(path: str, leaf: Any) -> bool:
        beside = path.rpartition(".")[0] + ".weight"
        if path not in known and beside not in known:
            raise ValueError(f"matrices: the specs have neither {path} nor {beside}; pass those of the model whose "
                             "parameters these are")
        return known.get(path, known.get(beside, False))
    return mask


def num_params(specs: tree.Tree, trainable_only: bool = False) -> int:
    """How many numbers the tree describes.

    >>> num_params({"w": Param((8, 4), torch.float32, ("mlp", "embed"))})
    32
    """
    return sum(math.prod(p.shape) for p in tree.leaves(specs) if p.trainable or not trainable_only)


def init(specs: tree.Tree, seed: int = 0, layout: tree.Tree | None = None,
         device: torch.device | str = "cpu") -> tree.Tree:
    """Draw every leaf: the values depend on `seed`, the leaf's path and shape, and on nothing else (law 7).

    Returns a tree of tensors, or of DTensors placed by `layout` (as `shard(...)` returns it in `.layout`); each rank
    draws only the rows that it stores. `requires_grad` says trainable.

    >>> w = init({"w": Param((2, 2), torch.float32, ("mlp", "embed"), ONES)})["w"]
    >>> w.tolist(), w.requires_grad
    ([[1.0, 1.0], [1.0, 1.0]], True)
    """
    if layout is None:
        return tree.map_with_path(lambda path, p: _whole(path, p, seed, device), specs)
    return tree.map_with_path(lambda path, p, place: _placed(path, p, place, seed), specs, layout)


def _whole(path: str, p: Param, seed: int, device: Any) -> torch.Tensor:
    value = draw(path, p, seed, (0,) * len(p.shape), p.shape).to(device)
    return value.requires_grad_(p.trainable and p.dtype.is_floating_point)


def _placed(path: str, p: Param, place: Place, seed: int) -> torch.Tensor:
    offset, size = place.box(p.shape)
    value = place.from_local(draw(path, p, seed, offset, size), p.shape)
    return value.requires_grad_(p.trainable and p.dtype.is_floating_point)


def draw(path: str, p: Param, seed: int, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    """The box `[offset, offset + size)` of leaf `path`, drawn on the CPU in blocks of rows, each with its own counter.

    A block's generator is seeded by (seed, path, first row), so that a rank with rows 1000 to 1999 of a 22 GB leaf
    draws a little more than those, and gets what one process would have drawn there.
    """
    if not p.shape:
        return p.init((), _generator(path, seed, 0)).to(p.dtype)
    if 0 in size:
        return torch.empty(size, dtype=p.dtype)
    row = math.prod(p.shape[1:])
    rows = max(1, (1 << 18) // max(row, 1))                          # rows a block: a function of the shape alone
    out = torch.empty(size, dtype=p.dtype)
    columns = tuple(slice(o, o + s) for o, s in zip(offset[1:], size[1:], strict=True))
    first, last = offset[0], offset[0] + size[0]
    for start in range(first // rows * rows, last, rows):
        block = p.init((min(rows, p.shape[0] - start), *p.shape[1:]), _generator(path, seed, start))
        lo, hi = max(start, first), min(start + len(block), last)
        out[lo - first:hi - first] = block[(slice(lo - start, hi - start), *columns)]
    return out


def _generator(path: str, seed: int, counter: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{path}/{counter}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
