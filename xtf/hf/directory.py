"""Hugging Face directories in and out: every rank reads its own slices, all ranks write one set of files together.

`names` maps a parameter's dotted path to its tensor's name in the files (see `names`); a model's `names(cfg)` returns
it. Quantised tensors (see `quantised`) are read as the values that they stand for. Law 9: what `load` read, `save(...,
like=directory)` writes again, each tensor with its name, dtype, shape and bytes (as long as the parameters' dtype holds
the files' values).
"""
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from xtf import tree
from xtf.hf import quantised
from xtf.hf import safetensors as files
from xtf.hf.names import Transposed, Wanted, cut, file_tensors, match, wanted
from xtf.hf.quantised import FP8, SCALE, BlockFp8, Fp8Out, Tensor
from xtf.hf.safetensors import Entry, Shape
from xtf.layout import Place
from xtf.layout import local as local_part
from xtf.parallel import _mesh
from xtf.parallel.collectives import max_along
from xtf.parallel.peers import Peers

__all__ = ["Transposed", "file_tensors", "load", "save", "tensors"]

IGNORE = ("rotary_emb.inv_freq",)                                        # recomputed from the config by every model
TIED = {  # globs; the last two: of DeepSeek's MTP modules
    "lm_head.weight": "model.embed_tokens.weight", "model.layers.*.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.*.shared_head.head.weight": "lm_head.weight",
}
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
              ".h5", ".msgpack", ".onnx")
THREADS = 4


def tensors(path: str | Path) -> dict[str, tuple[str, torch.dtype, Shape]]:
    """What a directory holds, from its headers alone: name -> (file name, dtype, shape).

    Raises FileNotFoundError or ValueError, naming file and tensor, where the directory is not sound.

    >>> import tempfile, safetensors.torch
    >>> path = tempfile.mkdtemp()
    >>> safetensors.torch.save_file({"w": torch.ones(2, 3)}, f"{path}/model.safetensors")
    >>> tensors(path)
    {'w': ('model.safetensors', torch.float32, (2, 3))}
    """
    return {name: (e.file.name, e.dtype, e.shape) for name, e in files.directory(path).items()}


def load(path: str | Path, specs: tree.Tree, names: Mapping[str, str], layout: tree.Tree | None = None,
         dtype: torch.dtype | None = None, *, ignore: Sequence[str] = IGNORE,
         tied: Mapping[str, str] = TIED) -> tree.Tree:
    """The parameters of a directory, as tensors, or as DTensors placed by `layout`; each rank reads what it stores.

    Stacked, transposed and quantised tensors are so too (see `names`, and `quantised` for what the values are equal
    to). Values are converted to each Param's dtype (`dtype`, if given, for all floating ones); `requires_grad` says
    trainable. `ignore` has endings (globs) of tensors in the files that are no parameters. `tied` names (by globs)
    tensors that some directories write though they are another's twin: accepted if their bytes are equal. With a
    layout, all ranks of its mesh call this and fail together.

    Raises ValueError naming every missing, extra or misshapen tensor, or whatever is wrong with the files.

    >>> import tempfile, safetensors.torch
    >>> from xtf.spec import Param
    >>> path = tempfile.mkdtemp()
    >>> safetensors.torch.save_file({"model.norm.weight": torch.ones(3)}, f"{path}/model.safetensors")
    >>> load(path, {"norm": {"weight": Param((3,), torch.float32, ("embed",))}}, {"norm.weight": "model.norm.weight"})
    {'norm': {'weight': tensor([1., 1., 1.], requires_grad=True)}}
    """
    params = dict(tree.flatten_with_path(specs))
    expected = wanted(params, names, "specs")
    places = dict.fromkeys(params) if layout is None else dict(zip(params, tree.leaves(layout), strict=True))
    mesh = _common(place.mesh for place in places.values() if place is not None)
    with _mesh.peers(mesh).together("hf.load"):
        found = quantised.fold(path, files.directory(path), quantised.config(path))
        twins, _ = match(path, found, expected, ignore, tied)
        twins_of = {name: [twin for twin, other in twins.items() if other == name] for name in twins.values()}

        def read(leaf: str) -> torch.Tensor:
            spec, place = params[leaf], places[leaf]
            floating = spec.dtype.is_floating_point
            offset, size = ((0,) * len(spec.shape), spec.shape) if place is None else place.box(spec.shape)
            values = torch.empty(size, dtype=dtype if dtype is not None and floating else spec.dtype)
            for name, at, part in cut(names[leaf], offset, values):
                if name not in twins_of:
                    quantised.read_into(found[name], at, part)
                    continue
                one = _read(found[name], at, tuple(part.shape))
                part.copy_(one)
                for twin in twins_of[name]:
                    if not _same_bytes(one, _read(found[twin], at, tuple(part.shape))):
                        raise ValueError(f"{path}: {twin} ({found[twin].file.name}) and {name} "
                                         f"({found[name].file.name}) are tied by the config, but their values differ: "
                                         "set tie_word_embeddings to false, or remove the one that is not meant")
            values = values if place is None else place.from_local(values, spec.shape)
            return values.requires_grad_(spec.trainable and floating)

        with ThreadPoolExecutor(THREADS) as pool:
            values = dict(zip(params, pool.map(read, params), strict=True))
    return tree.map_with_path(lambda leaf, spec: values[leaf], specs)


