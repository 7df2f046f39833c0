"""The cache of tokenised data: built once, by several processes, under a lock; checked whenever it is opened.

A cache is a folder named by a hash of what it was made from: the files, the tokenizer with its template and options,
the format's version. It appears by one rename, so that it is whole or not there. Files: `tokens` (uint32, bit 31:
carries loss), `offsets` (int64), `documents` (uint32, the first position that carries loss, bit 31: splittable),
`records` (uint32), `meta.json`.
"""
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xtf import device, lock
from xtf.data.chat import Bad, BadLine, Encoder, Stats
from xtf.data.dataset import CARRIES_LOSS, SPLITTABLE, Dataset, Store
from xtf.data.read import Chunk, records, resolve, split_file

VERSION = 1
FILES = ("tokens", "offsets", "documents", "records")
CHUNK = 16 << 20                       # bytes of text that a process takes at a time
BATCH = 1 << 20, 1024                  # bytes and records that go to the tokenizer together
SEVERAL = 5                            # bad lines that are told
TRUSTED = 3600.0  # seconds for which a check of files that have not changed since holds for the next to open them
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Say = Callable[[str], None]


def tokenized(data: str | Sequence[str], encoder: Encoder, *, folder: str | Path, on_bad: str = "raise",
              workers: int | None = None, say: Say = lambda text: None, chunk_bytes: int = CHUNK) -> Dataset:
    """The documents of files, folders, globs or hub ids, tokenised into `folder` if they are not there yet.

    Every process may call it at once: one builds while the others wait on its lock. Building takes memory for a few
    chunks a worker, whatever the size of the data. `workers` are processes, by default one a core (and no more than
    there are chunks; with one, this process does it). `say` gets lines about progress.

    Raises BadLine, naming file, line and reason, for the first line that cannot be read if `on_bad` is "raise"; with
    "skip" bad lines are counted in `.stats`. ValueError or OSError where `data` names nothing, OSError where `folder`
    cannot be written (what was begun is removed).

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "data.jsonl"
    ...     _ = file.write_text('{"input_ids": [5, 6, 7]}\\n{"input_ids": [8, 9]}')
    ...     data = tokenized(str(file), Encoder(None), folder=folder)
    >>> len(data), data[0].ids.tolist(), data[1].mask.tolist()
    (2, [5, 6, 7], [False, True])
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f'on_bad={on_bad!r} is neither "raise" nor "skip"')
    names = [data] if isinstance(data, str) else list(data)
    paths = [path for name in names for path in resolve(name)]
    identity = _identity(paths)
    made_from = {"version": VERSION, "files": identity, **encoder.fingerprint}
    place = Path(folder).expanduser() / hashlib.blake2b(json.dumps(made_from).encode(), digest_size=12).hexdigest()
    title = " ".join(names)
    with _locked(place, say) as note:
        def tell(text: str) -> None:
            say(f"{title}: {text}")
            note(f"{title}: {text}")

        note(f"{title}: opening {place}")
        store = None
        if place.exists():
            try:
                store = _open(place)
            except (ValueError, OSError) as e:
                say(f"{place}: {e}; it is made anew")
                shutil.rmtree(place)
        if store is None:
            _build(place, paths, encoder, on_bad, workers or device.processors(), tell, chunk_bytes)
            if _identity(paths) != identity:
                shutil.rmtree(place)
                raise ValueError(f"--data {title}: the files changed while they were read; start again when they are "
                                 "complete")
            store = _open(place)
    if store.stats.bad and on_bad == "raise":
        raise store.stats.bad_lines[0]
    return Dataset(store)


def _identity(paths: Sequence[Path]) -> list[list[Any]]:
    """What tells a file from one that was there before: path, size, time of change, a hash of its first and last MB."""
    out = []
    for path in paths:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            ends = hashlib.blake2b(file.read(1 << 20), digest_size=12)
            file.seek(max(0, stat.st_size - (1 << 20)))
            ends.update(file.read(1 << 20))
        out.append([str(path.absolute()), stat.st_size, stat.st_mtime_ns, ends.hexdigest()])
    return out


@contextlib.contextmanager
def _locked(place: Path, say: Say) -> Iterator[Say]:
    """Hold the lock of one cache; the kernel frees it when its holder ends, however it ends.

    Gives a function that notes what is going on, in the lock's file, for those who wait: they say it.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = open(place.with_suffix(".lock"), "a+")
    except OSError as e:
        if place.exists():                                           # read-only, and made before
            yield lambda text: None
            return
        raise _unusable(place.parent, e) from e

    with lock.hold(file, waiting=lambda doing: say(f"waiting for another process{doing and f' ({doing})'}")):
        yield lambda text: lock.note(file, text)


def _unusable(folder: Path, e: OSError) -> OSError:
    return OSError(f"{folder}: tokenised data cannot be kept there ({e}); make room there, or give another folder "
                   "(--cache)")


