"""Sums of gradients over the axes along which a leaf is whole (`replicate` under HSDP, every axis without fsdp).

They wait for the last micro-batch, and travel in buckets of a fixed order: a bucket starts during the last backward, as
soon as the gradients of its leaves are final and the bucket before it has started. Ranks whose backward runs in another
order still send the same messages in the same order. A bucket is the gradients themselves, moved into one flat buffer:
beside one copy of all gradients there is room for the bucket that is being moved.

Gradients of leaves that are stored in parts are summed elsewhere: by the reduce-scatters of `Gather.backward` in
xtf/parallel/_fsdp.py. xtf/_shard.py puts the two together.

Bytes of one step, at any number of micro-batches: 2 (W - 1) / W × the bytes of the leaves' gradients, from each rank.
"""
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from xtf import tree
from xtf.parallel import _mesh as M
from xtf.parallel import collectives as C

BUCKET = 32 << 20                              # bytes of a bucket; larger leaves have one of their own


@dataclass
class Bucket:
    """Leaves whose gradients are summed in one message, by their number; `missing` of them are not final yet."""
    axes: tuple[str, ...]
    members: list[int]
    missing: int
    nbytes: int


class Sums:
    """The sums of one layout. `watch`, then a backward pass that calls `ready`, then `finish`."""

    def __init__(self, layout: tree.Tree, mesh: Any):
        self.places, self.mesh = tree.leaves(layout), mesh
        for axes in dict.fromkeys(place.sums for place in self.places if place.sums):
            M.group(mesh, *axes, use="gradients")                # making groups is a collective: here, in one order
        self.any = any(place.sums for place in self.places)
        # by leaf, not by its address: a later leaf's may be that of one that never came back, and on one rank alone
        self.uses: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()
        self._forget()

    def _forget(self) -> None:
        self.leaves: list[torch.Tensor] = []
        self.waiting: list[Bucket] = []
        self.bucket_of: dict[int, Bucket] = {}
        self.sent: dict[int, torch.Tensor] = {}
        self.works: list[Any] = []

    def used(self, leaf: torch.Tensor) -> None:
        """The forward pass gathers this leaf: one more part of its gradient is to come."""
        if self.any:
            self.uses[leaf] = self.uses.get(leaf, 0) + 1

    def added(self, leaf: torch.Tensor) -> None:
        """A part of a gathered leaf's gradient was added; the leaf is ready when all are."""
        if self.any:
            self.uses[leaf] -= 1
            if self.uses[leaf] == 0:
                self.ready(leaf)

    def watch(self, leaves: list[torch.Tensor]) -> None:
        """The last backward pass of a step begins: cut these leaves into buckets, the last leaf first, as it comes."""
        self._forget()
        if len(leaves) != len(self.places):
            raise ValueError(f"value_and_grad: {len(leaves)} parameters were passed, the layout has "
                             f"{len(self.places)}; differentiate the whole tree (freeze leaves in the specs instead)")
        self.leaves = leaves
        filling: dict[tuple, Bucket] = {}
        for i, (x, place) in reversed(list(enumerate(zip(leaves, self.places, strict=True)))):
            if not (place.sums and x.requires_grad):
                continue
            bucket = filling.get((place.sums, x.dtype))
            if bucket is None or bucket.nbytes + x.nbytes > BUCKET:
                bucket = filling[place.sums, x.dtype] = Bucket(place.sums, [], 0, 0)
                self.waiting.append(bucket)
            bucket.members.append(i)
            bucket.missing, bucket.nbytes = bucket.missing + 1, bucket.nbytes + x.nbytes
            self.bucket_of[id(x)] = bucket
            if x not in self.uses:                               # those that fsdp gathers come through `added`
                x.register_post_accumulate_grad_hook(self.ready)

    def ready(self, leaf: torch.Tensor) -> None:
        """A leaf's gradient is final on this rank: send what is complete and next."""
        bucket = self.bucket_of.pop(id(leaf), None)
        if bucket is not None:
            bucket.missing -= 1
            while self.waiting and not self.waiting[0].missing:
                self._send(self.waiting.pop(0))

    def _send(self, bucket: Bucket) -> None:
        members = [self.leaves[i] for i in bucket.members]
        with torch.no_grad():
            flat = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).reshape(-1) for x in members])
        for i, x, part in zip(bucket.members, members, flat.split([x.numel() for x in members]), strict=True):
            x.grad = self.sent[i] = part.view(x.shape)
        self.works.append((C.sum_start(flat, M.group(self.mesh, *bucket.axes, use="gradients")), flat))

    def finish(self, grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Send what is left, and wait. `grads` are those of the leaves; raises RuntimeError where somebody replaced one
        that is already under way."""
        for i, part in self.sent.items():
            if grads[i] is not part:
                raise RuntimeError(f"value_and_grad: a transform's `collect` replaced the gradient of leaf {i}, which "
                                   "is already being summed over ranks; change what `ops.collect` returns instead")
        for bucket in self.waiting:
            for i in bucket.members:
                self.leaves[i].grad = grads[i]
            self._send(bucket)
        for work, _ in self.works:
            work.wait()
        grads = [self.sent.get(i, g) for i, g in enumerate(grads)]
        for g, place in zip(grads, self.places, strict=True):
            if g is not None and place.copies > 1:
                g.div_(place.copies)                             # a reduce-scatter's output: nobody else's memory
        self._forget()
        return grads
