"""The only home of raw collectives.

Collectives that stand inside blocks (`all_sum`, `all_to_all`) are custom ops with registered adjoints, so that a block
with them compiles into one graph. Those that the fsdp schedule starts and awaits by hand (`gather_start`,
`scatter_start`) return a work handle. `record()` lists every collective started within it, with its bytes.
"""
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor, Shard


class Sent(NamedTuple):
    """One collective as `record` saw it: what, over how many ranks, and the bytes that this rank sends to others.

    all_gather and reduce_scatter: (W - 1) × a shard's bytes. all_reduce: 2 (W - 1) / W × the tensor's bytes (ring).
    all_to_all: (W - 1) / W × the tensor's bytes (`exchange`: of what it sends to others).
    """
    kind: str
    ranks: int
    bytes: int
    group: str = ""                                      # the process group's name


_records: list[list[Sent]] = []
_started: list[Any] = [0, "none"]


def started() -> tuple[int, str]:
    """How many collectives this process has started, and what the last one was: what a hung run is asked for.

    >>> isinstance(started()[0], int)
    True
    """
    return _started[0], _started[1]


@contextlib.contextmanager
def record() -> Iterator[list[Sent]]:
    """Collect every collective that this process starts within the block.

    >>> with record() as sent:
    ...     pass
    >>> sent
    []
    """
    sent: list[Sent] = []
    _records.append(sent)
    try:
        yield sent
    finally:
        _records.remove(sent)


# torch 2.13 renamed both; 2.11 has the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _planned(group: dist.ProcessGroup) -> bool:
    """Whether the group is `xtf.plan`'s: its tensors have no numbers, and torch knows no coalesced calls for such."""
    return dist.get_backend(group) == "fake"


def _note(kind: str, group: dist.ProcessGroup, nbytes: int) -> None:
    _started[0], _started[1] = _started[0] + 1, f"{kind} over {group.size()} ranks, {nbytes:,} bytes from here"
    for sent in _records:
        sent.append(Sent(kind, group.size(), nbytes, group.group_name))


def _nbytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


class Group(NamedTuple):
    """The process group of some mesh axes as one, for one use (`xtf.parallel._mesh.USES`)."""
    size: int
    rank: int
    pg: dist.ProcessGroup

    @property
    def name(self) -> str:
        return self.pg.group_name


def gather_start(outs: list[torch.Tensor], parts: list[torch.Tensor], group: Group) -> Any:
    """Start all-gathers of `parts` into `outs` (each flat, W times as long) as one message; the work to wait for."""
    _note("all_gather", group.pg, (group.size - 1) * sum(map(_nbytes, parts)))
    if _planned(group.pg):
        return [_all_gather(*pair, group=group.pg, async_op=True) for pair in zip(outs, parts, strict=True)][-1]
    return group.pg.allgather_into_tensor_coalesced(outs, parts)


def scatter_start(outs: list[torch.Tensor], wholes: list[torch.Tensor], group: Group) -> Any:
    """Start reduce-scatters (sums) of `wholes` into `outs` as one message; the work to wait for."""
    _note("reduce_scatter", group.pg, (group.size - 1) * sum(map(_nbytes, outs)))
    if _planned(group.pg):
        return [_reduce_scatter(*pair, group=group.pg, async_op=True) for pair in zip(outs, wholes, strict=True)][-1]
    return group.pg.reduce_scatter_tensor_coalesced(outs, wholes)


def sum_start(x: torch.Tensor, group: Group) -> Any:
    """Start an all-reduce in place, without gradient; the work to wait for."""
    _note("all_reduce", group.pg, 2 * (group.size - 1) * _nbytes(x) // group.size)
    return dist.all_reduce(x, group=group.pg, async_op=True)


def sum_(x: torch.Tensor, group: Group) -> torch.Tensor:
    """All-reduce in place, no gradient."""
    _note("all_reduce", group.pg, 2 * (group.size - 1) * _nbytes(x) // group.size)
    dist.all_reduce(x, group=group.pg)
    return x


def max_(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The largest of each element over a group, in place, no gradient."""
    _note("all_reduce", group.pg, 2 * (group.size - 1) * _nbytes(x) // group.size)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group.pg)
    return x


def all_to_all_start(x: torch.Tensor, send: list[int], recv: list[int],
                     group: Group) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Start sending `send[r]` rows of `x` to rank r, in order; (what comes, the work, what must live until then)."""
    x = x.contiguous()
    out = x.new_empty(sum(recv), *x.shape[1:])
    row = _nbytes(x) // len(x) if len(x) else 0
    _note("all_to_all", group.pg, (len(x) - send[group.pg.rank()]) * row)
    return out, dist.all_to_all_single(out, x, recv, send, group=group.pg, async_op=True), x


def max_along(x: torch.Tensor, stored: Any, dim: int) -> torch.Tensor:
    """The largest of each element of `x`, in place, over the ranks that hold other parts of `stored` along `dim`."""
    for i, p in enumerate(stored.placements if isinstance(stored, DTensor) else ()):
        if isinstance(p, Shard) and p.dim == dim and stored.device_mesh.size(i) > 1:
            pg = stored.device_mesh.get_group(i)
            _note("all_reduce", pg, 2 * (pg.size() - 1) * _nbytes(x) // pg.size())
            dist.all_reduce(x, dist.ReduceOp.MAX, group=pg)
    return x


def exchange(to: list[list[torch.Tensor]], sizes: list[int], group: Group,
             kind: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`to[r]` to rank r, for all at once; what came from each, flat, `sizes[r]` numbers of `kind`'s dtype, device."""
    flat = torch.cat([x.reshape(-1) for xs in to for x in xs] or [kind.new_empty(0)])
    sent = [sum(x.numel() for x in xs) for xs in to]
    out = kind.new_empty(sum(sizes))
    _note("all_to_all", group.pg, (len(flat) - sent[group.pg.rank()]) * flat.element_size())
    dist.all_to_all_single(out, flat, sizes, sent, group=group.pg)
    return out.split(sizes)


def _all_sum(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over a group, by name; its adjoint is the same sum."""
    pg = _resolve_process_group(group)  # pyright: ignore
    out = x.clone(memory_format=torch.contiguous_format)
    _note("all_reduce", pg, 2 * (pg.size() - 1) * _nbytes(out) // pg.size())
    dist.all_reduce(out, group=pg)
    return out


def _all_to_all(x: torch.Tensor, group: str) -> torch.Tensor:
    """Chunk r of dim 0 to rank r, and theirs in the same order; its own adjoint."""
    pg = _resolve_process_group(group)  # pyright: ignore
    x = x.contiguous()
    out = torch.empty_like(x)
    _note("all_to_all", pg, (pg.size() - 1) * _nbytes(x) // pg.size())
    dist.all_to_all_single(out, x, group=pg)
    return out


def _keep_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _operator(fn: Any) -> Any:
    """`fn(x, group)`, its own adjoint, as an operator; between fake tensors it only tells a fake group (`xtf.plan`)."""
    def fake(x: torch.Tensor, group: str) -> torch.Tensor:
        told = _planned(_resolve_process_group(group))  # pyright: ignore
        return fn(x, group) if told else torch.empty_like(x, memory_format=torch.contiguous_format)

    op = torch.library.custom_op(f"xtf::{fn.__name__.strip('_')}", fn, mutates_args=())  # pyright: ignore
    op.register_fake(fake)
    op.register_autograd(lambda ctx, grad: (op(grad, ctx.group), None), setup_context=_keep_group)  # pyright: ignore
    return op


all_sum, all_to_all = _operator(_all_sum), _operator(_all_to_all)
