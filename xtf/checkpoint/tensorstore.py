"""A checkpoint's arrays in and out: zarr3 chunks with checksums in an OCDBT store, by tensorstore alone, without JAX.

Every rank writes its own parts under `ocdbt.process_RANK`; whoever commits the checkpoint merges these stores into one,
which refers to their files. Two rules keep that merge right: no chunk has two writers (the merge would keep one of
them, silently), so the chunk grid divides every boundary between ranks; and of equal copies exactly one is written.
"""
import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from xtf.layout import Place, local

Shape = tuple[int, ...]
CHUNK_BYTES = 16 << 20                # below malloc's mmap threshold: its buffers keep their pages
FILE_BYTES = 64 << 20                 # of a data file, about: one goes to the disk while the next is encoded
IN_FLIGHT = 64 << 20                  # bytes being read at once
ODD = {d: n for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
       if (d := getattr(torch, n, None))}


class Leaf:
    """Stands where a tensor stands in the tree that Orbax sees."""


class Part(NamedTuple):
    """What one rank writes of a leaf: `values` at `offset` of an array of `shape`, cut into chunks of `chunk`."""
    name: str
    values: np.ndarray
    shape: Shape
    chunk: Shape
    offset: Shape


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """The same memory as an array; bf16 and float8 in the dtypes of ml_dtypes.

    >>> to_numpy(torch.tensor([1.5], dtype=torch.bfloat16))
    array([1.5], dtype=bfloat16)
    """
    t = t.detach()
    if t.dtype in ODD:
        import ml_dtypes
        return t.view({1: torch.uint8, 2: torch.int16}[t.element_size()]).numpy().view(getattr(ml_dtypes, ODD[t.dtype]))
    return t.numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """numpy's, and zarr's, name of a dtype.

    >>> dtype_name(torch.bfloat16), dtype_name(torch.bool)
    ('bfloat16', 'bool')
    """
    return str(dtype).removeprefix("torch.")


def box(x: torch.Tensor) -> tuple[Shape, Shape]:
    """(offset, size) of this rank's part of a leaf."""
    if not isinstance(x, DTensor):
        return (0,) * x.ndim, tuple(x.shape)
    if x.device_mesh.get_coordinate() is None:
        return (0,) * x.ndim, (0,) * x.ndim
    return Place(x.device_mesh, x.placements).box(tuple(x.shape))


