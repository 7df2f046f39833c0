"""The batch: packs of documents as one pytree, and the part of a batch that belongs to one rank.

P: packs, T: positions of a pack, S: documents of a pack (static), n: tokens of one sample.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import tree
from xtf.layout import PACK_AXES

POSITION_AXIS = "sp"                   # ranks that differ in this one hold other positions of the same packs


class Sample(NamedTuple):
    """One document: `ids` int64 [n], and `mask` [n], the weight of the loss on predicting ids[i] from what is before it.

    `mask[0]` is never read, since nothing predicts the first token. `source` numbers the conversation that the sample is from (-1: none).
    """
    ids: Any
    mask: Any
    source: int = -1


@tree.dataclass_tree
class Batch:
    """Packs of T positions, each filled with documents and then with padding, which is a document of its own.

    input_ids [P,T] int64. labels [P,T] int64, already shifted: labels[t] is the token after t (0 where the document ends).
    loss_mask [P,T] float32, 0 at each document's last position. positions [P,T] int64, restarting in each document.
    segments [P,S+1] int32: cumulative document lengths from 0 to T, then T repeated.

    On a rank of a mesh with `sp` (`cut`), labels and loss_mask hold that rank's positions only.
    """
    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor


def pack(samples: Sequence[Sample], seq_len: int, max_documents: int) -> Batch:
    """One pack (P = 1) of `seq_len` positions from samples that fit into it together; no samples at all make a pack of padding.

    `max_documents` is the static S; padding counts as one document. A sample may be any pair (ids, mask) that torch can read.

    Raises ValueError if the samples are too long or too many, or if one is empty or has a mask of another length.

    >>> batch = pack([Sample([5, 6, 7], [0, 0, 1]), Sample([8, 9], [0, 1])], seq_len=6, max_documents=4)
    >>> batch.labels.tolist(), batch.loss_mask.tolist()
    ([[6, 7, 0, 9, 0, 0]], [[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    >>> batch.positions.tolist(), batch.segments.tolist()
    ([[0, 1, 2, 0, 1, 0]], [[0, 3, 5, 6, 6]])
    """
    ids = [torch.as_tensor(s[0], dtype=torch.int64) for s in samples]
    masks = [torch.as_tensor(s[1], dtype=torch.float32) for s in samples]
    for i, (x, m) in enumerate(zip(ids, masks, strict=True)):
        if x.ndim != 1 or x.shape != m.shape or len(x) == 0:
            raise ValueError(f"sample {i} of this pack has ids of shape {tuple(x.shape)} and a mask of shape {tuple(m.shape)}: "
                             "both have to be [n] with n of at least 1")
    lengths = [len(x) for x in ids]
    padding = seq_len - sum(lengths)
    if padding < 0:
        raise ValueError(f"samples of {lengths} tokens do not fit into a pack of seq_len={seq_len}: truncate or pack them with best_fit")
    lengths += [padding] if padding else []
    if len(lengths) > max_documents:
        raise ValueError(f"{len(samples)} samples{' and padding' if padding else ''} exceed max_documents={max_documents}: raise it")

    input_ids = torch.zeros(seq_len, dtype=torch.int64)
    labels, loss_mask, positions = input_ids.clone(), torch.zeros(seq_len), torch.arange(seq_len)
    segments = torch.full((max_documents + 1,), seq_len, dtype=torch.int32)
    start = 0
    for i, n in enumerate(lengths):
        segments[i] = start
        positions[start:start + n] -= start
        if i < len(ids):
            input_ids[start:start + n] = ids[i]
            labels[start:start + n - 1] = ids[i][1:]
            loss_mask[start:start + n - 1] = masks[i][1:]
        start += n
    return Batch(*(x[None] for x in (input_ids, labels, loss_mask, positions, segments)))


def stack(packs: Sequence[Batch]) -> Batch:
    """Batches of equal T and S as one, their packs one after the other.

    >>> one = pack([Sample([5, 6], [0, 1])], seq_len=4, max_documents=2)
    >>> stack([one, one, one]).segments.shape
    torch.Size([3, 3])
    """
    return tree.tree_map(lambda *xs: torch.cat(xs), packs[0], *packs[1:])


def cut(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """What this rank's loader would give of a whole global batch.

    Packs are divided over the mesh's `replicate`, `dp` and `ep` axes (in that order, row-major); labels and loss_mask, which the
    loss reads, over `sp` along positions. Other axes divide nothing: their ranks hold the same. `mesh=None` is one process.

    Raises ValueError if the packs or the positions do not divide.

    >>> batch = pack([Sample([5, 6], [0, 1])], seq_len=4, max_documents=2)
    >>> cut(batch, None) is batch
    True
    """
    if mesh is None:
        return batch
    rows, columns = share(len(batch.input_ids), batch.input_ids.shape[1], mesh)
    return cut_positions(tree.tree_map(lambda x: x[rows], batch), columns)


def cut_positions(batch: Batch, columns: slice) -> Batch:
    """The batch with what the loss reads cut to `columns`; the model reads the rest whole and splits it itself."""
    return replace(batch, labels=batch.labels[:, columns].contiguous(), loss_mask=batch.loss_mask[:, columns].contiguous())


def share(num_packs: int, seq_len: int, mesh: DeviceMesh | None) -> tuple[slice, slice]:
    """This rank's packs out of `num_packs` and its positions out of `seq_len`.

    Raises ValueError, naming the axes, if either does not divide, or if this rank is not in the mesh.

    >>> share(8, 128, None)
    (slice(0, 8, None), slice(0, 128, None))
    """
    if mesh is None:
        return slice(0, num_packs), slice(0, seq_len)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not in the mesh {mesh}: it has no part of the batch")
    place = dict(zip(mesh.mesh_dim_names or (), zip(mesh.shape, coordinate, strict=True), strict=False))

    def part(total: int, what: str, axes: Sequence[str]) -> slice:
        ranks, index = 1, 0
        for axis in axes:
            size, at = place.get(axis, (1, 0))
            ranks, index = ranks * size, index * size + at
        if total % ranks:
            sizes = ", ".join(f"{axis}={place[axis][0]}" for axis in axes if axis in place)
            raise ValueError(f"{total} {what} do not divide over the {ranks} ranks of {sizes}: make {what} a multiple of {ranks}")
        return slice(index * (total // ranks), (index + 1) * (total // ranks))

    return part(num_packs, "packs", PACK_AXES), part(seq_len, "positions", (POSITION_AXIS,))
