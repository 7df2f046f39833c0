"""From what `--data` says to raw records: files, folders, globs, hub ids; JSONL and Parquet, in chunks to share out."""
import glob
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")
# files of `datasets` that hold no records
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
HUB_ID = re.compile(r"(modelscope://|hf://)?(\w[\w.-]*/\w[\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.ndjson)(?<!\.parquet))")
BLOCK = 1 << 20


class Chunk(NamedTuple):
    """Part of a file: bytes start..stop of JSONL (whole lines), row groups of Parquet; or all of one JSON array."""
    path: str
    kind: Literal["jsonl", "parquet", "json"]
    start: int
    stop: int


def resolve(data: str) -> list[Path]:
    """The files behind a path, a folder, a glob or a hub id, sorted.

    A folder stands for all of its .jsonl, .json, .ndjson and .parquet files, at any depth, hidden ones apart.
    `org/name` that is no path is a dataset of the Hugging Face hub, downloaded or from its cache;
    `modelscope://org/name` one of ModelScope.

    Raises ValueError or OSError, naming --data, if there is nothing to read, or if it has to be unpacked first.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return _listed(path, data)
    if path.exists():
        if path.suffix in PACKED:
            raise ValueError(f"--data {data}: packed files are not read; unpack it first")
        return [path]
    if found := sorted(Path(p) for p in glob.glob(str(path), recursive=True)):
        files = sorted({file for p in found for file in ([p] if p.is_file() else _files(p))})
        if not files:
            raise ValueError(f"--data {data}: matches folders in which there is no {', '.join(SUFFIXES)} file")
        if packed := [f for f in files if f.suffix in PACKED]:
            raise ValueError(f"--data {data}: {packed[0]} is packed; unpack it first")
        return files
    hub = HUB_ID.fullmatch(data)
    if not hub or glob.has_magic(data):
        raise FileNotFoundError(f"--data {data}: no such file or folder, and no file matches it")
    return _listed(_hub("--data", hub, "dataset", [f"*{suffix}" for suffix in SUFFIXES]), data)


def model_path(model: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """A model's directory: the one named, or a hub id's (`org/name`, `modelscope://org/name`), downloaded or cached.

    `files` are the patterns of what is wanted of a hub's. Raises ValueError or OSError, naming --model.

    >>> model_path(".")
    PosixPath('.')
    """
    path = Path(model).expanduser()
    hub = HUB_ID.fullmatch(model)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"--model {model}: is a file; give the directory that holds config.json")
    if not hub:
        raise FileNotFoundError(f"--model {model}: no such directory, and not a hub id like org/name")
    return _hub("--model", hub, "model", list(files))


def _files(folder: Path) -> list[Path]:
    """Files with records, at any depth; what starts with a dot is left out."""
    inside = (f for f in folder.rglob("*") if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    return sorted(f for f in inside if f.suffix in SUFFIXES and f.name not in ABOUT and f.is_file())


def _listed(folder: Path, data: str) -> list[Path]:
    files = _files(folder)
    if not files:
        packed = next((f for f in folder.rglob("*") if f.suffix in PACKED), None)
        raise ValueError(f"--data {data}: no {', '.join(SUFFIXES)} file in {folder}"
                         + (f"; unpack {packed} first" if packed else ""))
    return files


def _hub(flag: str, hub: re.Match[str], kind: str, patterns: list[str]) -> Path:
    name = hub[2]
    try:
        if hub[1] == "modelscope://":
            from modelscope import dataset_snapshot_download, snapshot_download  # pyright: ignore[reportMissingImports]
            download = snapshot_download if kind == "model" else dataset_snapshot_download
            return Path(download(name, allow_patterns=patterns))
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns))  # offline: what the cache has
    except ImportError as e:
        raise ValueError(f"{flag} {hub[0]}: needs ModelScope: pip install 'xtf[modelscope]'") from e
    except Exception as e:  # the two clients raise all sorts of things, and each means this
        why = str(e).strip().splitlines()[0] if str(e).strip() else "no reason given"
        raise OSError(f"{flag} {hub[0]}: no such path here, and the hub's {kind} {name} is neither to be had nor in "
                      f"the cache ({type(e).__name__}: {why})") from e


# ---- chunks ----------------------------------------------------------------------------------------------------------

def split_file(path: str | Path, chunk_bytes: int = 16 << 20) -> list[Chunk]:
    """The file as chunks of about chunk_bytes, in order; an empty file has none. Reads little of it, whatever its size.

    Raises OSError if it cannot be read, ValueError, naming it, if its suffix says Parquet and it is not.
    """
    name = str(path)
    if Path(path).suffix == ".parquet":
        groups = _parquet(name).metadata
        chunks, start, size = [], 0, 0
        for i in range(groups.num_row_groups):
            size += groups.row_group(i).total_byte_size
            if size >= chunk_bytes or i == groups.num_row_groups - 1:
                chunks.append(Chunk(name, "parquet", start, i + 1))
                start, size = i + 1, 0
        return chunks
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if Path(path).suffix == ".json" and file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            return [Chunk(name, "json", 0, size)]
        bounds = [0]
        while bounds[-1] < size:
            bounds.append(_line_end(file, min(bounds[-1] + chunk_bytes, size), size))
    return [Chunk(name, "jsonl", a, b) for a, b in pairwise(bounds)]


def _line_end(file: BinaryIO, position: int, size: int) -> int:
    """The end of the line that holds the byte before position."""
    file.seek(position - 1)
    while block := file.read(BLOCK):
        if (at := block.find(b"\n")) >= 0:
            return file.tell() - len(block) + at + 1
    return size


def records(chunk: Chunk) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(index within the chunk, from 0; raw line or row) of each record of a chunk, in order.

    Lines end with a line feed, and come without it; empty ones come too, so that a record's line in the file is 1 + its
    index + the numbers of records in the chunks before. Of Parquet, what is null is left out at any depth, since a
    column cannot say that a key is absent; lists of integers are arrays.

    Raises OSError if the file cannot be read, or is shorter than it was; ValueError, naming it, if it is broken as a
    whole (Parquet, an array).
    """
    if chunk.kind == "jsonl":
        yield from enumerate(_lines(chunk))
    elif chunk.kind == "parquet":
        yield from enumerate(_rows(chunk))
    else:
        yield from enumerate(_elements(chunk))


