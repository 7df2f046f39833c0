"""The safetensors format: headers read and checked, boxes of tensors read and written in place, directories replaced.

A file is 8 bytes (the header's length, little endian), a JSON header (name -> dtype, shape, byte offsets) and the
tensors' bytes, row-major, without gaps (https://github.com/huggingface/safetensors, "Format"). A *box* is (offset,
size), one number a dim.
"""
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
          "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: `start` is the byte where its values begin, counted from the file's beginning."""
    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---- reading ---------------------------------------------------------------------------------------------------------

def directory(path: str | Path) -> dict[str, Entry]:
    """Every tensor of a Hugging Face directory, from the headers alone.

    Raises FileNotFoundError where there are no safetensors or a shard is missing, ValueError where a header is corrupt
    or the index and the files disagree.
    """
    path = Path(path)
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{path} has both {SINGLE} and {INDEX}: remove the one that is not the model's")
    if single.exists():
        return header(single)
    if not index.exists():
        raise FileNotFoundError(_nothing(path))
    weight_map = _weight_map(index)
    missing = sorted({f for f in weight_map.values() if not (path / f).is_file()})
    if missing:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}; fetch them, or "
                                "correct the index")
    out: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in header(path / file).items():
            if name in out:
                raise ValueError(f"{path}: tensor {name} is in two shards, {out[name].file.name} and {file}; remove "
                                 "one of them")
            out[name] = entry
    wrong = [f"{n} (not in {f})" for n, f in weight_map.items() if n not in out or out[n].file.name != f]
    wrong += [f"{n} (in {e.file.name}, not in the index)" for n, e in out.items() if n not in weight_map]
    if wrong:
        raise ValueError(f"{index} and its files disagree on tensors: {', '.join(wrong)}; fetch the directory again, "
                         "or correct the index")
    return out


def _nothing(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is not a directory: give a Hugging Face directory with {SINGLE} or {INDEX}"
    names = sorted(f.name for f in path.iterdir())
    if any(n.endswith((".bin", ".pt", ".pth")) for n in names) and not any(n.endswith(".safetensors") for n in names):
        return (f"{path} has pickled weights only, which can run code when they are opened: convert them, for "
                "instance with transformers' from_pretrained(...).save_pretrained(...), which writes safetensors")
    found = ", ".join(n for n in names if "safetensors" in n) or "no safetensors at all"
    return f"{path} has neither {SINGLE} nor {INDEX} (found: {found})"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        if not all(isinstance(f, str) and Path(f).name == f for f in weight_map.values()):
            raise ValueError("weight_map must give a file name for each tensor")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: not an index of safetensors ({type(e).__name__}: {e}); fetch it again") from e


def header(file: str | Path) -> dict[str, Entry]:
    """The tensors of one file by name, every number of its header checked against the file's size.

    Raises ValueError, naming file and tensor, where the header is corrupt, the file truncated or a dtype unsupported.
    """
    file = Path(file)
    with file.open("rb") as f:
        size, length = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
        text = f.read(min(length, 100_000_000))                          # the library's limit
    # The library, which comes last, lets pass that a name occurs twice (the last one counts) and dtypes that are not
    # ours. All else that is refused before it would be refused by it too, without the tensor's name.
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: corrupt or truncated header ({e}); fetch it again") from e
    fields.pop("__metadata__", None)
    out = {name: _entry(file, name, field, 8 + length) for name, field in fields.items()}
    end, last = max(((e.start + e.nbytes, name) for name, e in out.items()), default=(0, ""))
    if end > size:
        raise ValueError(f"{file}: truncated (tensor {last} ends at byte {end}, the file at {size}); fetch it again")
    try:
        safe_open(file, "numpy")                                         # "pt" maps no file larger than memory
    except SafetensorError as e:
        raise ValueError(f"{file}: corrupt: {e}; fetch it again") from e
    return out


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return out


def _entry(file: Path, name: str, field: Any, data: int) -> Entry:
    try:
        code, shape, (begin, end) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)):
            raise ValueError("shape and data_offsets must be whole numbers, not negative")
        if code not in DTYPES:
            raise ValueError(f"unsupported dtype {code} (supported: {', '.join(DTYPES)})")
        entry = Entry(file, DTYPES[code], shape, data + begin)
        if end - begin != entry.nbytes:
            raise ValueError(f"{code} {list(shape)} needs {entry.nbytes} bytes, but its offsets are {begin} to {end}")
        return entry
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file}: tensor {name}: {type(e).__name__}: {e}; fetch the file again, or convert it") from e


