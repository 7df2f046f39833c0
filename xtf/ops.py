"""`Ops`: the one record through which a model asks the machine for anything.

A model calls these functions and never names a rank, a group or a mesh. `LOCAL` is one process. A transform is (among
other things) a function from `Ops` to `Ops`.

Shapes: P packs, t positions here, T positions of a pack, H query heads, K key-value heads, d head dim, D hidden, E
experts, N (token, expert) rows.
"""
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from xtf import device, tree
from xtf.kernels import attention, experts, product_dtype


@dataclass(frozen=True)
class Ops:
    """What a model and an optimizer may ask for; every field is a pure function (`donate` apart).

    scan(block, layers, x, *shared, xs=None, around=None) -> (x, ys): for each layer
        `x, y = block(params, x, *shared)`, or `block(params, x, *shared, xs=xs[i])` where `xs` (one entry a layer,
        static values or tensors) is given; `ys` is the list of `y`. Parameters are made whole for the call. `around`
        wraps "make whole, then block" (remat).
    use(fn, params, *args): `fn(params, *args)` with the parameters made whole.
    linear(x_D, node, axes): product with `node["weight"]` [out, in], plus `node["bias"]` if there; `axes` = (in, out)
        logical names.
    grouped_linear(x_ND, node, offsets_E, axes): rows up to offsets[e] times `node["weight"][e]`.
    attend(q_PTHd, k_PTKd, v_PTKd, *, segments, window=None, scale=None, sinks=None, cache=None) -> o_PTHd: causal
        attention within each document; `segments` [P, S + 1] int32 holds cumulative document lengths, padded with T.
    plan, dispatch, arrive, combine, home: tokens to their experts and back (`xtf.kernels.experts`).
    split(x_PT..., dim=1): this rank's positions, where the sequence is divided.
    name(fn, label): a named call, that remat and offload refer to.
    total(x): the sum over all ranks that hold other tokens; its adjoint is the same sum.
    same_packs(x): the sum over ranks that hold other positions of the same packs, without gradient.
    norm(tree): the 2-norm over all stored elements, each counted once.
    matrices(fn, leaves): `fn(x_Nab)` of all matrices of leaves [..., a, b], each done by one of the ranks that store
        it; the results in the leaves' placement (`xtf.parallel.matrices`). For optimizers that need a matrix as a
        whole.
    whole(leaf): the whole leaf as a plain tensor. collect(grads, leaves): finish a backward pass (`value_and_grad`
        alone calls it).
    sound(ok): `ok`, and False where a bound that the layout set was not enough for this step. Optimizers ask it;
        nothing waits for it.
    donate: whether the optimizer may overwrite the old state.
    """
    scan: Callable[..., tuple[Any, list]]
    use: Callable[..., Any]
    linear: Callable[..., torch.Tensor]
    grouped_linear: Callable[..., torch.Tensor]
    attend: Callable[..., torch.Tensor]
    plan: Callable[..., Any]
    dispatch: Callable[..., Any]
    arrive: Callable[..., Any]
    combine: Callable[..., Any]
    home: Callable[..., torch.Tensor]
    split: Callable[..., torch.Tensor]
    name: Callable[[Callable, str], Callable]
    total: Callable[[torch.Tensor], torch.Tensor]
    same_packs: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[tree.Tree], torch.Tensor]
    matrices: Callable[[Callable, list], list]
    whole: Callable[[torch.Tensor], torch.Tensor]
    collect: Callable[[list, list], list]
    sound: Callable[[torch.Tensor | None], torch.Tensor | None]
    donate: bool = False


def linear(x: torch.Tensor, node: dict, axes: tuple[str, str]) -> torch.Tensor:
    """`x @ weight.T + bias`, in the dtype of `x`."""
    weight, bias = node["weight"], node.get("bias")
    dtype = product_dtype(x.dtype, x.device)
    if dtype != x.dtype:                                # a processor without bf16 products: in float32, and round
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def scan_with(whole: Callable[[tree.Tree], tree.Tree], block: Callable, layers: Sequence, x: Any, *shared: Any,
              xs: Sequence | None = None, around: Callable | None = None) -> tuple[Any, list]:
    """The plain scan: `whole(params)` inside `around`, layer after layer."""
    refuse_closures(block)
    ys = []
    for i, params in enumerate(layers):
        def call(x, *shared, params=params, extra=() if xs is None else (xs[i],)):
            return run_block(block, whole(params), x, *shared, extra=extra)
        x, y = (call if around is None else around(call))(x, *shared)
        ys.append(y)
    return x, ys