def check(name: str, x: Any) -> None:
    """Raise ValueError, naming the leaf, if it cannot be saved or restored."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"checkpoint: {name} is {type(x).__name__} ({x!r:.50}), not a tensor; make it one, or keep "
                         "it with the data")
    if x.layout != torch.strided or x.is_meta:
        raise ValueError(f"checkpoint: {name} is a {'meta' if x.is_meta else x.layout} tensor; only dense ones with "
                         "memory can be saved")
    if isinstance(x, DTensor):
        if not all(type(p) in (Shard, Replicate) for p in x.placements):
            raise ValueError(f"checkpoint: {name} of shape {list(x.shape)} is placed {x.placements}; redistribute it "
                             "to Shard and Replicate first")
        if x.device_mesh.get_coordinate() is not None and tuple(local(x).shape) != box(x)[1]:
            raise ValueError(f"checkpoint: {name} of shape {list(x.shape)} is placed {x.placements} with "
                             f"{list(local(x).shape)} here, not cut by whole chunks (which would be {list(box(x)[1])})")


def parts(leaves: Mapping[str, torch.Tensor], rank: int, world: int,
          buffers: dict[str, torch.Tensor] | None) -> list[Part]:
    """What this rank writes. Copies of a leaf are dealt to their holders by bytes.

    `buffers` has host memory by leaf, made here where it is missing: values are copied into it. None: host tensors are
    not copied.
    """
    out, loads, waits = [], {}, None
    for name, x in leaves.items():
        grid, holders = _grid(x, world)
        load = loads.setdefault(holders, dict.fromkeys(holders, 0))  # every holder walks the same leaves: one choice
        writer = min(load, key=load.__getitem__)
        offset, size = box(x)
        load[writer] += math.prod(size) * x.element_size() + 1
        if writer != rank or (not math.prod(size) and x.numel()):
            continue
        host = local(x).detach()
        if host.device.type != "cpu":
            waits = host.device
        if buffers is not None or host.device.type != "cpu":
            host = on_host({} if buffers is None else buffers, name, host)
        out.append(Part(name, to_numpy(host.contiguous()), tuple(x.shape), _chunk(grid, x), offset))
    if waits is not None:
        torch.accelerator.synchronize(waits)
    return out


def on_host(buffers: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` in the buffer of that name (pinned for an accelerator, whose copy is then still under way)."""
    if name not in buffers or buffers[name].shape != x.shape or buffers[name].dtype != x.dtype:
        buffers[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu")
    return buffers[name].copy_(x, non_blocking=True)


def _grid(x: torch.Tensor, world: int) -> tuple[Shape, tuple[int, ...]]:
    """(rows of every dim that divide all boundaries between ranks, the ranks that hold what this one holds)."""
    if not isinstance(x, DTensor):
        return tuple(x.shape), tuple(range(world))
    mesh, grid = x.device_mesh, list(x.shape)
    for dim, n in enumerate(x.shape):
        cuts = [mesh.size(i) for i, p in enumerate(x.placements) if p == Shard(dim)]
        grid[dim] = math.gcd(*_boundaries(n, cuts)) or n
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return tuple(grid), (-1,)
    same = tuple(slice(None) if isinstance(p, Replicate) else c for p, c in zip(x.placements, coordinate, strict=True))
    return tuple(grid), tuple(mesh.mesh[same].reshape(-1).tolist())


def _boundaries(n: int, cuts: Sequence[int]) -> list[int]:
    """Where `n` rows are cut, if by chunks of ceil(n / ranks), one mesh axis after the other.

    >>> _boundaries(10, [4]), _boundaries(10, [2, 2])
    ([0, 3, 6, 9], [0, 3, 5, 8])
    """
    pieces = [(0, n)]
    for ranks in cuts:
        pieces = [(low + i * rows, min(rows, size - i * rows)) for low, size in pieces for rows in [-(-size // ranks)]
                  for i in range(ranks) if i * rows < size]
    return [low for low, _ in pieces]


def _chunk(grid: Shape, x: torch.Tensor) -> Shape:
    """At most CHUNK_BYTES if that is to be had, leading dims cut first.

    A dim that ranks divide is cut by a divisor of their rows.
    """
    chunk = [max(1, n) for n in grid]
    for dim, rows in enumerate(chunk):
        pieces = -(-math.prod(chunk) * x.element_size() // CHUNK_BYTES)
        if pieces > 1:
            whole = grid[dim] == x.shape[dim]
            fits = (-(-rows // k) for k in range(min(pieces, rows), min(4 * pieces, rows) + 1)
                    if whole or rows % k == 0)
            chunk[dim] = next(fits, rows)  # no divisor near: the next dim, rather than tiny chunks
    return tuple(chunk)


def _store(folder: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "ocdbt", "base": {**base, "file_io_locking": {"mode": "non_atomic"}}, "manifest": base,
            "cache_pool": "cache_pool#ocdbt"}


def _context() -> Any:
    import tensorstore as ts
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100 << 20}, "file_io_concurrency": {"limit": 8}})


async def write(folder: Path, rank: int, todo: Iterable[Part]) -> None:
    """Write this rank's parts under `folder`, on disk (fsync) when it returns.

    All in one transaction: a commit of each array and then of its chunks would wait for the disk again and again.

    Raises OSError naming the leaf or file and what the system said.
    """
    import tensorstore as ts
    context = _context()
    store = {**_store(folder / f"ocdbt.process_{rank}"), "assume_config": True, "target_data_file_size": FILE_BYTES,
             "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000,
                        "manifest_kind": "single"}}

    async def one(part: Part) -> None:
        metadata = {"shape": part.shape, "data_type": part.values.dtype.name, "chunk_grid": {
            "name": "regular", "configuration": {"chunk_shape": part.chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]}
        array = await ts.open({"driver": "zarr3", "kvstore": {**store, "path": part.name}, "recheck_cached_data": False,
                               "recheck_cached_metadata": False, "store_data_equal_to_fill_value": True,
                               "metadata": metadata},
                              create=True, open=True, context=context, transaction=transaction)
        if part.values.size:
            here = tuple(slice(o, o + n) for o, n in zip(part.offset, part.values.shape, strict=True))
            await array[here].write(part.values, can_reference_source_data_indefinitely=True)
    try:
        async with ts.Transaction() as transaction:
            await _all(map(one, todo))
    except (ValueError, OSError, RuntimeError) as e:
        raise OSError(f"{folder}: the arrays were not written: {_short(e)}") from e


async def read(folder: Path, leaves: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Fill the leaves, each rank its own part, from the arrays of the same names; all of those under `prefix`.

    Nothing is overwritten unless names, shapes and dtypes agree. Raises ValueError listing what differs, OSError naming
    the leaf whose bytes are missing or fail their checksum.
    """
    import tensorstore as ts
    context = _context()
    try:
        keys = await (await ts.KvStore.open(_store(folder), context=context)).list()
    except (ValueError, OSError, RuntimeError) as e:
        raise OSError(f"{folder}: the list of arrays cannot be read: {_short(e)}") from e
    stored = {key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")}
    if prefix:
        stored = {name for name in stored if name == prefix or name.startswith(f"{prefix}.")}
    if not stored:
        raise ValueError(f"{folder}: no arrays{f' called {prefix}' if prefix else ''} in it; it is not a checkpoint, "
                         "or its files are gone")

    async def look(name: str) -> Any:
        try:
            return await ts.open({"driver": "zarr3", "kvstore": {**_store(folder), "path": name},
                                  "recheck_cached_data": False, "recheck_cached_metadata": False,
                                  "fill_missing_data_reads": False}, open=True, read=True, context=context)
        except (ValueError, OSError, RuntimeError) as e:
            raise OSError(f"{folder}: {name} cannot be read: {_short(e)}") from e
    both = [name for name in leaves if name in stored]
    arrays = dict(zip(both, await _all(map(look, both)), strict=True))
    wrong = [f"{n} is {a.dtype.name} {list(a.shape)} in the checkpoint, {dtype_name(x.dtype)} {list(x.shape)} here"
             for n, a in arrays.items() for x in [leaves[n]]
             if tuple(a.shape) != tuple(x.shape) or a.dtype.name != dtype_name(x.dtype)]
    wrong = [*_several("only here", [n for n in leaves if n not in stored]),
             *_several("only in the checkpoint", sorted(stored - leaves.keys())), *wrong[:5],
             *[f"and {len(wrong) - 5} more"][:len(wrong) > 5]]
    if wrong:
        raise ValueError(f"{folder}: a checkpoint of another model or optimizer. " + "; ".join(wrong))
    room, waiting = [IN_FLIGHT], asyncio.Condition()

    async def one(name: str) -> None:
        x = leaves[name]
        offset, size = box(x)
        if not math.prod(size):
            return
        mine = local(x).detach()
        host = mine if mine.device.type == "cpu" else torch.empty(size, dtype=mine.dtype, pin_memory=True)
        need = min(host.numel() * host.element_size(), IN_FLIGHT)
        async with waiting:
            await waiting.wait_for(lambda: room[0] >= need)
            room[0] -= need
        try:
            part = arrays[name][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            await ts.array(to_numpy(host), copy=False).write(part.translate_to[(0,) * x.ndim] if x.ndim else part)
        except (ValueError, OSError, RuntimeError) as e:
            raise OSError(f"{folder}: the values of {name} are damaged or gone; move this checkpoint away to use the "
                          f"one before: {_short(e)}") from e
        finally:
            async with waiting:
                room[0] += need
                waiting.notify_all()
        if host is not mine:
            mine.copy_(host)
    await _all(map(one, leaves))


def _several(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{what}: " + ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")]


async def _all(coroutines: Iterable[Any]) -> list[Any]:
    """All results; raises the first error when every one has ended, so that nobody still writes."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            raise error
    return results


def _short(e: BaseException) -> str:
    """tensorstore's messages repeat the whole specification behind the reason."""
    return " ".join(str(e).split("[tensorstore_spec")[0].split("[source locations")[0].split())[:600]
