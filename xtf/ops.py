"""`Ops`: the one record through which a model asks the machine for anything.

A model calls these functions and never names a rank, a group or a mesh. `LOCAL` is one process. A transform is (among
other things) a function from `Ops` to `Ops`.

In the field's words: "made whole" is unsharded (all-gathered); `dispatch` is permute and all-to-all, `combine` and
`home` are the all-to-all back and unpermute; `split` is sequence sharding; `total` is an all-reduce.

P packs   t positions here   T positions of a pack   S documents of a pack   H query heads   K key-value heads
d head dim   D hidden   E experts   C experts chosen a token   N (token, expert) rows
"""
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from xtf import device, tree
from xtf.kernels import attention, experts, product_dtype

Tensor = torch.Tensor


class Scan(Protocol):
    def __call__(self, block: Callable, layers: Sequence, x: Any, /, *shared: Any, xs: Sequence | None = None,
                 around: Callable | None = None) -> tuple[Any, list]:
        """Run a block over layers, the parameters of each made whole for its call; returns (x, ys).

        For each layer `x, y = block(params, x, *shared)`, and `ys` is the list of `y`. With `xs`, one entry a layer
        (static values or tensors), it is `block(params, x, *shared, xs=xs[i])`: the block's argument has to be called
        `xs`. `around` wraps "make whole, then block" (remat).

        Raises ValueError for a block that closes over a tensor that needs gradients, TypeError where it takes no `xs`
        or does not return a pair.

        >>> def block(params, x, scale, *, xs):
        ...     return x * params["w"] * scale + xs, x
        >>> LOCAL.scan(block, [{"w": 2}, {"w": 3}], 1, 10, xs=[5, 7])
        (757, [1, 25])
        """
        ...


class Use(Protocol):
    def __call__(self, fn: Callable, params: tree.Tree, /, *args: Any) -> Any:
        """`fn(params, *args)` with the parameters made whole."""
        ...


class Linear(Protocol):
    def __call__(self, x: Tensor, node: dict, axes: tuple[str, str], /) -> Tensor:
        """The product of x [..., in] with `node["weight"]` [out, in], plus `node["bias"]` [out] if there is one;
        `axes` = (in, out), logical names. Returns [..., out]."""
        ...


class GroupedLinear(Protocol):
    def __call__(self, x: Tensor, node: dict, offsets_E: Tensor, axes: tuple[str, str], /) -> Tensor:
        """`Linear` for rows [N, in] by expert: those from offsets[e - 1] to offsets[e] times `node["weight"][e]`."""
        ...


