"""The batch: packs of documents as one pytree, and the part of a batch that belongs to one rank.

P: packs, T: positions of a pack, S: documents that a pack has room for, n: tokens of one sample.
"""
from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import tree
from xtf.kernels import functorch_active, is_fake
from xtf.layout import PACK_AXES
from xtf.ops import LOCAL, Ops

POSITION_AXIS = "sp"                   # ranks that differ in this one hold other positions of the same packs


class Sample(NamedTuple):
    """One document: `ids` int64 [n], and `mask` [n], the weight of the loss on predicting ids[i] from those before.

    `mask[0]` is never read, since nothing predicts the first token. `source` numbers the conversation that the sample
    is from (-1: none).
    """
    ids: Any
    mask: Any
    source: int = -1


@tree.dataclass_tree
class Batch:
    """Packs of T positions, each filled with documents and then with padding, which is a document of its own.

    input_ids [P,T] int64. labels [P,T] int64, already shifted: labels[t] is the token after t (0 where the document
        ends).
    loss_mask [P,T] float32, 0 at each document's last position. positions [P,T] int64, restarting in each document.
    segments [P,S+1] int32: cumulative document lengths from 0 to T, then T repeated.
    longest: no document, padding among them, has more positions; None: T. It is a number that the host knows, so that
        attention on CUDA need not wait for the device to learn it: `segments` tells it as `segments.longest`. As a
        static field it goes along through `tree_map`; it belongs to `segments`, so give both anew or neither.
    lengths [P] int64: how many of a pack's positions are text; what follows is padding, which experts never see. By
        default all are.

    On a rank of a mesh with `sp` (`cut`), labels and loss_mask hold that rank's positions only.
    """
    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    lengths: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    longest: int | None = field(default=None, metadata={"static": True})

    def __post_init__(self):
        if self.longest is not None and isinstance(self.segments, torch.Tensor):
            _tell(self.segments, self.longest)
        if self.lengths is None and isinstance(self.input_ids, torch.Tensor):
            P, T = self.input_ids.shape
            object.__setattr__(self, "lengths", torch.full((P,), T, device=self.input_ids.device))

    def loss_tokens(self, ops: Ops = LOCAL) -> torch.Tensor:
        """The sum of `loss_mask` over the whole global batch, or 1 where it is 0: what a step divides its shares by.

        Weights may be fractions, and sum to less than 1; only 0 / 0 is to be kept out of the parameters.

        >>> batch = pack([Sample([5, 6, 7], [0, 0.25, 0.125])], seq_len=3, max_documents=1)
        >>> batch.loss_tokens().item(), pack([], seq_len=3, max_documents=1).loss_tokens().item()
        (0.375, 1.0)
        """
        total = ops.total(self.loss_mask.sum())
        return torch.where(total == 0, 1, total)


def _tell(segments: torch.Tensor, longest: int) -> None:
    """Let the tensor say how long its documents are, if they are: a kernel would leave out what is beyond.

    Raises ValueError on the CPU; on CUDA, which is not waited for, its own assertion does.
    """
    if not (is_fake(segments) or functorch_active()) and segments.device.type in ("cpu", "cuda"):
        fits = (segments.diff(dim=1) <= longest).all()
        if segments.is_cuda:
            torch._assert_async(fits, f"Batch: a document is longer than longest={longest}")
        elif not fits:
            raise ValueError(f"Batch: a document has {int(segments.diff(dim=1).max())} positions, but longest is "
                             f"{longest}; give both anew")
    segments.longest = longest  # type: ignore[attr-defined]  # torch.compile guards it, views and copies are told anew


def room(documents: int, most: int | None = None) -> int:
    """S for packs of so many documents: the next power of two, so that shapes are few (each is compiled once more); at
    least 16, below which nothing is saved; no more than `most`.

    >>> room(3), room(65), room(65, most=100)
    (16, 128, 100)
    """
    wanted = max(16, next_power_of_two(documents))
    return wanted if most is None else min(wanted, most)