def as_bytes(x: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, flat, shared with it."""
    return x.detach().reshape(-1).view(torch.uint8).numpy()


def runs(shape: Shape, offset: Shape, size: Shape) -> tuple[int, list[int]]:
    """The contiguous runs of a box in a row-major tensor: (elements a run, first element of each), in order.

    >>> runs((4, 6), (1, 0), (2, 6)), runs((4, 6), (1, 2), (2, 3))
    ((12, [6]), (3, [8, 14]))
    """
    cut = len(shape)                                                     # dims from `cut` on are taken whole
    while cut and size[cut - 1] == shape[cut - 1]:
        cut -= 1
    cut = max(cut - 1, 0)                                                # the last dim that is cut belongs to the run
    strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    starts = np.array([sum(o * s for o, s in zip(offset, strides, strict=True))])
    for n, stride in zip(size[:cut], strides[:cut], strict=True):
        starts = (starts[:, None] + np.arange(n) * stride).reshape(-1)
    return math.prod(size[cut:]), starts.tolist()


def read(entry: Entry, offset: Shape, size: Shape) -> torch.Tensor:
    """A box of a tensor in the file's dtype."""
    out = torch.empty(size, dtype=entry.dtype)
    read_into(entry, offset, out)
    return out


def read_into(entry: Entry, offset: Shape, out: torch.Tensor) -> None:
    """Fill `out` with the box at `offset`, converted to its dtype.

    What is contiguous in the file is read, in place where nothing is to convert; any other box is copied from a memory
    map, 3 to 6 times faster than a read for each row of a kilobyte. The library's slices beside both:
    docs/decisions/0013-safetensors.md.
    """
    if not out.numel():
        return
    _, starts = runs(entry.shape, offset, tuple(out.shape))
    if len(starts) > 1:
        out.copy_(_mapped(entry)[tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))])
        return
    plain = out.dtype == entry.dtype and out.is_contiguous()
    values = out if plain else torch.empty(out.shape, dtype=entry.dtype)
    _read(entry.file, entry.start + starts[0] * entry.dtype.itemsize, as_bytes(values).data)
    if not plain:
        out.copy_(values)


def _read(file: Path, position: int, view: memoryview) -> None:
    with file.open("rb") as f:
        f.seek(position)
        if f.readinto(view) < len(view):
            raise ValueError(f"{file}: truncated while it was read, after byte {position}; fetch it again")


def _mapped(entry: Entry) -> torch.Tensor:
    values = torch.from_numpy(np.memmap(entry.file, np.uint8, "c", entry.start, entry.nbytes))
    return values.view(entry.dtype).view(entry.shape)


# ---- writing ---------------------------------------------------------------------------------------------------------

def assign(nbytes: Mapping[str, int], max_shard_bytes: int) -> dict[str, str]:
    """Which file each tensor goes to, in the order given: a new one where the next would pass `max_shard_bytes`.

    >>> for name, file in assign({"a": 6, "b": 6, "c": 2}, 8).items():
    ...     print(name, file)
    a model-00001-of-00002.safetensors
    b model-00002-of-00002.safetensors
    c model-00002-of-00002.safetensors
    """
    shard, filled, shards = 0, 0, {}
    for name, n in nbytes.items():
        if filled and filled + n > max_shard_bytes:
            shard, filled = shard + 1, 0
        shards[name], filled = shard, filled + n
    return {n: SINGLE if shard == 0 else f"model-{i + 1:05}-of-{shard + 1:05}.safetensors" for n, i in shards.items()}