# -- opening

def _open(place: Path) -> Store:
    """The cache of a folder, its checksums compared. Raises ValueError or OSError that says what is wrong with it."""
    try:
        written = json.loads((place / "meta.json").read_bytes())
        meta, check = written["meta"], written["check"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"meta.json is damaged ({e})") from e
    if check != _check(meta):
        raise ValueError("meta.json is damaged")
    stats = {name: [(s := (place / name).stat()).st_size, s.st_mtime_ns, s.st_ino] for name in FILES}
    for name in FILES:
        if stats[name][0] != meta["sizes"][name]:
            raise ValueError(f"{name} has {stats[name][0]:,} bytes instead of {meta['sizes'][name]:,}")
    stamp = place / "checked.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(stamp.read_bytes()) == stats and time.time() - stamp.stat().st_mtime < TRUSTED:
            return Store(place, meta)
    with ThreadPoolExecutor(8) as pool:                              # crc32 and reads let go of the interpreter's lock
        for name, start, found, wanted in pool.map(lambda part: _crc(place, *part), _parts(meta)):
            if found != wanted:
                raise ValueError(f"{name} is damaged within the bytes from {start:,} on (checksum {found:08x} instead "
                                 f"of {wanted:08x})")
    with contextlib.suppress(OSError):                               # a cache that cannot be written can still be read
        stamp.write_text(json.dumps(stats))
    return Store(place, meta)


def _parts(meta: dict[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    for name in FILES:
        for k, crc in enumerate(meta["crcs"][name]):
            yield name, k * CHUNK, min(CHUNK, meta["sizes"][name] - k * CHUNK), crc


def _crc(place: Path, name: str, start: int, size: int, wanted: int) -> tuple[str, int, int, int]:
    crc = 0
    with open(place / name, "rb") as file:
        file.seek(start)
        while size > 0 and (piece := file.read(min(size, 1 << 20))):
            crc, size = zlib.crc32(piece, crc), size - len(piece)
    return name, start, crc, wanted


def _check(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta).encode())


# -- building

class _Encoded(NamedTuple):
    """What a chunk became; its tokens are in a file of its own."""
    lengths: np.ndarray
    documents: np.ndarray
    records: np.ndarray               # numbered from 0
    stats: Stats
    bad: list[tuple[int, str]]        # the first few: index in the chunk, reason


class _Out:
    """A file of the cache while it is written: its size, and the checksum of each CHUNK of it."""

    def __init__(self, path: Path):
        self.file, self.size, self.crcs = open(path, "wb"), 0, []

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            at = self.size % CHUNK
            piece = view[:CHUNK - at]
            self.crcs.append(zlib.crc32(piece, self.crcs.pop() if at else 0))
            self.file.write(piece)
            self.size += len(piece)
            view = view[len(piece):]

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def _build(place: Path, paths: Sequence[Path], encoder: Encoder, on_bad: str, workers: int, say: Say,
           chunk_bytes: int) -> None:
    for stale in place.parent.glob(f"{place.name}.partial-*"):       # of builders that were killed: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    chunks = [chunk for path in paths for chunk in split_file(path, chunk_bytes)]
    # a daemon may have no children
    workers = 1 if multiprocessing.current_process().daemon else min(workers, len(chunks))
    begun = told = time.monotonic()
    partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.partial-", dir=place.parent))
    out = {name: _Out(partial / name) for name in FILES}
    try:
        stats, counted, num_records, before = Stats(), 0, 0, Counter[str]()
        out["offsets"].write(np.zeros(1, np.int64))
        with contextlib.closing(_encode_all(chunks, encoder, partial, workers)) as encoded:
            for k, (chunk, part) in enumerate(zip(chunks, encoded, strict=True)):
                bad = [BadLine(chunk.path, before[chunk.path] + i + 1, reason) for i, reason in part.bad]
                if bad and on_bad == "raise":
                    raise bad[0]
                before[chunk.path] += part.stats.lines
                tokens = partial / f"part-{k}"
                out["tokens"].write(np.fromfile(tokens, np.uint32))
                tokens.unlink()
                out["offsets"].write(out["tokens"].size // 4 - int(part.lengths.sum())
                                     + np.cumsum(part.lengths, dtype=np.int64))
                out["documents"].write(part.documents)
                out["records"].write(part.records + np.uint32(num_records))
                num_records += int(part.records[-1]) + 1 if len(part.records) else 0
                counted += len(part.lengths)
                stats = _sum(stats, replace(part.stats, bad_lines=bad[:SEVERAL - len(stats.bad_lines)]))
                if (now := time.monotonic()) - told > 5 or k + 1 == len(chunks):
                    say(f"tokenised {k + 1} of {len(chunks)} chunks, {stats.tokens:,} tokens, "
                        f"{stats.tokens / (now - begun):,.0f} tokens/s")
                    told = now
        for file in out.values():
            file.sync()
        digest = zlib.crc32(json.dumps([out[name].crcs for name in FILES]).encode())
        written = vars(stats) | {"bad_lines": [[b.file, b.line, b.reason] for b in stats.bad_lines]}
        meta = {"version": VERSION, "files": [str(p) for p in paths], "fingerprint": encoder.fingerprint,
                "stats": written, "records": num_records,
                "data": f"{counted} documents, {stats.tokens} tokens, {digest:08x}",
                "sizes": {name: out[name].size for name in FILES},
                "crcs": {name: out[name].crcs for name in FILES}}
        with open(partial / "meta.json", "w") as file:
            json.dump({"meta": meta, "check": _check(meta)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, place)
    except OSError as e:
        raise (_unusable(place.parent, e) if e.errno in FULL else e) from e
    finally:
        for file in out.values():
            with contextlib.suppress(OSError):                       # a full disk says so again
                file.file.close()
        shutil.rmtree(partial, ignore_errors=True)


def _sum(a: Stats, b: Stats) -> Stats:
    return Stats(**{name: value + getattr(b, name) for name, value in vars(a).items()})


def _encode_all(chunks: Sequence[Chunk], encoder: Encoder, folder: Path,
                workers: int) -> Generator[_Encoded, None, None]:
    """What each chunk became, in order, from processes that take the next chunk when they are done with one."""
    if workers <= 1:
        for k, chunk in enumerate(chunks):
            yield _encode(encoder, chunk, folder / f"part-{k}")
        return
    context = multiprocessing.get_context("forkserver")  # a fork of this process might hold locks of its threads
    context.set_forkserver_preload(["xtf.data.cache"])
    started, done = [], {}
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, encoder, str(folder)), daemon=True)
            process.start()
            there.close()
            started.append((here, process))
        idle, busy, sent, ahead = [conn for conn, _ in started], set(), 0, 3 * workers
        for k in range(len(chunks)):
            while k not in done:
                # a slow chunk must not let results pile up behind it
                while idle and sent < min(len(chunks), k + ahead):
                    busy.add(conn := idle.pop())
                    conn.send((sent, chunks[sent]))
                    sent += 1
                for conn in wait(list(busy)):
                    try:
                        number, answer = conn.recv()  # pyright: ignore
                    except (EOFError, ConnectionError) as e:
                        raise OSError("a process that tokenises died (out of memory? or a script without `if __name__ "
                                      "== \"__main__\":`)") from e
                    done[number] = answer
                    busy.discard(conn)
                    idle.append(conn)
            if isinstance(done[k], Exception):  # in its turn: the first of several is told, whoever is faster
                raise done[k]
            yield done.pop(k)
    finally:
        for conn, process in started:
            process.kill()
            process.join()
            conn.close()


