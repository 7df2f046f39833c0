"""`matrices`: work on whole matrices that are stored in parts, each matrix done by one of the ranks that store it.

Ranks that hold other matrices of a stack (experts) have nothing to do with each other. Those that hold parts or copies
of the same matrices share them out by cost, largest first, each to the rank with the least so far. One all-to-all
brings an owner the parts of its matrices, from the ranks of its own replica; a second one takes the results to every
rank that stores a part.
"""
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

from xtf.layout import like, local
from xtf.ops import as_stack, in_stacks, local_matrices
from xtf.parallel import _mesh as M
from xtf.parallel import collectives as C


class Part(NamedTuple):
    """What a rank of the group stores of each matrix, and which of the copies it belongs to."""
    rows: slice
    columns: slice
    copy: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class Run(NamedTuple):
    """Matrices `some` of the stack of leaf `leaf`, for rank `owner` of the group to do."""
    leaf: int
    some: slice
    owner: int

    @property
    def count(self) -> int:
        return self.some.stop - self.some.start


def matrices(fn: Callable[[torch.Tensor], torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """`fn(x_Nab)` of the whole matrices of each leaf [..., a, b], in the leaf's placement; `fn` keeps shape and dtype.

    Bytes: for each matrix of S bytes, cut in W parts and stored R times, its owner is sent S less its own part, and
    sends R S less its own part: with even parts ((W - 1) + (R W - 1)) / W × S over all ranks. Nothing moves where ranks
    store whole matrices once, and each matrix is computed once.
    """
    out: list[Any] = [None] * len(leaves)
    alone = [i for i, leaf in enumerate(leaves) if not _sharing(leaf)]
    for i, y in zip(alone, local_matrices(fn, [local(leaves[i]) for i in alone]), strict=True):
        out[i] = like(y, leaves[i])
    jobs: dict[tuple, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if out[i] is None:
            jobs.setdefault((leaf.device_mesh, _sharing(leaf), leaf.dtype), []).append(i)  # pyright: ignore
    for (mesh, axes, _), members in jobs.items():
        done = _shared(fn, [leaves[i] for i in members], mesh, axes)
        for i, y in zip(members, done, strict=True):
            out[i] = like(y, leaves[i])
    return out


def _sharing(leaf: torch.Tensor) -> tuple[int, ...]:
    """The mesh axes whose ranks hold parts or copies of the same matrices."""
    if not isinstance(leaf, DTensor):
        return ()
    return tuple(i for i, p in enumerate(leaf.placements)
                 if leaf.device_mesh.size(i) > 1 and not (isinstance(p, Shard) and p.dim < leaf.ndim - 2))


def _shared(fn: Callable, leaves: list, mesh: Any, axes: tuple[int, ...]) -> list[torch.Tensor]:
    names = (M.axes(mesh)[i] for i in axes)
    group = M.group_of(mesh, "gradients") if axes == (0,) else M.group(mesh, *names, use="gradients")
    ranks, me = range(group.size), group.pg.rank()
    parts = [_parts(leaf, mesh, axes) for leaf in leaves]
    stacks = [as_stack(local(leaf)) for leaf in leaves]
    runs = _share_out([(len(x), *leaf.shape[-2:]) for x, leaf in zip(stacks, leaves, strict=True)], group.size)
    mine = [r for r in runs if r.owner == me]
    together = lambda run, i, j: parts[run.leaf][i].copy == parts[run.leaf][j].copy

    there = [[stacks[r.leaf][r.some] for r in runs if r.owner == j and together(r, me, j)] for j in ranks]
    sizes = [sum(r.count * math.prod(parts[r.leaf][j].shape) for r in mine if together(r, me, j)) for j in ranks]
    came = C.exchange(there, sizes, group, stacks[0])
    wholes = [stacks[r.leaf].new_empty(r.count, *leaves[r.leaf].shape[-2:]) for r in mine]
    for j, flat in zip(ranks, came, strict=True):
        for r, whole in zip(mine, wholes, strict=True):
            if together(r, me, j):
                part, shape = parts[r.leaf][j], (r.count, *parts[r.leaf][j].shape)
                whole[:, part.rows, part.columns] = flat[:math.prod(shape)].view(shape)
                flat = flat[math.prod(shape):]

    wholes = in_stacks(fn, wholes)
    back = [[whole[:, parts[r.leaf][j].rows, parts[r.leaf][j].columns] for r, whole in zip(mine, wholes, strict=True)]
            for j in ranks]
    sizes = [sum(r.count * math.prod(parts[r.leaf][me].shape) for r in runs if r.owner == j) for j in ranks]
    came = C.exchange(back, sizes, group, stacks[0])
    out = [torch.empty_like(x) for x in stacks]
    for j, flat in zip(ranks, came, strict=True):
        for r in runs:
            if r.owner == j:
                shape = (r.count, *out[r.leaf].shape[1:])
                out[r.leaf][r.some] = flat[:math.prod(shape)].view(shape)
                flat = flat[math.prod(shape):]
    return [y.view(local(leaf).shape) for y, leaf in zip(out, leaves, strict=True)]


def _parts(leaf: DTensor, mesh: Any, axes: tuple[int, ...]) -> list[Part]:
    """For each rank of the group, which numbers its ranks by their global numbers, not by the axes' order."""
    here = mesh.get_coordinate()
    found = {}
    for there in itertools.product(*(range(mesh.size(i)) if i in axes else (here[i],) for i in range(mesh.ndim))):
        span, copy = [slice(0, n) for n in leaf.shape[-2:]], []
        for i in axes:
            p = leaf.placements[i]
            if isinstance(p, Shard):
                s = span[p.dim - leaf.ndim + 2]
                chunk = -(-(s.stop - s.start) // mesh.size(i))
                low = min(s.start + there[i] * chunk, s.stop)
                span[p.dim - leaf.ndim + 2] = slice(low, min(low + chunk, s.stop))
            else:
                copy.append(there[i])
        found[int(mesh.mesh[there])] = Part(span[0], span[1], tuple(copy))
    return [part for _, part in sorted(found.items(), key=lambda x: x[0])]


def _share_out(shapes: list[tuple[int, int, int]], ranks: int) -> list[Run]:
    """Runs of each stack [N, a, b], at most one for each rank; the dearest first to whoever has least."""
    pieces = []
    for leaf, (n, a, b) in enumerate(shapes):
        cuts = [n * i // min(n, ranks) for i in range(min(n, ranks) + 1)] if n else []
        pieces += [(a * b * min(a, b) * (high - low), leaf, slice(low, high)) for low, high in itertools.pairwise(cuts)]
    load, runs = [0] * ranks, []
    for cost, leaf, some in sorted(pieces, key=lambda x: -x[0]):
        owner = min(range(ranks), key=lambda r: load[r])
        load[owner] += cost
        runs.append(Run(leaf, some, owner))
    return runs
