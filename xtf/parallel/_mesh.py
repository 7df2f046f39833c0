"""Meshes: named axes over ranks, and the process groups of any set of them taken as one."""
import math
import weakref

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from xtf import device
from xtf.layout import AXES
from xtf.parallel.collectives import Group
from xtf.parallel.peers import Peers


def mesh(**sizes: int) -> DeviceMesh | None:
    """The mesh with these axes: `replicate`, `dp`, `ep` divide packs, `sp` is for `ulysses`, other names for your own.

    Ranks are numbered with the last axis fastest: replicate, dp, ep, sp, then yours. Without torch.distributed, where
    every size is 1, it is None: one process.

    Raises ValueError if the sizes do not multiply to the number of ranks.

    >>> mesh(dp=1) is None
    True
    """
    bad = {k: v for k, v in sizes.items() if not isinstance(v, int) or v < 1}
    if bad:
        raise ValueError(f"mesh: sizes must be positive integers, got {bad}")
    sizes = {a: sizes[a] for a in (*(a for a in AXES if a in sizes), *(a for a in sizes if a not in AXES))}
    need = math.prod(sizes.values())
    if not dist.is_initialized():
        if need > 1:
            raise ValueError(f"mesh: {_text(sizes)} needs {need} ranks but torch.distributed is not initialised; "
                             f"start with torchrun --nproc_per_node {need}")
        return None
    if need != dist.get_world_size():
        raise ValueError(f"mesh: {_text(sizes)} needs {need} ranks, but {dist.get_world_size()} were started; "
                         "make the sizes multiply to the number of ranks")
    # xtf.testing's pools are on the CPU wherever they run
    kind = "cpu" if dist.get_backend() in ("gloo", "late") else device.device().type
    return init_device_mesh(kind, tuple(sizes.values()) or (1,), mesh_dim_names=tuple(sizes) or ("dp",))


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sizes.items()) or "no axes"


def size(m: DeviceMesh | None, axis: str) -> int:
    """How many ranks an axis has; 1 where the mesh does not name it."""
    return m.size(axes(m).index(axis)) if m is not None and axis in axes(m) else 1


def rank(m: DeviceMesh | None, axis: str) -> int:
    """This rank's place along an axis; 0 where the mesh does not name it."""
    return m.get_local_rank(axis) if m is not None and axis in axes(m) else 0


def axes(m: DeviceMesh | None) -> tuple[str, ...]:
    """The names of a mesh's axes; none without a mesh."""
    return () if m is None else m.mesh_dim_names or ()


# Keyed weakly by the mesh: making a group is itself a collective, so each set of axes is flattened once.
_flat: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def flattened(m: DeviceMesh, store: tuple[str, ...]) -> DeviceMesh:
    """The same ranks with `store` flattened into one leading axis "store", the others behind it in their order."""
    cache = _flat.setdefault(m, {})
    if store not in cache:
        names = axes(m)
        rest = [n for n in names if n not in store]
        with _disable_current_modes():  # ranks are read, also under a mode in which all other tensors are fake
            ranks = m.mesh.permute([names.index(n) for n in (*store, *rest)])
            ranks = ranks.reshape(-1, *[size(m, n) for n in rest])
            cache[store] = DeviceMesh(m.device_type, ranks, mesh_dim_names=("store", *rest))
    return cache[store]


# NCCL runs one group's collectives one after the other: each use has a group, and a stream, of its own, so that no
# reduction waits behind the next block's weights. "tokens" is everything that a block sends, and totals.
USES = "tokens", "weights", "gradients"


def group(m: DeviceMesh | None, *over: str, use: str = "tokens") -> Group:
    """The process group of the axes `over` taken as one (made on first use, on every rank in the same order)."""
    if m is None:
        raise ValueError(f"group{over}: one process has no process groups; a transform whose wrap asks for one does so "
                         "where env.size(axis) is above 1")
    return group_of(flattened(m, tuple(a for a in over if a in axes(m))), use)


def group_of(flat: DeviceMesh, use: str = "tokens") -> Group:
    """The process group of the first axis of a mesh that `flattened` made: a DTensor leaf carries its own."""
    made = _groups.setdefault(flat, {})
    if use not in made:
        pg = flat.get_group(0)
        if use != USES[0]:
            lines = flat.mesh.reshape(flat.size(0), -1).T.tolist()
            new = [dist.new_group(ranks) for ranks in lines]
            pg = next(g for g, ranks in zip(new, lines, strict=True) if dist.get_rank() in ranks)
            assert isinstance(pg, dist.ProcessGroup)
        made[use] = Group(flat.size(0), flat.get_local_rank(0), pg)
    return made[use]


def forget() -> None:
    """Drop the groups of a process group that was destroyed: a mesh of the next one may equal one of its."""
    _flat.clear()
    _groups.clear()


def world(m: DeviceMesh | None) -> Group:
    """All ranks of the mesh as one group, for reductions."""
    return group(m, *axes(m), use="gradients")


# Keyed weakly by the process group of all ranks, with which they end; meshes of the same ranks share one.
_peers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def peers(m: DeviceMesh | None) -> Peers:
    """The ranks of a mesh, to agree with (made on first use, on all in one order); without one this process alone."""
    if m is None:
        return Peers([dist.get_rank() if dist.is_initialized() else 0])
    made, ranks = _peers.setdefault(dist.group.WORLD, {}), tuple(sorted(m.mesh.flatten().tolist()))
    if ranks not in made:
        made[ranks] = Peers(ranks)
    return made[ranks]


def is_main() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def describe(m: DeviceMesh | None) -> str:
    """`dp=2, sp=2`, or `one process`.

    >>> describe(None)
    'one process'
    """
    return "one process" if m is None else _text({n: size(m, n) for n in axes(m)})


__all__ = ["axes", "describe", "flattened", "forget", "group", "group_of", "is_main", "mesh", "peers", "rank", "size",
           "world"]