def _serve(conn: Any, encoder: Encoder, folder: str) -> None:
    """A worker: its parent's death closes the pipe, and it ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by tokenizers: processes are the parallel part here
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            number, chunk = conn.recv()
            try:
                answer: Any = _encode(encoder, chunk, Path(folder) / f"part-{number}")
            except (ValueError, OSError) as e:
                # which can be pickled, whatever its arguments
                answer = ValueError(str(e)) if isinstance(e, ValueError) else e
            conn.send((number, answer))


def _encode(encoder: Encoder, chunk: Chunk, path: Path) -> _Encoded:
    """Tokenise a chunk: its tokens into the file `path`, all else returned."""
    lengths, documents, numbers, stats = [], [], [], Stats()
    bad: list[tuple[int, str]] = []
    encoder.counts.clear()
    record = 0
    with open(path, "wb") as file:
        for batch in _batches(records(chunk)):
            for index, result in zip((i for i, _ in batch), encoder.many([r for _, r in batch]), strict=True):
                stats.lines += 1
                if isinstance(result, Bad):
                    stats.bad += 1
                    bad += [(index, str(result))] if len(bad) < SEVERAL else []
                    continue
                kept = [e for e in result if e.mask[1:].any()]
                stats.without_loss += len(result) - len(kept)
                for ids, mask, splittable in kept:
                    mask[:1] = False
                    file.write((ids.astype(np.uint32) | np.where(mask, CARRIES_LOSS, np.uint32(0))).data)
                    lengths.append(len(ids))
                    documents.append(int(mask.argmax()) + int(SPLITTABLE) * splittable)
                    numbers.append(record)
                    stats.loss_tokens += int(mask.sum())
                record += bool(kept)
    stats.samples, stats.tokens = len(lengths), sum(lengths)
    stats.notes = Counter(encoder.counts)
    whole = lambda numbers: np.array(numbers, np.uint32)
    return _Encoded(whole(lengths), whole(documents), whole(numbers), stats, bad)


def _batches(items: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else sys.getsizeof(item[1])
        if size > BATCH[0] or len(batch) == BATCH[1]:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
