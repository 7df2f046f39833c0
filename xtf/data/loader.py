"""From samples to each step's batch, in an order that is a pure function of (samples, seed, epoch), of no mesh.

Windows of samples are drawn (`mix`), packed, and their packs shuffled (best-fit puts the longest samples first). Steps
take packs off the endless row of windows; within a step, packs stand by cost; a rank materialises its own share of them
only.
"""
import itertools
import threading
import zlib
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from xtf.data.batch import Batch, Sample, cut_positions, next_power_of_two, pack_rows, room, share
from xtf.data.dataset import Dataset
from xtf.data.mix import Progress, Source, Window, draw, longest
from xtf.data.packing import best_fit
from xtf.data.prefetch import accelerator_index, pinned, prefetch

WINDOW_PACKS = 1024                    # samples looked at ahead fill about so many packs ...
WINDOW = (4096, 1 << 16)               # ... but are at least and at most so many, however long they are


def default_max_documents(seq_len: int) -> int:
    """How many documents a pack may have by default: room for samples of 16 tokens on average, at least 16."""
    return max(16, seq_len // 16)


def _bounds(lengths: Sequence[Sequence[int] | np.ndarray], seq_len: int, max_documents: int) -> tuple[int, int]:
    """(S, `longest`) of a global batch with documents of these lengths, pack by pack: the same on every rank.

    Both are powers of two where that is no more than allowed: each pair is compiled once.

    >>> _bounds([[3, 1], [2]], seq_len=8, max_documents=100), _bounds([[3] * 30], seq_len=200, max_documents=100)
    ((16, 8), (32, 128))
    """
    documents, longest = 1, 1
    for row in map(np.asarray, lengths):
        padding = seq_len - int(row.sum())                           # is a document too
        documents = max(documents, len(row) + (padding > 0))
        longest = max(longest, padding, int(row.max(initial=0)))
    return room(documents, max_documents), min(seq_len, next_power_of_two(longest))


class Listed:
    """A list of samples with a `Dataset`'s face: `spans` says where samples start (their number), how long they are."""

    def __init__(self, samples: Sequence[Sample], seq_len: int):
        self.samples, self.lengths = samples, np.array([len(s[0]) for s in samples], np.int64)
        self.tokens = int(self.lengths.sum())
        wrong = np.flatnonzero((self.lengths < 1) | (self.lengths > seq_len))
        if len(wrong):
            raise ValueError(f"sample {wrong[0]} has {self.lengths[wrong[0]]} tokens, outside 1..seq_len={seq_len}: "
                             "truncate or split it first")

    def __len__(self) -> int:
        return len(self.samples)

    def spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return indices, self.lengths[indices]

    def read(self, start: int, length: int) -> Sample:
        return self.samples[start]

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        check = 0
        for ids, mask, *_ in self.samples:
            check = zlib.crc32(np.asarray(mask, np.float32).tobytes(),
                               zlib.crc32(np.asarray(ids, np.int64).tobytes(), check))
        return {"data": f"{len(self.samples)} samples {check:08x}"}


def sources_of(samples: Any, seq_len: int) -> tuple[Source, ...]:
    """A list of samples, a Dataset, or a list of `Source`, as sources of samples of at most `seq_len` tokens."""
    if not isinstance(samples, Dataset) and len(samples) and isinstance(samples[0], Source):
        return tuple(s._replace(data=sources_of(s.data, seq_len)[0].data) for s in samples)
    return (Source("", samples.at(seq_len) if isinstance(samples, Dataset) else Listed(samples, seq_len)),)


class _Packed(NamedTuple):
    """A window and its packs, which are lists of places in it."""
    window: Window
    packs: list[list[int]]


class Loader:
    """Endless batches of `packs_per_step` packs over all ranks, reshuffled each epoch; the same ones on any mesh.

    `samples` is a list of `Sample`, a `Dataset`, or a list of `Source`, each with its share of the tokens; an epoch of
    several sources is one pass over the one that lasts longest. `step(i, mesh)` is a function of i: it may be asked for
    in any order (from several threads), cheapest in ascending. A step's packs are sorted by their cost in attention
    (the sum of squared lengths) and dealt to the ranks in turn. With `group_by_length` packs of like cost come in one
    step (the steps of a window in random order). `max_documents` is how many documents a pack may have, padding
    among them (a batch's S is the next power of two of those that are there); `window` is how many samples are looked
    at ahead, by default what fills about a thousand packs.

    Raises ValueError if there is no sample, a sample is longer than seq_len, or `packs_per_step` is below 1.

    >>> loader = Loader([Sample([1, 2, 3], [1, 1, 1])], seq_len=8, packs_per_step=2)
    >>> loader.step(0).input_ids.tolist()
    [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    >>> {k: v for k, v in loader.cursor(1).items() if k != "fingerprint"}
    {'step': 1, 'epoch': 2, 'position': 0, 'sources': [[2, 0, 6]]}
    """

    def __init__(self, samples: Any, seq_len: int, packs_per_step: int, seed: int = 0, *,
                 max_documents: int | None = None, window: int | None = None, group_by_length: bool = False):
        if packs_per_step < 1:
            raise ValueError(f"packs_per_step={packs_per_step}: a step takes at least one pack (batch tokens below "
                             f"seq_len={seq_len}?)")
        self.data = sources_of(samples, seq_len)
        for source in self.data:
            if not len(source.data):
                raise ValueError(f"no samples to train on{' in ' + source.name if source.name else ''}: every line "
                                 f"was empty, skipped or without a token that carries loss (within seq_len={seq_len}, "
                                 "where conversations are cut off)")
            if not source.weight > 0:
                raise ValueError(f"the weight {source.weight} of {source.name} is not above 0: leave the source out")
        self.seq_len, self.packs_per_step = seq_len, packs_per_step
        self.seed, self.group_by_length = seed, group_by_length
        self.max_documents = max_documents or default_max_documents(seq_len)
        mean = max(1, sum(s.data.tokens for s in self.data) // sum(len(s.data) for s in self.data))
        self.window = window or int(np.clip(WINDOW_PACKS * seq_len // mean, *WINDOW))
        self._firsts = [0]  # the first pack of each window, in the row of all, as far as known
        self._states = {0: tuple(Progress() for _ in self.data)}     # and how far the sources had come before it
        self._recent: dict[int, _Packed] = {}                        # the windows last asked for, by first pack
        self._lock = threading.Lock()
        self._window_at(0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def step(self, i: int, mesh: DeviceMesh | None = None) -> Batch:
        """This rank's part of step i's global batch: `cut(step(i), mesh)`. Raises ValueError where `cut` does."""
        rows, columns = share(self.packs_per_step, self.seq_len, mesh)
        all_packs = self._packs(i)
        shape = _bounds([w.length[places] for w, places in all_packs], self.seq_len, self.max_documents)
        packs = [[self.data[w.source[k]].data.read(int(w.start[k]), int(w.length[k])) for k in places]
                 for w, places in all_packs[rows]]
        return cut_positions(pack_rows(packs, self.seq_len, *shape), columns)

    def stream(self, start: int = 0, mesh: DeviceMesh | None = None, depth: int = 2) -> Iterator[Batch]:
        """The endless steps from `start` on, made by a thread up to `depth` ahead; pinned if there is an accelerator.

        Close it (or drop it) to end the thread. What goes wrong in the thread is raised here.

        >>> next(Loader([Sample([1, 2], [1, 1])], seq_len=2, packs_per_step=1).stream()).input_ids.tolist()
        [[1, 2]]
        """
        make = (self.step(i, mesh) for i in itertools.count(start))
        return prefetch(partial(pinned, make, accelerator_index()), depth)

    def documents(self, i: int) -> list[int]:
        """The lengths of the samples in step i's global batch, padding left out: for throughput and FLOPs."""
        return [int(w.length[k]) for w, places in self._packs(i) for k in places]

    def sources(self, i: int) -> dict[str, int]:
        """The tokens of each source in step i's global batch; {} where there is one source only."""
        count = Counter({source.name: 0 for source in self.data})
        for w, places in self._packs(i):
            for k in places:
                count[self.data[w.source[k]].name] += int(w.length[k])
        return dict(count) if len(self.data) > 1 else {}

    def cursor(self, i: int) -> dict[str, Any]:
        """Where step i begins, as plain values; `seek` goes on there, on any mesh, without packing what came before.

        `sources` are (epoch, samples of it taken, tokens taken) of each source where the window of the step's first
        pack begins, `position` is that pack's place in it; `fingerprint` is what the order depends on.
        """
        with self._lock:
            first, _ = self._window_at(i * self.packs_per_step)
            state = self._states[first]
        return {"step": i, "epoch": state[longest(self.data)].epoch, "position": i * self.packs_per_step - first,
                "sources": [list(s) for s in state], "fingerprint": self.fingerprint}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Go on where a saved cursor stands. Raises ValueError, naming what differs, if data or options are others."""
        theirs, ours = dict(cursor["fingerprint"]), self.fingerprint
        changed = [f"{k} ({theirs.get(k, 'none')} then, {ours.get(k, 'none')} now)" for k in {**theirs, **ours}
                   if theirs.get(k) != ours.get(k)]
        if changed:
            raise ValueError(f"the order of the data is not that of the run to resume: changed {'; '.join(changed)}. "
                             "Go on with what it was, or start from that run's parameters in a new directory")
        first = cursor["step"] * self.packs_per_step - cursor["position"]
        with self._lock:
            self._note(first, tuple(Progress(*s) for s in cursor["sources"]))

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the order of the data depends on, by name: options, and each source's data, tokenizer, template."""
        options = {k: str(getattr(self, k))
                   for k in ("seq_len", "packs_per_step", "seed", "max_documents", "window", "group_by_length")}
        for source in self.data:
            tail = f" of {source.name}" if len(self.data) > 1 else ""
            options |= {k + tail: v for k, v in source.data.fingerprint.items()}
            options |= {"weight" + tail: f"{source.weight:g}"} if tail else {}
        return options

    def efficiency(self, epoch: int = 0) -> float:
        """The fraction of an epoch's positions that are not padding. It packs all of the epoch."""
        main, at, tokens, packs = longest(self.data), 0, 0, 0
        while True:
            with self._lock:
                first, packed = self._window_at(at)
            here = self._states[first][main].epoch
            if here > epoch:
                return tokens / (packs * self.seq_len)
            if here == epoch:
                tokens, packs = tokens + int(packed.window.length.sum()), packs + len(packed.packs)
            at = first + len(packed.packs)

    def _packs(self, i: int) -> list[tuple[Window, list[int]]]:
        """Step i's packs, dearest first."""
        out: list[tuple[Window, list[int]]] = []
        at, end = i * self.packs_per_step, (i + 1) * self.packs_per_step
        while at < end:
            with self._lock:
                first, packed = self._window_at(at)
            taken = packed.packs[at - first:end - first]
            out += [(packed.window, places) for places in taken]
            at += len(taken)
        return sorted(out, key=lambda p: -self._cost(*p))

    def _cost(self, window: Window, places: list[int]) -> int:
        lengths = window.length[places]
        # padding is attended to as a document is
        return int((lengths ** 2).sum()) + (self.seq_len - int(lengths.sum())) ** 2

    def _window_at(self, index: int) -> tuple[int, _Packed]:
        """The window that holds a pack of the endless row, and the number of its first pack."""
        first = self._firsts[bisect_right(self._firsts, index) - 1]
        while index >= (end := first + len((packed := self._packed(first)).packs)):
            self._note(end, packed.window.after)
            first = end
        return first, packed

    def _note(self, first: int, state: tuple[Progress, ...]) -> None:
        if first not in self._states:
            insort(self._firsts, first)
        self._states[first] = state

    def _packed(self, first: int) -> _Packed:
        if first not in self._recent:
            state = self._states[first]
            window = draw(self.data, state, self.seed, self.window)
            packs = best_fit(window.length.tolist(), self.seq_len, self.max_documents)
            main = state[longest(self.data)]
            rng = np.random.default_rng([self.seed, main.epoch, main.position])
            packs = [packs[p] for p in rng.permutation(len(packs))]
            if self.group_by_length:
                packs = self._grouped(packs, window, -first % self.packs_per_step, rng)
            self._recent[first] = _Packed(window, packs)
            for old in list(self._recent)[:-4]:  # the thread that is ahead and the one that logs may each look at two
                del self._recent[old]
        return self._recent[first]

    def _grouped(self, packs: list[list[int]], window: Window, head: int, rng: np.random.Generator) -> list[list[int]]:
        """Packs of like cost in steps, in random order; the first `head` finish a step, the last begin another."""
        n = self.packs_per_step
        if len(packs) < head + n:
            return packs
        steps = (len(packs) - head) // n
        loose = len(packs) - steps * n
        ordered = sorted(packs[loose:], key=lambda p: self._cost(window, p))
        grouped = [p for s in rng.permutation(steps) for p in ordered[s * n:(s + 1) * n]]
        return packs[:head] + grouped + packs[head:loose]


def eval_batches(samples: Any, seq_len: int, packs_per_batch: int = 1, mesh: DeviceMesh | None = None, *,
                 max_documents: int | None = None, window: int = WINDOW[1]) -> Iterator[Batch]:
    """Every sample once, in batches of `packs_per_batch` packs, of which this rank gets its share; padded at the end.

    `samples` as for `Loader`, weights aside. Sums over the batches (loss * mask, mask) do not depend on the mesh.

    >>> samples = [Sample([1, 2, 3], [1, 1, 1])] * 3
    >>> [b.loss_mask.sum().item() for b in eval_batches(samples, seq_len=4, packs_per_batch=2)]
    [4.0, 2.0]
    """
    max_documents = max_documents or default_max_documents(seq_len)
    rows, columns = share(packs_per_batch, seq_len, mesh)

    def packs() -> Iterator[list[tuple[Any, int, int]]]:
        for _, data, _ in sources_of(samples, seq_len):
            for at in range(0, len(data), window):
                start, length = (x.tolist() for x in data.spans(np.arange(at, min(at + window, len(data)))))
                yield from ([(data, start[k], length[k]) for k in p] for p in best_fit(length, seq_len, max_documents))
    all_packs = packs()
    while batch := list(itertools.islice(all_packs, packs_per_batch)):
        batch += [[] for _ in range(packs_per_batch - len(batch))]
        shape = _bounds([[length for *_, length in p] for p in batch], seq_len, max_documents)
        mine = [[data.read(start, length) for data, start, length in p] for p in batch[rows]]
        yield cut_positions(pack_rows(mine, seq_len, *shape), columns)


def split_off(samples: Any, fraction: float, seed: int = 0) -> tuple[Any, Any]:
    """(the rest, about `fraction` of the samples held out), drawn by seed; a conversation's samples stay together.

    Lists of samples give lists, a `Dataset` gives two that read the same cache.

    Raises ValueError if fraction is not in [0, 1) or nothing would be left on one side.

    >>> rest, held_out = split_off([Sample([i, i], [1, 1]) for i in range(10)], 0.2)
    >>> len(rest), len(held_out)
    (8, 2)
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} to hold out is not in [0, 1)")
    groups = [] if isinstance(samples, Dataset) else [s.source if s.source >= 0 else ~i for i, s in enumerate(samples)]
    names = list(dict.fromkeys(groups))
    total = samples.num_records if isinstance(samples, Dataset) else len(names)
    count = max(1, round(fraction * total)) if fraction else 0
    if count and count >= total:
        raise ValueError(f"holding out {fraction} of {total} conversations leaves none to train on")
    if isinstance(samples, Dataset):
        return samples.split(count, seed)
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    return ([s for s, g in zip(samples, groups, strict=True) if g not in chosen],
            [s for s, g in zip(samples, groups, strict=True) if g in chosen])
