"""`shard`: a fold over transforms. Specs, claims and `Ops` go in, a step of the plain one's signature comes out."""
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from xtf import tree
from xtf.layout import AXES, PACK_AXES, Place, local
from xtf.ops import LOCAL, Ops, leaf_norms, scan_with
from xtf.parallel import _mesh as M
from xtf.parallel import collectives as C
from xtf.parallel.matrices import matrices
from xtf.parallel.sums import Sums
from xtf.transform import Env, Transform, computed


def shard(step: Callable, *transforms: Transform, mesh: DeviceMesh | None = None, specs: tree.Tree) -> Callable:
    """The step on a layout: `run(state, batch)` computes what `step(state, batch)` computes (law 1).

    Transforms may come in any order. The result has `.specs` (after the transforms), `.layout` (a tree of `Place`, None
    without a mesh), `.ops` (what the step is given) and `.mesh`. State leaves are DTensors placed by `.layout`
    (`xtf.init`, `xtf.hf.load`); the batch is what this rank's loader gives (`xtf.data.cut`).

    Raises ValueError for a transform given twice, an axis that the mesh does not know, or two claims on one axis or dim
    of a leaf.
    """
    transforms = tuple(sorted(transforms, key=lambda t: t.stage))
    names = [t.name for t in transforms]
    if len(set(names)) < len(names):
        twice = sorted(n for n in set(names) if names.count(n) > 1)
        raise ValueError(f"shard: transforms {twice} were given twice; give each once, with all its axes")
    axes = M.axes(mesh)
    for t in transforms:
        for axis in (*t.store, *t.tokens):
            if axis not in AXES and axis not in axes:
                raise ValueError(f"shard: {t.name} names axis {axis!r}, but the mesh is {M.describe(mesh)}; known "
                                 f"axes are {', '.join(AXES)}")
        specs = t.specs(specs)
    tokens = tuple(a for a in axes if M.size(mesh, a) > 1
                   and (a in PACK_AXES or any(a in t.tokens for t in transforms)))
    layout = None
    if mesh is not None:
        layout = tree.map_with_path(lambda path, p: place(path, p, transforms, mesh, tokens), specs)
    rules = tuple(t.cast for t in transforms if t.cast)
    env = Env(mesh, tokens, layout, functools.partial(_cast, rules), bool(rules), size=functools.partial(M.size, mesh),
              rank=functools.partial(M.rank, mesh), group=functools.partial(M.group, mesh),
              sums=None if mesh is None else Sums(layout, mesh))
    ops = base_ops(env)
    for t in transforms:
        ops = t.wrap(ops, env)
    run = functools.partial(step, ops=ops)
    for t in transforms:
        run = t.step(run)
    wrapped = functools.wraps(step)(lambda state, batch: run(state, batch))
    wrapped.__dict__.update(ops=ops, specs=specs, layout=layout, mesh=mesh, transforms=transforms)
    return wrapped


def _cast(rules: tuple, leaf: torch.Tensor) -> torch.dtype:
    for rule in rules:
        dtype = rule(leaf)
        if dtype is not None:
            return dtype
    return leaf.dtype


def place(path: str, p: Any, transforms: tuple[Transform, ...], mesh: DeviceMesh, tokens: tuple[str, ...]) -> Place:
    """Where one leaf lives. A compute claim on an axis beats a storage claim; storage takes the first dim that its
    ranks divide, else the largest (dim 0 gathers without a copy)."""
    claims: dict[str, tuple[int, str]] = {}
    for t in transforms:
        for axis, dim in t.claim(p).items():
            if M.size(mesh, axis) == 1:
                continue
            clash = claims.get(axis) or next(((d, n) for d, n in claims.values() if d == dim), None)
            if clash:
                what = f"mesh axis {axis!r}" if axis in claims else f"dim {p.axes[dim]!r}"
                raise ValueError(f"shard: leaf {path} {p.axes}: {t.name} and {clash[1]} both claim {what}; "
                                 "drop one of them for this leaf")
            if p.shape[dim] % M.size(mesh, axis):
                raise ValueError(f"shard: leaf {path} {p.axes}: {t.name} splits {p.axes[dim]!r} of {p.shape[dim]} over "
                                 f"{axis}={M.size(mesh, axis)}, which does not divide it")
            claims[axis] = dim, t.name
    taken = {dim for dim, _ in claims.values()}
    free = [d for d in range(len(p.shape)) if d not in taken]
    store = tuple(a for a in M.axes(mesh) if M.size(mesh, a) > 1 and a not in claims
                  and any(a in t.store for t in transforms))
    if not free:
        store = ()
    m = M.flattened(mesh, store)
    placements: list[Any] = [Shard(claims[n][0]) if n in claims else Replicate() for n in M.axes(m)]
    if store:
        ranks = m.size(0)
        placements[0] = Shard(next((d for d in free if p.shape[d] % ranks == 0), max(free, key=lambda d: p.shape[d])))
    partial = {a for t in transforms for a in t.partial(p)}
    differ = [a for a in M.axes(mesh) if M.size(mesh, a) > 1 and (a in tokens or a in partial)]
    return Place(m, tuple(placements), store, sums=tuple(a for a in differ if a not in store and a not in claims),
                 copies=math.prod(M.size(mesh, a) for a in store if a not in differ))


def base_ops(env: Env) -> Ops:
    """`LOCAL` on a mesh: leaves are unwrapped and cast, totals and norms cross ranks, whole leaves' gradients too."""
    def whole(params: tree.Tree) -> tree.Tree:
        return tree.tree_map(lambda p: computed(p, env), params)
    if env.mesh is None and not env.casts:
        return LOCAL
    ops = replace(LOCAL, use=lambda fn, params, *args: fn(whole(params), *args),
                  scan=functools.partial(scan_with, whole))
    if env.mesh is None:
        return ops
    mesh = env.mesh
    same_pack_axes = tuple(a for a in env.tokens if a not in PACK_AXES)
    sums = env.sums

    def total(x: torch.Tensor) -> torch.Tensor:
        return C.all_sum(x, env.group(*env.tokens).name) if env.tokens else x

    def same_packs(x: torch.Tensor) -> torch.Tensor:
        return C.sum_(x.detach().clone(), env.group(*same_pack_axes)) if same_pack_axes else x.detach()

    def norm(grads: tree.Tree) -> torch.Tensor:
        stored: dict[int, list[torch.Tensor]] = {}                       # by how many ranks hold the same part
        for g in tree.leaves(grads):
            if g is not None:
                copies = math.prod(g.device_mesh.size(i) for i, p in enumerate(g.placements) if p == Replicate()) \
                    if isinstance(g, DTensor) else mesh.size()
                stored.setdefault(copies, []).append(local(g))
        share = sum(leaf_norms(parts).square().sum() / copies for copies, parts in stored.items())
        return C.sum_(torch.as_tensor(share, dtype=torch.float64), M.world(mesh)).sqrt()

    def collect(grads: list, leaves: list) -> list:
        return sums.finish(grads)

    # Gradients are summed over ranks in two places. Here, in xtf/parallel/sums.py: over the axes along which a leaf is
    # whole and the tokens differ, by all-reduces. Before, in `Gather.backward` of xtf/parallel/_fsdp.py: over the axes
    # that a leaf is stored over, by reduce-scatters (divided by `finish` where ranks of such an axis see the same
    # tokens).
    return replace(ops, total=total, same_packs=same_packs, norm=norm, matrices=matrices, watch=sums.watch,
                   collect=collect)
