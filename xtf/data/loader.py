"""The order of training data: a pure function of (samples, seed, epoch), in which no mesh appears.

Each epoch permutes the samples, packs windows of that order, and shuffles each window's packs (best-fit puts the longest samples first).
Steps take packs off the endless row of epochs; a rank materialises its own share of them only.
"""
from collections.abc import Iterator, Sequence

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from xtf.data.batch import Batch, Sample, cut_positions, pack, share, stack
from xtf.data.packing import best_fit, efficiency


def default_max_documents(seq_len: int) -> int:
    """The static number of documents of a pack when nobody says otherwise: room for samples of 16 tokens on average, and for 16 at least."""
    return max(16, seq_len // 16)


def epoch_packs(lengths: Sequence[int], seq_len: int, max_documents: int, seed: int, epoch: int, window: int = 4096) -> Iterator[list[int]]:
    """The packs of one epoch as lists of sample indices: each sample exactly once, in an order drawn from (seed, epoch).

    No more than `window` samples are looked at ahead.

    >>> sorted(i for p in epoch_packs([3, 6, 2, 5], 8, 4, seed=0, epoch=1) for i in p)
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), window):
        ahead = order[start:start + window]
        packs = best_fit([int(lengths[i]) for i in ahead], seq_len, max_documents)
        for p in rng.permutation(len(packs)):
            yield [int(ahead[i]) for i in packs[p]]


class Loader:
    """Endless batches of `packs_per_step` packs (over all ranks), reshuffled each epoch; the same global batches on any mesh.

    `step(i, mesh)` is a function of i: it may be asked for in any order, cheapest in ascending. `max_documents` is the static S of `Batch`.

    Raises ValueError if there is no sample, a sample is longer than seq_len, or `packs_per_step` is below 1.

    >>> loader = Loader([Sample([1, 2, 3], [1, 1, 1])], seq_len=8, packs_per_step=2)
    >>> loader.step(0).input_ids.tolist()
    [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    >>> loader.cursor(1)
    {'step': 1, 'epoch': 2, 'position': 0}
    """

    def __init__(self, samples: Sequence[Sample], seq_len: int, packs_per_step: int, seed: int = 0, *,
                 max_documents: int | None = None, window: int = 4096):
        if not samples:
            raise ValueError("no samples to train on: every line was empty, skipped or without a token that carries loss")
        if packs_per_step < 1:
            raise ValueError(f"packs_per_step={packs_per_step}: a step takes at least one pack (batch tokens below seq_len={seq_len}?)")
        self.samples, self.seq_len, self.packs_per_step, self.seed, self.window = samples, seq_len, packs_per_step, seed, window
        self.max_documents = max_documents or default_max_documents(seq_len)
        self.lengths = [len(s.ids) for s in samples]
        self._epochs: dict[int, list[list[int]]] = {}  # the packs of the last two epochs asked for
        self._starts = {0: 0}                          # epoch -> where its first pack is in the row of all epochs' packs, as far as known
        self._packs(0)

    def step(self, i: int, mesh: DeviceMesh | None = None) -> Batch:
        """This rank's part of step i's global batch: equal to `cut(step(i), mesh)`. Raises ValueError where `cut` does."""
        rows, columns = share(self.packs_per_step, self.seq_len, mesh)
        packs = [self._pack(i * self.packs_per_step + p) for p in range(rows.start, rows.stop)]
        return cut_positions(stack(packs), columns)

    def documents(self, i: int) -> list[int]:
        """The lengths of the samples in step i's global batch: what throughput and FLOPs are counted from, padding left out."""
        places = (self._locate(i * self.packs_per_step + p) for p in range(self.packs_per_step))
        return [self.lengths[s] for epoch, position in places for s in self._packs(epoch)[position]]

    def cursor(self, i: int) -> dict[str, int]:
        """Where step i begins, as plain ints for a checkpoint: `seek` goes on from there without packing the epochs before."""
        epoch, position = self._locate(i * self.packs_per_step)
        return {"step": i, "epoch": epoch, "position": position}

    def seek(self, cursor: dict[str, int]) -> None:
        """Take a saved cursor's word for which epoch its step lies in. Raises ValueError if that epoch has no such pack."""
        if not 0 <= cursor["position"] < len(self._packs(cursor["epoch"])):
            raise ValueError(f"cursor {cursor} points past epoch {cursor['epoch']}'s {len(self._packs(cursor['epoch']))} packs: "
                             "it was saved with other data, seq_len or max_documents")
        self._starts = {0: 0, cursor["epoch"]: cursor["step"] * self.packs_per_step - cursor["position"]}

    def efficiency(self, epoch: int = 0) -> float:
        """The fraction of an epoch's positions that are not padding."""
        return efficiency(self._packs(epoch), self.lengths, self.seq_len)

    def _packs(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            packs = list(epoch_packs(self.lengths, self.seq_len, self.max_documents, self.seed, epoch, self.window))
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: packs}
        return self._epochs[epoch]

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch and the position in it of a pack of the endless row."""
        epoch = max(e for e, first in self._starts.items() if first <= index)
        while index >= (end := self._starts[epoch] + len(self._packs(epoch))):
            epoch += 1
            self._starts[epoch] = end
        return epoch, index - self._starts[epoch]

    def _pack(self, index: int) -> Batch:
        epoch, position = self._locate(index)
        return pack([self.samples[i] for i in self._packs(epoch)[position]], self.seq_len, self.max_documents)


def eval_batches(samples: Sequence[Sample], seq_len: int, packs_per_batch: int = 1, mesh: DeviceMesh | None = None, *,
                 max_documents: int | None = None) -> Iterator[Batch]:
    """Every sample exactly once, in batches of `packs_per_batch` packs of which this rank gets its share; the last filled with packs of padding.

    Sums over the batches (loss * mask, mask) do not depend on the mesh.

    >>> [b.loss_mask.sum().item() for b in eval_batches([Sample([1, 2, 3], [1, 1, 1])] * 3, seq_len=4, packs_per_batch=2)]
    [4.0, 2.0]
    """
    max_documents = max_documents or default_max_documents(seq_len)
    packs = best_fit([len(s.ids) for s in samples], seq_len, max_documents)
    rows, columns = share(packs_per_batch, seq_len, mesh)
    for start in range(0, len(packs), packs_per_batch):
        mine = [packs[p] if p < len(packs) else [] for p in range(start + rows.start, start + rows.stop)]
        yield cut_positions(stack([pack([samples[i] for i in p], seq_len, max_documents) for p in mine]), columns)


def split_off(samples: Sequence[Sample], fraction: float, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(the rest, about `fraction` of the samples held out), drawn by seed; all samples of one conversation fall on the same side.

    Raises ValueError if fraction is not in [0, 1) or nothing would be left on one side.

    >>> rest, held_out = split_off([Sample([i, i], [1, 1]) for i in range(10)], 0.2)
    >>> len(rest), len(held_out)
    (8, 2)
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} to hold out is not in [0, 1)")
    groups = [s.source if s.source >= 0 else ~i for i, s in enumerate(samples)]
    names = list(dict.fromkeys(groups))
    count = max(1, round(fraction * len(names))) if fraction else 0
    if count and count >= len(names):
        raise ValueError(f"holding out {fraction} of {len(names)} conversations leaves none to train on")
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    return ([s for s, g in zip(samples, groups, strict=True) if g not in chosen], [s for s, g in zip(samples, groups, strict=True) if g in chosen])
