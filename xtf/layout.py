"""Where a leaf lives: a mesh, a placement for each of its axes, and what its gradient has to be summed over.

A *layout* is a tree of `Place` with the structure of the specs. `shard` computes it from the transforms' claims; this
file knows how a Place cuts a tensor, and prints the table.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from xtf import tree

# a fact of the mesh: ranks that differ in these hold different packs, in row-major order
PACK_AXES = ("replicate", "dp", "ep")
AXES = (*PACK_AXES, "sp")


@dataclass(frozen=True)
class Place:
    """One leaf's place: `mesh` has its storage axes flattened in front (named "store"), the others behind.

    `store` names the mesh axes that the leaf is stored over, `sums` those over which its gradient is summed by
    all-reduce, `copies` by how much the reduce-scatter overcounts (storage axes whose ranks see the same tokens).
    """
    mesh: DeviceMesh
    placements: tuple[Any, ...]
    store: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    copies: int = 1

    def box(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """This rank's part of a leaf of `shape`, as (offset, size); sizes may be 0 where a dim is short of rows.

        Uneven dims are cut into chunks of ceil(n / ranks), as DTensor does.
        """
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        offset, size = [0] * len(shape), list(shape)
        for i, p in enumerate(self.placements):
            if isinstance(p, Shard):
                chunk = -(-size[p.dim] // self.mesh.size(i))
                low = min(coordinate[i] * chunk, size[p.dim])
                offset[p.dim] += low
                size[p.dim] = min(chunk, size[p.dim] - low)
        return tuple(offset), tuple(size)

    def from_local(self, local: torch.Tensor, shape: tuple[int, ...]) -> DTensor:
        """The DTensor of `shape` whose part on this rank is `local` (moved to the mesh's device; no communication)."""
        stride = [math.prod(shape[i + 1:]) for i in range(len(shape))]
        return DTensor.from_local(local.to(self.mesh.device_type), self.mesh, self.placements, run_check=False,
                                  shape=torch.Size(shape), stride=tuple(stride))

    def put(self, whole: torch.Tensor) -> DTensor:
        """Cut a whole tensor, which every rank has, into this rank's part (copied)."""
        offset, size = self.box(tuple(whole.shape))
        part = whole.detach()[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].clone()
        out = self.from_local(part, tuple(whole.shape))
        out.requires_grad_(whole.requires_grad)
        return out


def local(t: Any) -> Any:
    """A DTensor's part on this rank; anything else as it is."""
    return t._local_tensor if isinstance(t, DTensor) else t


def like(t: torch.Tensor, stored: Any) -> torch.Tensor:
    """`t`, this rank's part, dressed as `stored` is: a DTensor of the same placement, or plain."""
    if not isinstance(stored, DTensor):
        return t
    spec = stored._spec
    if t.dtype != spec.tensor_meta.dtype:  # pyright: ignore
        spec = DTensorSpec(spec.mesh, spec.placements, spec.tensor_meta._replace(dtype=t.dtype))  # pyright: ignore
    return DTensor(t, spec, requires_grad=t.requires_grad)  # pyright: ignore


def part_like(whole: torch.Tensor, stored: Any) -> torch.Tensor:
    """This rank's part of `whole`, a tensor that all ranks have, placed as `stored` is."""
    if not isinstance(stored, DTensor):
        return whole
    offset, size = Place(stored.device_mesh, stored.placements).box(tuple(whole.shape))
    return like(whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].contiguous(), stored)


def parse_mesh(text: str) -> dict[str, int]:
    """`"dp=2,sp=2"` as sizes; those unnamed are 1.

    Raises ValueError that names the part which is not `axis=size`.

    >>> parse_mesh("sp=2")
    {'sp': 2}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, n = part.partition("=")
        if axis not in AXES or not n.isdigit() or int(n) < 1 or axis in sizes:
            raise ValueError(f"--mesh: {part!r} is not one of replicate=N, dp=N, ep=N, sp=N (each once, N at least 1)")
        sizes[axis] = int(n)
    return sizes


def put(values: tree.Tree, layout: tree.Tree) -> tree.Tree:
    """Place a tree of whole tensors, the same on every rank, by a layout of the same structure."""
    return tree.tree_map(lambda x, place: place.put(x), values, layout)


def table(specs: tree.Tree, layout: tree.Tree | None = None) -> str:
    """Each leaf's shape, axes, placement and bytes on this rank; leaves of layers that are alike share a line.

    `layout=None` is the layout of one process.
    """
    rows: dict[tuple, list[int]] = {}
    places = [None] * len(tree.leaves(specs)) if layout is None else tree.leaves(layout)
    for (path, p), place in zip(tree.flatten_with_path(specs), places, strict=True):
        generic = ".".join("*" if part.isdigit() else part for part in path.split("."))
        size = p.shape if place is None else place.box(p.shape)[1]
        where = "whole" if place is None else _where(p, place)
        rows.setdefault((generic, p.shape, str(p.dtype).removeprefix("torch."), p.axes, where, p.trainable), []).append(
            math.prod(size) * p.dtype.itemsize)
    head = ("leaf", "count", "shape", "dtype", "axes", "placement", "bytes per rank")
    body = [(name, str(len(sizes)), "×".join(map(str, shape)) or "scalar", dtype + ("" if trainable else " frozen"),
             ",".join(axes), where, f"{sum(sizes):,}")
            for (name, shape, dtype, axes, where, trainable), sizes in rows.items()]
    body.append(("total", str(sum(map(len, rows.values()))), f"{sum(math.prod(p.shape) for p in tree.leaves(specs)):,}",
                 "", "", "", f"{sum(sum(s) for s in rows.values()):,}"))
    width = [max(len(r[i]) for r in (head, *body)) for i in range(len(head))]
    line = lambda r: "  ".join(c.rjust(w) if i in (1, 6) else c.ljust(w)
                               for i, (c, w) in enumerate(zip(r, width, strict=True))).rstrip()
    return "\n".join([line(head), "  ".join("-" * w for w in width), *map(line, body)])


def _where(p: Any, place: Place) -> str:
    """`embed/dp·sp` for a dim stored over dp and sp, `heads:tp` for one computed over tp, `whole` if neither."""
    out = []
    for i, (name, placement) in enumerate(zip(place.mesh.mesh_dim_names or (), place.placements, strict=True)):
        if isinstance(placement, Shard) and not isinstance(placement, Replicate) and place.mesh.size(i) > 1:
            out.append(f"{p.axes[placement.dim]}/{'·'.join(place.store)}" if i == 0
                       else f"{p.axes[placement.dim]}:{name}")
    return " ".join(out) or "whole"