class Attend(Protocol):
    def __call__(self, q_PTHd: Tensor, k_PTKd: Tensor, v_PTKd: Tensor, /, *, segments: Tensor,
                 window: int | None = None, scale: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """Causal attention within each document, [P, T, H, d]; `segments` [P, S + 1] int32 holds cumulative document
        lengths, padded with T. See `xtf.kernels.attention.attend`."""
        ...


class ExpertRows(Protocol):
    """What experts see: rows by expert, their weights, where each expert's end, pairs that a bound left out."""
    @property
    def x_ND(self) -> Tensor: ...

    @property
    def weights_N(self) -> Tensor: ...

    @property
    def offsets_E(self) -> Tensor: ...

    @property
    def dropped(self) -> Tensor: ...


class Announce(Protocol):
    def __call__(self, experts_TK: Tensor, num_experts: int, /) -> Any:
        """Which expert ids [T, K] (-1: nobody) each token goes to: starts the exchange of counts, waits for nothing."""
        ...


class Dispatch(Protocol):
    def __call__(self, x_TD: Tensor, weights_TK: Tensor, announced: Any, /) -> Any:
        """Start rows and weights on their way to the experts (permute, all-to-all). Returns a flight for `arrive`."""
        ...


class Arrive(Protocol):
    def __call__(self, flight: Any, /) -> ExpertRows:
        """Wait for the rows, and lay them out by expert."""
        ...


class Combine(Protocol):
    def __call__(self, y_ND: Tensor, rows: Any, /) -> Any:
        """Start the experts' outputs on their way home (all-to-all back). Returns a flight for `home`."""
        ...


class Home(Protocol):
    def __call__(self, flight: Any, /) -> Tensor:
        """Wait, and sum each token's rows (unpermute), [T, D]."""
        ...


class Split(Protocol):
    def __call__(self, x: Tensor, dim: int = 1, /) -> Tensor:
        """This rank's positions of `x`, whole along `dim`, where the sequence is divided."""
        ...


class Name(Protocol):
    def __call__(self, fn: Callable, label: str, /) -> Callable:
        """`fn`, as a named call that remat and offload refer to."""
        ...


class Matrices(Protocol):
    def __call__(self, fn: Callable[[Tensor], Tensor], leaves: list[Tensor], /) -> list[Tensor]:
        """`fn(x_Nab)` of all matrices of leaves [..., a, b], each done by one of the ranks that store it; the results
        in the leaves' placement. For optimizers that need a matrix as a whole (`xtf.parallel.matrices`)."""
        ...


@dataclass(frozen=True)
class Ops:
    """What a model and an optimizer may ask for; each field is a pure function (`donate` apart), described by its type.

    total(x): the sum over all ranks that hold other tokens; its adjoint is the same sum.
    same_packs(x): the sum over ranks that hold other positions of the same packs, without gradient.
    norm(tree): the 2-norm over all stored elements, each counted once.
    watch(leaves): the last backward pass of a step is about to begin; what is final may travel. `value_and_grad` alone
        calls it and `collect`.
    collect(grads, leaves): the step's gradients, summed over ranks, of these on this rank; called once a step, after
        the last micro-batch. A transform that wraps it changes what the inner one returns: what it is given may be
        under way.
    into: None, or what `microbatch` tells `value_and_grad` (`xtf.grad.Adding`): where gradients are added up, and
        whether more micro-batches are to come.
    sound(ok): `ok`, and False where a bound that the layout set was not enough for this step. Optimizers ask it;
        nothing waits for it.
    donate: whether the optimizer may overwrite the old state.
    """
    scan: Scan
    use: Use
    linear: Linear
    grouped_linear: GroupedLinear
    attend: Attend
    announce: Announce
    dispatch: Dispatch
    arrive: Arrive
    combine: Combine
    home: Home
    split: Split
    name: Name
    total: Callable[[Tensor], Tensor]
    same_packs: Callable[[Tensor], Tensor]
    norm: Callable[[tree.Tree], Tensor]
    matrices: Matrices
    watch: Callable[[list], None]
    collect: Callable[[list, list], list]
    sound: Callable[[Tensor | None], Tensor | None]
    donate: bool = False
    into: Any = field(default=None, compare=False)  # `jit` knows a block by its `ops`: the same in every micro-batch


def linear(x: torch.Tensor, node: dict, axes: tuple[str, str]) -> torch.Tensor:
    """`x @ weight.T + bias`, in the dtype of `x`."""
    weight, bias = node["weight"], node.get("bias")
    dtype = product_dtype(x.dtype, x.device)
    if dtype != x.dtype:                                # a processor without bf16 products: in float32, and round
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def scan_with(whole: Callable[[tree.Tree], tree.Tree], block: Callable, layers: Sequence, x: Any, /, *shared: Any,
              xs: Sequence | None = None, around: Callable | None = None) -> tuple[Any, list]:
    """The plain scan: `whole(params)` inside `around`, layer after layer."""
    check_block(block, xs, len(layers))
    ys = []
    for i, params in enumerate(layers):
        # made whole inside the call: remat calls it once more in backward
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


def check_block(block: Callable, xs: Sequence | None, layers: int) -> None:
    """Raise if a block cannot be given to `scan`: TypeError where it takes no `xs` though there are some, ValueError
    where there are more or fewer of them than layers, and where it closes over a tensor that needs gradients (under
    fsdp and remat its gradient would be lost).

    Looks through `functools.partial` and one level of containers.

    >>> check_block(lambda params, x: (x, None), xs=[1], layers=1)
    Traceback (most recent call last):
    TypeError: scan: <lambda> takes no argument called `xs`, in which scan hands each layer its entry of xs=
    """
    if xs is not None and not _takes_xs(block):
        raise TypeError(f"scan: {_label(block)} takes no argument called `xs`, in which scan hands each layer its "
                        "entry of xs=")
    if xs is not None and len(xs) != layers:
        raise ValueError(f"scan: {_label(block)} is given {layers} layers and {len(xs)} entries of xs=; give as many "
                         "entries as layers")
    fn = block
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


def _takes_xs(block: Callable) -> bool:
    try:
        known = inspect.signature(block).parameters.values()
    except (TypeError, ValueError):  # made in C, say: the call itself will tell
        return True
    return any(p.name == "xs" or p.kind is p.VAR_KEYWORD for p in known)


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
    announce=experts.announce, dispatch=experts.dispatch, arrive=experts.arrive, combine=experts.combine,
    home=experts.home,
    split=_same,
    name=_same,
    total=_same,
    same_packs=lambda x: x.detach(),
    norm=local_norm,
    matrices=local_matrices,
    watch=lambda leaves: None,
    collect=lambda grads, leaves: grads,
    sound=_same,
)