def run_block(block: Callable, params: tree.Tree, x: Any, *shared: Any, extra: tuple = ()) -> tuple[Any, Any]:
    """One call of a block, its result checked to be a pair."""
    out = block(params, x, *shared, xs=extra[0]) if extra else block(params, x, *shared)
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"scan: {_label(block)} must return (x, y), y = None if there is nothing to collect; it "
                        f"returned {type(out).__name__}")
    return out


def refuse_closures(fn: Callable) -> None:
    """Raise if `fn` closes over a tensor that needs gradients: under fsdp and remat its gradient would be lost.

    Looks through `functools.partial` and one level of containers.
    """
    while isinstance(fn, partial):
        for name, value in [*((f"argument {i}", a) for i, a in enumerate(fn.args)), *fn.keywords.items()]:
            _refuse(fn.func, name, value)
        fn = fn.func
    if isinstance(fn, types.FunctionType) and fn.__closure__:
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__, strict=True):
            try:
                value = cell.cell_contents
            except ValueError:                                                 # a name not bound yet
                continue
            _refuse(fn, name, value)


def _refuse(fn: Callable, name: str, value: Any) -> None:
    for leaf in tree.leaves(value) if isinstance(value, dict | list | tuple) else (value,):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            raise ValueError(f"scan: {_label(fn)} closes over `{name}`, a tensor of shape {tuple(leaf.shape)} that "
                             "needs gradients; pass it to scan as a shared argument (or in xs) instead")


def _label(fn: Callable) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__qualname__", repr(fn))


def local_norm(grads: tree.Tree) -> torch.Tensor:
    """The 2-norm over all leaves (None left out), accumulated in float64 over leaves."""
    present = [g for g in tree.leaves(grads) if g is not None]
    return leaf_norms(present).square().sum().sqrt() if present else torch.zeros(())


def leaf_norms(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of each tensor, float64 [len(leaves)].

    Where torch adds up a tensor's squares in float32 one after the other (CPU: an error of 7e-4 for 16M elements),
    pieces of it are measured.
    """
    leaves = [x if x.dtype.itemsize >= 4 else x.float() for x in leaves]
    pieces = [x.reshape(-1).split(device.norm_piece(x.device)) if x.numel() > device.norm_piece(x.device) else (x,)
              for x in leaves]
    norms = torch._foreach_norm([piece for some in pieces for piece in some])
    same = all(n.dtype == norms[0].dtype for n in norms)
    squares = torch.stack(norms if same else [n.double() for n in norms]).double().square()
    if len(squares) == len(leaves):
        return squares.sqrt()
    return torch.stack([some.sum() for some in squares.split([len(some) for some in pieces])]).sqrt()


def local_matrices(fn: Callable[[torch.Tensor], torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """`fn(x_Nab)` of the matrices of leaves [..., a, b] that are whole here."""
    done = in_stacks(fn, [as_stack(x) for x in leaves])
    return [y.view(x.shape) for y, x in zip(done, leaves, strict=True)]


def as_stack(x: torch.Tensor) -> torch.Tensor:
    """[..., a, b] as [N, a, b], also where a or b is 0."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def in_stacks(fn: Callable[[torch.Tensor], torch.Tensor], stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """`fn` of each [N, a, b], those of one kind put together to fill the device, but no more at a time than that."""
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(stacks):
        kinds.setdefault((x.shape[1:], x.dtype, x.device), []).append(i)
    out = list(stacks)
    for (shape, _, where), members in kinds.items():
        x_Nab = torch.cat([stacks[i] for i in members])
        if x_Nab.numel():
            y_Nab = torch.cat([fn(x) for x in x_Nab.split(max(1, device.piece(where) // shape.numel()))])
            for i, y in zip(members, y_Nab.split([len(stacks[i]) for i in members]), strict=True):
                out[i] = y
    return out


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


LOCAL = Ops(
    scan=partial(scan_with, _same),
    use=lambda fn, params, *args: fn(params, *args),
    linear=linear,
    grouped_linear=experts.grouped_linear,
    attend=attention.attend,
    plan=experts.plan, dispatch=experts.dispatch, arrive=experts.arrive, combine=experts.combine, home=experts.home,
    split=_same,
    name=_same,
    total=_same,
    same_packs=lambda x: x.detach(),
    norm=local_norm,
    matrices=local_matrices,
    whole=_same,
    collect=lambda grads, leaves: grads,
    sound=_same,
)