def next_power_of_two(n: int) -> int:
    """
    >>> [next_power_of_two(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (n - 1).bit_length()


def pack(samples: Sequence[Sample], seq_len: int, max_documents: int) -> Batch:
    """One pack (P = 1) of `seq_len` positions from samples that fit into it together; of no samples, all padding.

    `max_documents` is S; padding counts as one document. A sample may be any pair (ids, mask) that numpy can
    read.

    Raises ValueError if the samples are too long or too many, or if one is empty or has a mask of another length.

    >>> batch = pack([Sample([5, 6, 7], [0, 0, 1]), Sample([8, 9], [0, 1])], seq_len=6, max_documents=4)
    >>> batch.labels.tolist(), batch.loss_mask.tolist()
    ([[6, 7, 0, 9, 0, 0]], [[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    >>> batch.positions.tolist(), batch.segments.tolist()
    ([[0, 1, 2, 0, 1, 0]], [[0, 3, 5, 6, 6]])
    """
    return pack_rows([samples], seq_len, max_documents)


def pack_rows(rows: Sequence[Sequence[Sample]], seq_len: int, max_documents: int, longest: int | None = None) -> Batch:
    """`pack` for several packs at once: P = len(rows). `longest` as `Batch` has it; by default it is looked up.

    >>> pack_rows([[Sample([5, 6], [0, 1])], []], seq_len=3, max_documents=2).input_ids.tolist()
    [[5, 6, 0], [0, 0, 0]]
    """
    shape = len(rows), seq_len
    input_ids, labels, loss_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    positions = np.tile(np.arange(seq_len), (len(rows), 1))
    segments = np.full((len(rows), max_documents + 1), seq_len, np.int32)
    lengths = np.zeros(len(rows), np.int64)
    for row, samples in enumerate(rows):
        start = 0
        for i, (ids, mask, *_) in enumerate(samples):
            ids, mask = np.asarray(ids), np.asarray(mask)
            if ids.ndim != 1 or ids.shape != mask.shape or len(ids) == 0:
                raise ValueError(f"sample {i} of this pack has ids of shape {ids.shape} and a mask of shape "
                                 f"{mask.shape}: both have to be [n] with n of at least 1")
            end = start + len(ids)
            if end > seq_len:
                raise ValueError(f"samples of {[len(s[0]) for s in samples]} tokens do not fit into a pack of "
                                 f"seq_len={seq_len}: truncate or pack them with best_fit")
            if i + (end < seq_len) >= max_documents:
                raise ValueError(f"{len(samples)} samples{' and padding' if end < seq_len else ''} exceed "
                                 f"max_documents={max_documents}: raise it")
            segments[row, i] = start
            positions[row, start:end] -= start
            input_ids[row, start:end] = ids
            labels[row, start:end - 1] = ids[1:]
            loss_mask[row, start:end - 1] = mask[1:]
            start = end
        lengths[row] = start
        if start < seq_len:                                          # padding is a document too
            segments[row, len(samples)] = start
            positions[row, start:] -= start
    if longest is None:
        longest = min(seq_len, next_power_of_two(int(np.diff(segments).max(initial=1))))
    tensors = map(torch.from_numpy, (input_ids, labels, loss_mask, positions, segments, lengths))
    return Batch(*tensors, longest=longest)  # pyright: ignore[reportCallIssue]


def stack(packs: Sequence[Batch]) -> Batch:
    """Batches of equal T and S as one, their packs one after the other.

    >>> one = pack([Sample([5, 6], [0, 1])], seq_len=4, max_documents=2)
    >>> stack([one, one, one]).segments.shape
    torch.Size([3, 3])
    """
    bounds = [batch.longest for batch in packs]
    longest = None if None in bounds else max(bounds)  # pyright: ignore[reportArgumentType]
    alike = [replace(batch, longest=longest) for batch in packs]
    return tree.tree_map(lambda *xs: torch.cat(xs), *alike)


def cut(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """What this rank's loader would give of a whole global batch.

    Packs are dealt to the ranks of `replicate`, `dp` and `ep` (in that order, row-major) as cards are: of R ranks, rank
    r holds packs r, r + R, r + 2R... (`share` says why). Labels and loss_mask, which the loss reads, are divided over
    `sp` along positions. Other axes divide nothing: their ranks hold the same. `mesh=None` is one process.

    Raises ValueError if the packs or the positions do not divide.

    >>> batch = pack([Sample([5, 6], [0, 1])], seq_len=4, max_documents=2)
    >>> cut(batch, None) is batch
    True
    """
    if mesh is None:
        return batch
    rows, columns = share(len(batch.input_ids), batch.input_ids.shape[1], mesh)
    return cut_positions(tree.tree_map(lambda x: x[rows].contiguous(), batch), columns)


def cut_positions(batch: Batch, columns: slice) -> Batch:
    """The batch with what the loss reads cut to `columns`; the model reads the rest whole and splits it itself."""
    return replace(batch, labels=batch.labels[:, columns].contiguous(),
                   loss_mask=batch.loss_mask[:, columns].contiguous())


def share(num_packs: int, seq_len: int, mesh: DeviceMesh | None) -> tuple[slice, slice]:
    """This rank's packs out of `num_packs` (every R-th, from its own number on), its stretch of `seq_len` positions.

    The loader sorts a step's packs by cost, so packs dealt in turn cost all ranks the same at each micro-batch, and
    none waits for another.

    Raises ValueError, naming the axes, if either does not divide, or if this rank is not in the mesh.

    >>> share(8, 128, None)
    (slice(0, 8, 1), slice(0, 128, None))
    """
    if mesh is None:
        return slice(0, num_packs, 1), slice(0, seq_len)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not in the mesh {mesh}: it has no part of the batch")
    place = dict(zip(mesh.mesh_dim_names or (), zip(mesh.shape, coordinate, strict=True), strict=False))

    def place_in(total: int, what: str, axes: Sequence[str]) -> tuple[int, int]:
        ranks, index = 1, 0
        for axis in axes:
            size, at = place.get(axis, (1, 0))
            ranks, index = ranks * size, index * size + at
        if total % ranks:
            sizes = ", ".join(f"{axis}={place[axis][0]}" for axis in axes if axis in place)
            raise ValueError(f"{total} {what} do not divide over the {ranks} ranks of {sizes}: make {what} a multiple "
                             f"of {ranks}")
        return index, ranks

    row, rows = place_in(num_packs, "packs", PACK_AXES)
    column, columns = place_in(seq_len, "positions", (POSITION_AXIS,))
    width = seq_len // columns
    return slice(row, num_packs, rows), slice(column * width, (column + 1) * width)