def save(path: str | Path, params: tree.Tree, names: Mapping[str, str], like: str | Path | None = None,
         max_shard_bytes: int = 5 << 30, *, quantise: Literal["fp8"] | None = None, ignore: Sequence[str] = IGNORE,
         tied: Mapping[str, str] = TIED, peers: Peers | None = None) -> None:
    """Write parameters as a Hugging Face directory; where leaves are DTensors, all ranks of their mesh write together.

    `like` is a directory of the same model: each tensor is written in the dtype and the file that it has there, ignored
    tensors and twins as well, and config, tokenizer and every other small file are copied. Tensors that are quantised
    there are written in bf16, in files of `max_shard_bytes`, unless `quantise="fp8"`: then as block FP8, those that are
    so in `like` or, where none is, the matrices of attention, MLP and experts; a block that its old scale says exactly
    keeps it, so untrained weights are written as they were. config.json says what was written. Without `like` each
    tensor has its parameter's dtype and nothing but safetensors is written.

    The directory appears, or replaces what was there, only when it is complete and on disk. If a rank fails or dies,
    all fail and what was there stays. `peers` are all ranks of the leaves' mesh; a thread beside one that loads and
    saves needs its own.

    Raises ValueError where names, leaves and `like` do not agree or FP8 cannot hold a leaf, FileExistsError if `path`
    holds something else than a model's files, OSError naming the file where writing fails, ConnectionError naming a
    rank that is gone.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model"
    >>> save(path, {"norm": {"weight": torch.ones(3)}}, {"norm.weight": "model.norm.weight"})
    >>> tensors(path)
    {'model.norm.weight': ('model.safetensors', torch.float32, (3,))}
    """
    path = Path(path).resolve()
    leaves = dict(tree.flatten_with_path(params))
    expected = wanted(leaves, names, "params")
    mesh = mesh_of(leaves.values())
    peers = peers or _mesh.peers(mesh)
    try:
        with peers.together("hf.save: outline"):
            boxes = {p: _box(names[p], x) for p, x in leaves.items()}
            outline = _outline(like, expected, quantise, max_shard_bytes, ignore, tied)
            entries, headers = files.lay_out(files.partial(path), outline.written, outline.shards)
            if peers.lead:
                files.begin(path)
                files.create(entries, headers)
        scales = _scales(leaves, names, expected, boxes, outline.fp8, peers)
        with peers.together("hf.save: write"):
            parts = [part for p, x in leaves.items() for part in cut(names[p], *_share(x, *boxes[p], mesh))]
            parts += [(twin, at, x) for twin, name in outline.twins.items() for n, at, x in parts if n == name]
            scales |= {twin: scales[name] for twin, name in outline.twins.items() if twin in outline.fp8}
            if peers.lead:
                whole = outline.copied | {n + SCALE: x for n, x in scales.items()}
                parts += [(n, (0,) * len(t.shape),
                           t if isinstance(t, torch.Tensor) else _read(t, (0,) * len(t.shape), t.shape))
                          for n, t in whole.items()]

            def write(part: tuple[str, Shape, torch.Tensor]) -> None:
                name, at, x = part
                x = quantised.encode(x, at, scales[name], outline.fp8[name].block) if name in outline.fp8 else x
                files.write(fds[entries[name].file], entries[name], at, x)
            parts = [part for part in parts if part[2].numel()]
            with ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
                fds = {file: stack.enter_context(files.writing(file))
                       for file in sorted({entries[n].file for n, *_ in parts})}
                list(pool.map(write, parts))
        with peers.together("hf.save: finish"):
            if peers.lead:
                _copy_others(like, files.partial(path), outline.config)
                files.finish(path)
    except BaseException:
        if peers.lead:
            shutil.rmtree(files.partial(path), ignore_errors=True)
        raise


