"""Hugging Face directories in and out: every rank reads its own slices, all ranks write one set of files together.

`names` maps a parameter's dotted path to its tensor's name in the files; a model's `names(cfg)` returns it. Law 9: what `load` read,
`save(..., like=directory)` writes again, each tensor with its name, dtype, shape and bytes (as long as the parameters' dtype holds
the files' values).
"""
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from xtf import safetensors_io as files
from xtf import tree
from xtf.layout import Place
from xtf.parallel.collectives import local as local_part
from xtf.parallel.mesh import tell_all
from xtf.safetensors_io import Entry, Shape

IGNORE = ("rotary_emb.inv_freq",)                                        # recomputed from the config by every model
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
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


def load(path: str | Path, specs: tree.Tree, names: Mapping[str, str], layout: tree.Tree | None = None, dtype: torch.dtype | None = None, *,
         ignore: Sequence[str] = IGNORE, tied: Mapping[str, str] = TIED) -> tree.Tree:
    """The parameters of a directory, as tensors, or as DTensors placed by `layout`; each rank reads only what it stores.

    Values are converted to each Param's dtype (`dtype`, if given, for all floating ones); `requires_grad` says trainable.
    `ignore` has endings (globs) of tensors in the files that are no parameters. `tied` names tensors that some directories write
    though they are another's twin: accepted if their bytes are equal. With a layout, all ranks of its mesh call this and fail together.

    Raises ValueError naming every missing, extra or misshapen tensor, or whatever is wrong with the files.

    >>> import tempfile, safetensors.torch
    >>> from xtf.spec import Param
    >>> path = tempfile.mkdtemp()
    >>> safetensors.torch.save_file({"model.norm.weight": torch.ones(3)}, f"{path}/model.safetensors")
    >>> load(path, {"norm": {"weight": Param((3,), torch.float32, ("embed",))}}, {"norm.weight": "model.norm.weight"})
    {'norm': {'weight': tensor([1., 1., 1.], requires_grad=True)}}
    """
    params = dict(tree.flatten_with_path(specs))
    _check_paths(params, names, "specs")
    places = dict.fromkeys(params) if layout is None else dict(zip(params, tree.leaves(layout), strict=True))
    with _together(_mesh(place.mesh for place in places.values() if place is not None)):
        found = files.directory(path)
        twins, _ = _match(path, found, {names[p]: (spec.shape, spec.dtype) for p, spec in params.items()}, ignore, tied)
        twin_of = {name: twin for twin, name in twins.items()}

        def one(leaf: str) -> torch.Tensor:
            spec, place, name = params[leaf], places[leaf], names[leaf]
            offset, size = ((0,) * len(spec.shape), spec.shape) if place is None else place.box(spec.shape)
            values = files.read(found[name], offset, size)
            if name in twin_of and not _same_bytes(values, files.read(found[twin_of[name]], offset, size)):
                raise ValueError(f"{path}: {twin_of[name]} ({found[twin_of[name]].file.name}) and {name} ({found[name].file.name}) are tied by the "
                                 "config, but their values differ: set tie_word_embeddings to false, or remove the one that is not meant")
            floating = spec.dtype.is_floating_point
            values = values.to(dtype if dtype is not None and floating else spec.dtype)
            values = values if place is None else place.from_local(values, spec.shape)
            return values.requires_grad_(spec.trainable and floating)

        with ThreadPoolExecutor(THREADS) as pool:
            values = dict(zip(params, pool.map(one, params), strict=True))
    return tree.map_with_path(lambda leaf, spec: values[leaf], specs)