def lay_out(folder: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]],
            files: Mapping[str, str]) -> tuple[dict[str, Entry], dict[Path, bytes]]:
    """Where each tensor's bytes go, and each file's header: a pure function, so that ranks need not talk.

    Wide dtypes come first and then names in order, as in the files of the safetensors package.
    """
    entries, headers = {}, {}
    for file in sorted(set(files.values())):
        mine = sorted((n for n in tensors if files[n] == file), key=lambda n: (-tensors[n][0].itemsize, n))
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in mine:
            dtype, shape = tensors[name]
            entries[name] = Entry(folder / file, dtype, tuple(shape), end)
            end += entries[name].nbytes
            fields[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [entries[name].start, end]}
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        headers[folder / file] = struct.pack("<Q", len(text)) + text
        for name in mine:
            e = entries[name]
            entries[name] = Entry(e.file, e.dtype, e.shape, e.start + 8 + len(text))
    return entries, headers


def create(entries: Mapping[str, Entry], headers: Mapping[Path, bytes]) -> None:
    """Write the headers, each file at its full length, and the index if there are several files."""
    for file, head in headers.items():
        with writing(file) as fd:
            pwrite(fd, memoryview(head), 0)
            os.ftruncate(fd, max([len(head), *(e.start + e.nbytes for e in entries.values() if e.file == file)]))
    if {f.name for f in headers} != {SINGLE}:
        index = {"metadata": {"total_size": sum(e.nbytes for e in entries.values())},
                 "weight_map": {n: entries[n].file.name for n in sorted(entries)}}
        with writing(next(iter(headers)).with_name(INDEX)) as fd:
            pwrite(fd, memoryview(json.dumps(index, indent=2).encode()), 0)


@contextmanager
def writing(file: Path) -> Iterator[int]:
    """A descriptor to write `file` with (created if need be), on disk when the block is left; errors name the file."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        if e.filename is not None:
            raise
        raise OSError(e.errno, f"{e.strerror} while writing (free some space, or choose another directory)",
                      str(file)) from e


def write(fd: int, entry: Entry, offset: Shape, values: torch.Tensor) -> None:
    """Write a box of a tensor into its file, which exists at full length: a pwrite for each contiguous run."""
    values = values.detach().to(entry.dtype).cpu().contiguous()
    if not values.numel():
        return
    view = as_bytes(values).data
    length, starts = runs(entry.shape, offset, tuple(values.shape))
    width = entry.dtype.itemsize
    for i, start in enumerate(starts):
        pwrite(fd, view[i * length * width:(i + 1) * length * width], entry.start + start * width)


def pwrite(fd: int, view: memoryview, position: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count


# ---- directories -----------------------------------------------------------------------------------------------------

def partial(path: Path) -> Path:
    """The directory beside `path` in which its successor is written."""
    return path.with_name(f".{path.name}.partial")


def begin(path: Path) -> Path:
    """An empty directory to write the successor of `path` in.

    Raises FileExistsError if `path` is anything but absent, empty, or a flat directory with safetensors: it will be
    replaced whole.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another path for the directory")
    inside = list(path.iterdir()) if path.exists() else []
    odd = [f.name for f in inside if f.is_dir()]
    if odd or (inside and not any(f.suffix == ".safetensors" for f in inside)):
        raise FileExistsError(f"{path} would be replaced whole, but it holds "
                              f"{', '.join(odd) or 'files and no safetensors'}: choose another path, "
                              "or move these away")
    work = partial(path)
    shutil.rmtree(work, ignore_errors=True)                              # left by a run that was killed
    work.mkdir(parents=True)
    return work


def finish(path: Path) -> None:
    """Put the finished successor in the place of `path`, and only then delete what was there."""
    work, old = partial(path), path.with_name(f".{path.name}.old")
    sync(work)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        work.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