def _read(tensor: Tensor, offset: Shape, size: Shape) -> torch.Tensor:
    """A box in the dtype of the files, float32 if it is quantised."""
    out = torch.empty(size, dtype=tensor.dtype if isinstance(tensor, Entry) else torch.float32)
    quantised.read_into(tensor, offset, out)
    return out


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((files.as_bytes(a) == files.as_bytes(b)).all())


class _Outline(NamedTuple):
    """What `save` writes: name -> (dtype, shape), each tensor's file, how to quantise, what of `like` comes again."""
    written: dict[str, tuple[torch.dtype, Shape]]
    shards: dict[str, str]
    fp8: dict[str, Fp8Out]
    twins: dict[str, str]
    copied: dict[str, Tensor]
    config: dict[str, Any]                                               # quantization_config


def check(params: tree.Tree, names: Mapping[str, str], like: str | Path | None = None, *,
          quantise: Literal["fp8"] | None = None, ignore: Sequence[str] = IGNORE,
          tied: Mapping[str, str] = TIED) -> None:
    """Raise what `save` would raise of names, shapes and formats, before a run has begun; nothing is written.

    >>> check({"norm": {"weight": torch.ones(3)}}, {"norm.weight": "model.norm.weight"})
    """
    _outline(like, wanted(dict(tree.flatten_with_path(params)), names, "params"), quantise, 5 << 30, ignore, tied)


def _outline(like: str | Path | None, wanted: Mapping[str, Wanted], quantise: str | None, max_shard_bytes: int,
             ignore: Sequence[str], tied: Mapping[str, str]) -> _Outline:
    if quantise not in (None, "fp8") or (quantise and not (like and Path(like, "config.json").is_file())):
        raise ValueError(f"hf.save: quantise={quantise!r} with like={like}: give None, or 'fp8' and a directory with "
                         "a config.json that can say so")
    settings = quantised.config(like) if like else {}
    raw: dict[str, Entry] = {}  # nothing, or a model that has not been trained yet
    if like is not None and any(Path(like).glob("*.safetensors")):
        raw = files.directory(like)
    found = quantised.fold(like or "", raw, settings)
    twins, kept = match(like, found, wanted, ignore, tied) if like is not None and raw else ({}, {})
    fp8, config = quantised.fp8_out(found, settings, {n: w.shape for n, w in wanted.items()}) if quantise else ({}, {})
    fp8 = {n: fp8[twins.get(n, n)] for n in (*wanted, *twins) if twins.get(n, n) in fp8}
    copied: dict[str, Tensor] = {}
    for n, t in kept.items():
        copied |= {n: t.values, n + SCALE: t.scales} if quantise and isinstance(t, BlockFp8) else {n: t}
    written = {n: (t.dtype, t.shape) for n, t in copied.items()}
    for n in (*wanted, *twins):
        w = wanted[twins.get(n, n)]
        written[n] = (FP8 if n in fp8 else found[n].dtype if n in found else w.dtype), w.shape
        if n in fp8:
            written[n + SCALE] = fp8[n].scale_dtype, quantised.grid(w.shape, fp8[n].block)
    if written == {n: (e.dtype, e.shape) for n, e in raw.items()}:
        shards = {n: e.file.name for n, e in raw.items()}
    else:
        shards = files.assign({n: math.prod(shape) * dtype.itemsize for n, (dtype, shape) in written.items()},
                              max_shard_bytes)
    return _Outline(written, shards, fp8, twins, copied, config)


