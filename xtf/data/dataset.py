"""Tokenised documents in memory-mapped files, read as samples of at most seq_len tokens.

Whole documents are stored. Text that is longer is split where it is read, and conversations cut off, so that one cache
serves every seq_len. Neither memory nor the time to look at a window of samples grows with the number of documents (but
for 8 bytes a block of 64).

N: documents, K: samples asked for. A *record* is what one line or row gave: one document or several.
"""
import mmap
from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xtf.data.batch import Sample
from xtf.data.chat import BadLine, Stats
from xtf.data.mix import permuted

CARRIES_LOSS = np.uint32(1 << 31)      # of a token, beside its id
SPLITTABLE = np.uint32(1 << 31)        # of a document, beside the position of its first token that carries loss
STRIDE = 128                           # samples that are looked up at once
BLOCK = 64                             # documents are counted in blocks of so many
FORGET = 64 << 20                      # when so many bytes may have been mapped, their pages are given back
# of that, what the kernel maps where one byte is read: its neighbours in the file's cache, 0.4 MB as measured
AROUND = 1 << 19


class Store:
    """The files of one cache, mapped: tokens uint32, offsets int64 [N+1], documents uint32 [N], records uint32 [N]."""

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.meta, self._maps, self._read = meta, [], 0
        said = meta["stats"]
        self.stats = Stats(**{**said, "notes": Counter(said["notes"]),
                              "bad_lines": [BadLine(*b) for b in said["bad_lines"]]})
        self.tokens = self._map(folder / "tokens", np.uint32)
        for m in self._maps:
            m.madvise(mmap.MADV_RANDOM)  # samples lie anywhere: what is around one would be read for nothing
        self.offsets = self._map(folder / "offsets", np.int64)
        self.documents = self._map(folder / "documents", np.uint32)
        self.records = self._map(folder / "records", np.uint32)

    def _map(self, path: Path, dtype: type) -> np.ndarray:
        if path.stat().st_size == 0:                                 # which cannot be mapped
            return np.empty(0, dtype)
        with open(path, "rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start..start + length, asked of the disk as one piece."""
        page = 4 * start & -mmap.PAGESIZE
        self._maps[0].madvise(mmap.MADV_WILLNEED, page, 4 * (start + length) - page)
        self.touched(1, 4 * length)
        return self.tokens[start:start + length]

    def touched(self, places: int, nbytes: int) -> None:
        """Count what was read, and now and then let the kernel have the pages back, which are a file's cache."""
        self._read += places * AROUND + nbytes
        if self._read > FORGET:
            self.forget()

    def forget(self) -> None:
        self._read = 0
        for m in self._maps:
            m.madvise(mmap.MADV_DONTNEED)


class _Part(NamedTuple):
    """The records on one side of a split: those that a shuffle puts before place `count` are held out."""
    seed: int
    count: int
    held_out: bool


class Dataset:
    """The samples of a cache: `len`, `[i]` as `Sample(ids int64 [n], mask bool [n], record)`, in the files' order.

    `at(seq_len)` are the same documents as samples of at most seq_len tokens, 2 <= n. Text is split with one token of
    overlap, so that each token but a document's first is predicted exactly once. Conversations keep their first seq_len
    tokens, and are left out where none of those carries loss. Without it, samples are whole documents. Made by
    `xtf.data.tokenized`.
    """

    def __init__(self, store: Store, seq_len: int | None = None, part: _Part | None = None):
        self.store, self.seq_len, self.part = store, seq_len, part
        self.num_records = int(store.meta["records"])
        self._limit = (1 << 62) if seq_len is None else seq_len

    def at(self, seq_len: int) -> "Dataset":
        """The same documents as samples of at most `seq_len` tokens; ValueError below 2: predicting takes two."""
        if seq_len < 2:
            raise ValueError(f"seq_len={seq_len}: predicting a token takes at least 2")
        return self if seq_len == self.seq_len else Dataset(self.store, seq_len, self.part)

    def split(self, count: int, seed: int) -> tuple["Dataset", "Dataset"]:
        """(the rest, the samples of `count` records drawn by seed)."""
        if self.part:
            raise ValueError("these samples are one side of a split already")
        rest, held = (Dataset(self.store, self.seq_len, _Part(seed, count, side)) for side in (False, True))
        return rest, held

    def __len__(self) -> int:
        return int(self._blocks[-1])

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        start, length, record = self._find(np.array([i % len(self)]))
        return self.read(int(start[0]), int(length[0]), int(record[0]))

    def read(self, start: int, length: int, record: int = -1) -> Sample:
        """The sample that begins at a token of the store."""
        raw = self.store.read(start, length)
        mask = raw >= CARRIES_LOSS
        mask[:1] = False  # predicted where the piece before ends, if anywhere
        return Sample((raw & ~CARRIES_LOSS).astype(np.int64), mask, record)

    def spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples' first tokens in the store and their lengths, both int64 [K]: what `read` takes."""
        parts = [self._find(indices[at:at + STRIDE]) for at in range(0, len(indices), STRIDE)]
        self.store.forget()
        start, length = (np.concatenate([p[i] for p in parts]) if parts else np.zeros(0, np.int64) for i in (0, 1))
        return start, length

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)]: all at once, for small data."""
        return self.spans(np.arange(len(self)))[1]

    @property
    def tokens(self) -> int:
        """Tokens of all samples, those where pieces overlap counted twice."""
        return self._totals["tokens"]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the samples are made of, by name: the data, and the tokenizer, template and options of reading it."""
        part, meta = self.part, self.store.meta
        said = {"data": meta["data"], **meta["fingerprint"]}
        if part:
            said["split"] = f"{'held out' if part.held_out else 'rest'}, {part.count} records, seed {part.seed}"
        return said

    @cached_property
    def stats(self) -> Stats:
        """What became of the lines, and of the documents at this seq_len (of both sides, after a split)."""
        if self.part is not None:
            return Dataset(self.store, self.seq_len).stats
        made, t = self.store.stats, self._totals
        return replace(made, samples=len(self), tokens=t["tokens"] - t["overlap"], truncated=t["truncated"],
                       tokens_dropped=t["dropped"], loss_tokens=made.loss_tokens - t["loss_dropped"],
                       without_loss=made.without_loss + t["without_loss"])

    # -- documents to samples

    def _counts(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(samples of each document, its tokens), in the shape of `documents`; numbers may lie beyond the last."""
        store, last = self.store, len(self.store.documents) - 1
        real, documents = documents <= last, np.minimum(documents, last)
        n, about = store.offsets[documents + 1] - store.offsets[documents], store.documents[documents]
        count = np.where(about >= SPLITTABLE, -(-(n - 1) // (self._limit - 1)), about.astype(np.int64) < self._limit)
        if self.part is not None:
            records = store.records[documents].ravel().astype(np.int64)
            held = (permuted(records, self.num_records, self.part.seed) < self.part.count).reshape(documents.shape)
            count *= held == self.part.held_out
        store.touched(3 * len(documents) if documents.ndim > 1 else 1, documents.size * 24)
        return count * real, n

    @cached_property
    def _blocks(self) -> np.ndarray:
        """Samples before each block of documents, and in all: int64 [ceil(N / BLOCK) + 1]."""
        return self._scan[0]

    @cached_property
    def _totals(self) -> Counter[str]:
        return self._scan[1]

    @cached_property
    def _scan(self) -> tuple[np.ndarray, Counter[str]]:
        """One pass over the documents, a stretch at a time."""
        store, N, stretch = self.store, len(self.store.documents), BLOCK << 12
        counts, totals = [np.zeros(1, np.int64)], Counter[str]()
        for at in range(0, N, stretch):
            documents = np.arange(at, min(at + stretch, N))
            count, n = self._counts(documents)
            counts.append(np.add.reduceat(count, np.arange(0, len(count), BLOCK)))
            overlap, long = np.maximum(count - 1, 0), (n > self._limit) & (store.documents[documents] < SPLITTABLE)
            cut = long & (count > 0)
            totals["overlap"] += int(overlap.sum())
            totals["truncated"] += int(cut.sum())
            totals["dropped"] += int((n - self._limit)[cut].sum())
            totals["tokens"] += int(n[count > 0].sum() + overlap.sum() - (n - self._limit)[cut].sum())
            totals["without_loss"] += int((long & (count == 0)).sum())
            if self.part is None:
                starts, ends = store.offsets[documents[long]] + self._limit, store.offsets[documents[long] + 1]
                for start, end in zip(starts, ends, strict=True):
                    totals["loss_dropped"] += int((store.read(int(start), int(end - start)) >= CARRIES_LOSS).sum())
        return np.cumsum(np.concatenate(counts)), totals

    def _find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First token in the store, length and record of each sample, all [K]."""
        block = np.searchsorted(self._blocks, indices, side="right") - 1
        documents = block[:, None] * BLOCK + np.arange(BLOCK)
        count, n = self._counts(documents)
        ends = self._blocks[block][:, None] + np.cumsum(count, 1)
        at = (ends <= indices[:, None]).sum(1)
        row, store = np.arange(len(indices)), self.store
        document = documents[row, at]
        piece = indices - (ends - count)[row, at]
        skipped = np.where(store.documents[document] >= SPLITTABLE, piece * (self._limit - 1), 0)
        return store.offsets[document] + skipped, np.minimum(n[row, at] - skipped, self._limit), store.records[document]