def _lines(chunk: Chunk) -> Iterator[bytes]:
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        left = chunk.stop - chunk.start
        while left > 0:
            line = file.readline(left)
            if not line:
                raise OSError(f"{chunk.path}: became shorter while it was read")
            left -= len(line)
            yield line.removesuffix(b"\n")


def _elements(chunk: Chunk) -> Iterator[bytes]:
    text = Path(chunk.path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{chunk.path}: begins with [ but is no JSON array ({e}); give one JSON object a line") from e
    for value in values:                                     # as lines, which are checked like any others
        yield json.dumps(value).encode()


def _parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as e:
        raise ValueError(f"{path}: not a whole Parquet file: {str(e).splitlines()[0]}") from e


def _rows(chunk: Chunk) -> Iterator[dict[str, Any]]:
    import pyarrow
    with _parquet(chunk.path) as file:
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=list(range(chunk.start, chunk.stop))):
                columns = {name: _values(batch.column(i)) for i, name in enumerate(batch.schema.names)}
                for i in range(batch.num_rows):
                    yield {name: value for name, values in columns.items() if (value := values[i]) is not None}
        except (pyarrow.ArrowInvalid, OSError) as e:
            raise ValueError(f"{chunk.path}: row groups {chunk.start} to {chunk.stop - 1} cannot be read: "
                             f"{str(e).splitlines()[0]}") from e


def _values(column: Any) -> list[Any]:
    """A column as a list, one value a row."""
    import pyarrow.types as types
    kind = column.type
    is_list = types.is_list(kind) or types.is_large_list(kind)
    if is_list and types.is_integer(kind.value_type) and not column.flatten().null_count:
        return [None if x is None else x.to_numpy() for x in (scalar.values for scalar in column)]
    return [_without_nulls(value) for value in column.to_pylist()]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(v) for v in value]
    return value