def save(path: str | Path, params: tree.Tree, names: Mapping[str, str], like: str | Path | None = None, max_shard_bytes: int = 5 << 30, *,
         ignore: Sequence[str] = IGNORE, tied: Mapping[str, str] = TIED) -> None:
    """Write parameters as a Hugging Face directory; where leaves are DTensors, all ranks of their mesh call this and write together.

    `like` is a directory of the same model: each tensor is written in the dtype and the file that it has there (`max_shard_bytes`
    then has no effect), ignored tensors and twins as well, and config, tokenizer and every other small file are copied. Without
    it each tensor has its parameter's dtype and nothing but safetensors is written.

    The directory appears, or replaces what was there, only when it is complete and on disk. If a rank fails, all fail and what was
    there stays.

    Raises ValueError where names, leaves and `like` do not agree, FileExistsError if `path` holds something else than a model's
    files, OSError naming the file where writing fails.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model"
    >>> save(path, {"norm": {"weight": torch.ones(3)}}, {"norm.weight": "model.norm.weight"})
    >>> tensors(path)
    {'model.norm.weight': ('model.safetensors', torch.float32, (3,))}
    """
    path = Path(path).resolve()
    leaves = dict(tree.flatten_with_path(params))
    _check_paths(leaves, names, "params")
    mesh = _mesh(x.device_mesh for x in leaves.values() if isinstance(x, DTensor))
    lead = mesh is None or mesh.get_rank() == int(mesh.mesh.min())
    values: dict[str, torch.Tensor] = {names[p]: x for p, x in leaves.items()}
    kept: dict[str, Entry] = {}                                          # ignored tensors of `like`, copied
    try:
        with _together(mesh):
            parts = {n: _part(n, x, mesh) for n, x in values.items()}
            wanted = {n: (tuple(x.shape), x.dtype) for n, x in values.items()}
            if like is None or not any(Path(like).glob("*.safetensors")):         # nothing, or a model that has not been trained yet
                written = {n: (x.dtype, tuple(x.shape)) for n, x in values.items()}
                shards = files.assign({n: x.numel() * x.dtype.itemsize for n, x in values.items()}, max_shard_bytes)
            else:
                found = files.directory(like)
                twins, kept = _match(like, found, wanted, ignore, tied)
                parts |= {twin: parts[name] for twin, name in twins.items()}
                written = {n: (e.dtype, e.shape) for n, e in found.items()}
                shards = {n: e.file.name for n, e in found.items()}
            entries, headers = files.plan(files.partial(path), written, shards)
            if lead:
                files.begin(path)
                files.create(entries, headers)
        with _together(mesh):
            if lead:
                parts |= {n: ((0,) * len(e.shape), files.read(e, (0,) * len(e.shape), e.shape)) for n, e in kept.items()}
            _write(entries, {n: part for n, part in parts.items() if part[1].numel()})
        with _together(mesh):
            if lead:
                _copy_others(like, files.partial(path))
                files.finish(path)
    except BaseException:
        if lead:
            shutil.rmtree(files.partial(path), ignore_errors=True)
        raise


def _check_paths(leaves: Mapping[str, object], names: Mapping[str, str], what: str) -> None:
    unnamed, unknown = sorted(leaves.keys() - names.keys()), sorted(names.keys() - leaves.keys())
    if unnamed or unknown:
        raise ValueError(f"hf: names and {what} do not fit: {what} without a name: {unnamed}; names without {what}: {unknown}; "
                         "use the names(cfg) of the model and config that made them")
    by_name: dict[str, str] = {}
    for leaf in leaves:
        if names[leaf] in by_name:
            raise ValueError(f"hf: leaves {by_name[names[leaf]]} and {leaf} have the same name in the files, {names[leaf]}; correct names")
        by_name[names[leaf]] = leaf


def _match(path: str | Path, found: Mapping[str, Entry], wanted: Mapping[str, tuple[Shape, torch.dtype]], ignore: Sequence[str],
           tied: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Entry]]:
    """Check files against leaves; returns (twin -> the tensor it repeats, ignored tensors). The error lists all that is wrong."""
    twins = {twin: name for twin, name in tied.items() if twin in found and twin not in wanted and name in wanted}
    rest = [n for n in found if n not in wanted and n not in twins]
    ignored = {n: found[n] for n in rest if any(fnmatchcase(n, f"*{glob}") for glob in ignore)}
    missing = [n for n in wanted if n not in found]
    extra = [f"{n} ({found[n].file.name})" for n in rest if n not in ignored]
    wrong = [f"{n} ({found[n].file.name}) has shape {list(found[n].shape)}, expected {list(shape)}"
             for n, (shape, _) in wanted.items() if n in found and found[n].shape != tuple(shape)]
    wrong += [f"{n} ({found[n].file.name}) holds {found[n].dtype}, expected {dtype}"
              for n, (_, dtype) in wanted.items() if n in found and found[n].dtype.is_floating_point != dtype.is_floating_point]
    wrong += [f"{twin} ({found[twin].file.name}) is tied to {name} but differs in dtype or shape" for twin, name in twins.items()
              if name in found and (found[twin].dtype, found[twin].shape) != (found[name].dtype, found[name].shape)]
    if missing or extra or wrong:
        problems = ["missing: " + ", ".join(missing)] * bool(missing)
        problems += ["extra: " + ", ".join(extra) + " (pass ignore= if the model does not need them)"] * bool(extra)
        raise ValueError(f"{path}: the tensors are not those of this model, check config.json. " + "; ".join(problems + wrong))
    return twins, ignored


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((files.as_bytes(a) == files.as_bytes(b)).all())


