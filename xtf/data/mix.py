"""The endless row of samples that training takes: each source reshuffled every epoch, several mixed by their shares.

How far each source has come is all that there is to know: the next window of samples follows from it and the seed, so
that a cursor resumes without going through what was taken. No mesh appears, and no list of all samples.

K: samples of a window, S: sources.
"""
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SMALL = 1 << 16                        # samples of which a shuffle is drawn whole


class Source(NamedTuple):
    """Samples to be mixed: `data` is a `Dataset` or a list of `Sample`, `weight` its relative share of the tokens."""
    name: str
    data: Any
    weight: float = 1.0


class Progress(NamedTuple):
    """How far one source has come: whole passes, samples of the present one, tokens in all."""
    epoch: int = 0
    position: int = 0
    tokens: int = 0


class Window(NamedTuple):
    """Samples that follow each other: the source of each, its `start` and `length` (int64 [K]); where it leaves off."""
    source: np.ndarray
    start: np.ndarray
    length: np.ndarray
    after: tuple[Progress, ...]


def permuted(indices: np.ndarray, n: int, *key: int) -> np.ndarray:
    """What stands at `indices` (int64) of a shuffle of range(n) drawn by `key`, in memory that does not depend on n.

    Up to 65,536 numpy's shuffle. Beyond, a Feistel network of 8 rounds, whose function is splitmix64's (Steele et al.,
    "Fast splittable pseudorandom number generators", 2014), over the next even number of bits; a result of n or more is
    sent through again until it is below ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002).

    >>> sorted(permuted(np.arange(5), 5, 7).tolist())
    [0, 1, 2, 3, 4]
    """
    rng = np.random.default_rng(key)
    if n <= SMALL:
        return rng.permutation(n)[indices]
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = rng.integers(1 << 63, size=8, dtype=np.uint64)
    x, todo = np.asarray(indices).astype(np.uint64), np.arange(len(indices))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for r in rounds:
            left, right = right, left ^ (_mixed(right + r) & mask)
        x[todo] = left << half | right
        todo = todo[x[todo] >= np.uint64(n)]
    return x.astype(np.int64)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def longest(sources: Sequence[Source]) -> int:
    """The source whose pass lasts longest at its share of the tokens: its passes are the mixture's epochs."""
    return max(range(len(sources)), key=lambda s: sources[s].data.tokens / sources[s].weight)


def draw(sources: Sequence[Source], at: Sequence[Progress], seed: int, window: int) -> Window:
    """The next samples, at most `window`, and none beyond the end of an epoch.

    Each comes from the source furthest behind its share: the one with the fewest tokens taken for its weight (the first
    of equals). That order is a merge of the sources' own, each sample keyed by what its source has given before it.
    """
    key, which, start, length = [], [], [], []
    main, last = longest(sources), -1
    for s, (source, done) in enumerate(zip(sources, at, strict=True)):
        n = len(source.data)
        count = min(window, n - done.position) if s == main else window
        if s == main and done.position + count == n:
            last = sum(map(len, key)) + count - 1                    # the epoch's last sample, among the candidates
        epoch, place = np.divmod(done.position + np.arange(count), n)
        order = np.concatenate([permuted(place[epoch == e], n, seed, s, done.epoch + int(e)) for e in np.unique(epoch)])
        spans = source.data.spans(order)
        start.append(spans[0])
        length.append(spans[1])
        which.append(np.full(count, s))
        key.append((done.tokens + np.cumsum(spans[1]) - spans[1]) / source.weight)
    chosen = np.argsort(np.concatenate(key), kind="stable")[:window]
    end = np.flatnonzero(chosen == last)
    chosen = chosen[:end[0] + 1] if len(end) else chosen
    which, start, length = (np.concatenate(x)[chosen] for x in (which, start, length))
    after = []
    for s, (source, done) in enumerate(zip(sources, at, strict=True)):
        epochs, position = divmod(done.position + int((which == s).sum()), len(source.data))
        after.append(Progress(done.epoch + epochs, position, done.tokens + int(length[which == s].sum())))
    return Window(which, start, length, tuple(after))