def _box(name: str, x: torch.Tensor) -> tuple[Shape, torch.Tensor]:
    """What this rank has of a leaf, as (offset, values)."""
    if x.dtype not in files.CODES:
        raise ValueError(f"hf.save: {name} has dtype {x.dtype}, which safetensors does not know; convert it first")
    if not isinstance(x, DTensor):
        return (0,) * x.ndim, x.detach()
    placements, local = x.placements, local_part(x).detach()
    offset, size = Place(x.device_mesh, placements).box(tuple(x.shape))
    if size != tuple(local.shape) or not all(type(p) in (Shard, Replicate) for p in placements):
        raise ValueError(f"hf.save: {name} of shape {list(x.shape)} is placed {placements} with {list(local.shape)} "
                         f"here, not cut by whole chunks (which would be {list(size)}); redistribute it to Shard and "
                         "Replicate first")
    return offset, local


def _share(x: torch.Tensor, offset: Shape, local: torch.Tensor, mesh: DeviceMesh | None) -> tuple[Shape, torch.Tensor]:
    """What this rank writes of what it has: ranks that hold the same part divide its rows among them."""
    copy, copies = 0, 1
    mesh = x.device_mesh if isinstance(x, DTensor) else mesh
    whole = (Replicate(),) * (0 if mesh is None else mesh.ndim)
    for i, p in enumerate(x.placements if isinstance(x, DTensor) else whole):
        if isinstance(p, Replicate):
            assert mesh is not None
            copy, copies = copy * mesh.size(i) + mesh.get_local_rank(i), copies * mesh.size(i)
    if not local.ndim:
        return offset, local if copy == 0 else local.new_empty(0)
    rows = -(-len(local) // copies)
    low = min(copy * rows, len(local))
    return (offset[0] + low, *offset[1:]), local[low:low + rows]


def _scales(leaves: Mapping[str, torch.Tensor], names: Mapping[str, str], wanted: Mapping[str, Wanted],
            boxes: Mapping[str, tuple], fp8: Mapping[str, Fp8Out], peers: Peers) -> dict[str, torch.Tensor]:
    """The scales of every tensor that is quantised, the same on all ranks: the largest of what each measures."""
    members: dict[str, dict[str, int]] = {}                              # leaf -> its quantised tensors, numbered
    for n, w in wanted.items():
        if n in fp8:
            of_leaf = members.setdefault(w.leaf, {})
            of_leaf[n] = len(of_leaf)
    with peers.together("hf.save: scales"):
        old = {n: _read(e, (0,) * len(e.shape), e.shape) for n, out in fp8.items() if (e := out.old) is not None}

        def measure(leaf: str) -> torch.Tensor:
            number, (offset, local) = members[leaf], boxes[leaf]
            first = next(iter(number))
            grid = quantised.grid(wanted[first].shape, fp8[first].block)
            maxima = torch.zeros(2, len(number), *grid, device=local.device)
            for n, at, x in cut(names[leaf], offset, local):
                if n in number and x.numel():
                    where = quantised.covered(at, tuple(x.shape), fp8[n].block)
                    maxima[(slice(None), number[n], *where)] = quantised.measure(x, at, fp8[n], old.get(n), n)
            return maxima

        with ThreadPoolExecutor(THREADS) as pool:
            maxima = dict(zip(members, pool.map(measure, members), strict=True))
    for leaf, x in leaves.items():  # in one order, and where no rank alone can fail
        for dim in range(x.ndim if leaf in members else 0):
            max_along(maxima[leaf], x, dim)
    return {n: quantised.choose(maxima[leaf][:, i], fp8[n], old.get(n)) for leaf, number in members.items()
            for n, i in number.items()}


def _copy_others(like: str | Path | None, work: Path, settings: Mapping[str, Any]) -> None:
    for file in () if like is None else sorted(Path(like).iterdir()):
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            with files.writing(work / file.name) as fd:
                content = file.read_bytes()
                if file.name == "config.json":
                    content = quantised.configured(content, settings)
                files.pwrite(fd, memoryview(content), 0)


def mesh_of(leaves: Iterable[torch.Tensor]) -> DeviceMesh | None:
    """The first of the leaves' meshes; all must hold the same ranks, or they could not fail together."""
    return _common(x.device_mesh for x in leaves if isinstance(x, DTensor))


def _common(meshes: Iterable[DeviceMesh]) -> DeviceMesh | None:
    distinct = list(dict.fromkeys(meshes))
    ranks = [sorted(mesh.mesh.flatten().tolist()) for mesh in distinct]
    if any(r != ranks[0] for r in ranks):
        raise ValueError(f"hf: the leaves live on meshes of different ranks, {ranks}; place them all on one mesh")
    return distinct[0] if distinct else None