def _part(name: str, x: torch.Tensor, mesh: DeviceMesh | None) -> tuple[Shape, torch.Tensor]:
    """What this rank writes of a leaf, (offset, values): ranks that hold the same part divide its rows among them."""
    if x.dtype not in files.CODES:
        raise ValueError(f"hf.save: {name} has dtype {x.dtype}, which safetensors does not know; convert it first")
    placements = (Replicate(),) * (0 if mesh is None else mesh.ndim)
    offset, local, copy, copies = (0,) * x.ndim, x.detach(), 0, 1
    if isinstance(x, DTensor):
        mesh, placements, local = x.device_mesh, x.placements, local_part(x).detach()
        offset, size = Place(mesh, placements).box(tuple(x.shape))
        if size != tuple(local.shape) or not all(type(p) in (Shard, Replicate) for p in placements):
            raise ValueError(f"hf.save: {name} of shape {list(x.shape)} is placed {placements} with {list(local.shape)} here, not cut by whole "
                             f"chunks (which would be {list(size)}); redistribute it to Shard and Replicate first")
    for i, p in enumerate(placements):
        if isinstance(p, Replicate):
            assert mesh is not None
            copy, copies = copy * mesh.size(i) + mesh.get_local_rank(i), copies * mesh.size(i)
    if not local.ndim:
        return offset, local if copy == 0 else local.new_empty(0)
    rows = -(-len(local) // copies)
    low = min(copy * rows, len(local))
    return (offset[0] + low, *offset[1:]), local[low:low + rows]


def _write(entries: Mapping[str, Entry], parts: Mapping[str, tuple[Shape, torch.Tensor]]) -> None:
    with ExitStack() as stack:
        fds = {file: stack.enter_context(files.writing(file)) for file in sorted({entries[n].file for n in parts})}
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda n: files.write(fds[entries[n].file], entries[n], *parts[n]), parts):
                pass


def _copy_others(like: str | Path | None, work: Path) -> None:
    for file in () if like is None else sorted(Path(like).iterdir()):
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            with files.writing(work / file.name) as fd:
                files.pwrite(fd, memoryview(file.read_bytes()), 0)


def _mesh(meshes: Iterator[DeviceMesh]) -> DeviceMesh | None:
    """The first of the leaves' meshes; all must hold the same ranks, or they could not fail together."""
    distinct = list(dict.fromkeys(meshes))
    ranks = [sorted(mesh.mesh.flatten().tolist()) for mesh in distinct]
    if any(r != ranks[0] for r in ranks):
        raise ValueError(f"hf: the leaves live on meshes of different ranks, {ranks}; place them all on one mesh")
    return distinct[0] if distinct else None


@contextmanager
def _together(mesh: DeviceMesh | None) -> Iterator[None]:
    """All ranks of the mesh leave this block in the same way: if one of them raised, all raise."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if mesh is not None:
        said = tell_all(mesh, None if error is None else f"{type(error).__name__}: {error}")
        failed = {rank: text for rank, text in said.items() if text is not None}
        if failed and error is None:
            error = RuntimeError("hf: another rank failed. " + "; ".join(f"rank {r}: {text}" for r, text in sorted(failed.items())))
    if error is not None:
        raise error
