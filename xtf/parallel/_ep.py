"""`ep`: experts divided over an axis; tokens travel to them and back.

A token crosses once to each *rank* that holds any of its experts, with its local expert ids and weights; that rank sums
what its experts made of it, and one row goes home. Dispatch and combine are each other's adjoints, so in backward the
same rows travel the other way. Every message is cut in two: `dispatch` and `combine` start, `arrive` and `home` wait,
and autograd turns starts into waits.

In the field's words `dispatch` and `arrive` are permute, all-to-all and a second permute by local expert, `combine` and
`home` unpermute, all-to-all and unpermute; `exact` has no capacity, `static` has one that is an error to exceed.

Bytes that a rank sends in a forward pass of one layer, with n (token, other rank) pairs that leave it, m that came to
it from others, R ranks: rows n × D × itemsize, ids n × K × 4, weights n × K × itemsize of the weights,
home m × D × itemsize, counts (R - 1) × (1 + E / R) × 8. Backward: m rows, m weights, n rows home.

T tokens here   K experts a token   E experts   R ranks of the axis   e experts a rank (E / R)   D hidden
P rows that leave   Q rows that arrive   N (row, expert) pairs computed here
"""
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from xtf import device, tree
from xtf.kernels.experts import collect, spread
from xtf.layout import AXES
from xtf.ops import Ops
from xtf.parallel import _mesh as M
from xtf.parallel import collectives as C
from xtf.transform import Env, Stage, Transform


class Announced(NamedTuple):
    """Who goes where. `there_TR`: whether token t has an expert on rank r. `mine_R`: rows that go to each. `theirs_RX`:
    what each rank announced, int64: how many rows it sends here, how many pairs they make for each expert (and, under
    bounds, how many it would have sent without them); on its way to the host in `copy`. `e`: experts a rank."""
    experts_TK: torch.Tensor
    there_TR: torch.Tensor
    mine_R: torch.Tensor
    theirs_RX: torch.Tensor
    copy: Callable[[], torch.Tensor]
    dropped: torch.Tensor
    e: int


class Flight(NamedTuple):
    """What `dispatch` sends: local expert ids, rows and weights, each with the message that it travels in; and the way
    back: which token each row is (`src_P`) and in which rows each token left (`where_TK`). `pairs` to make room for."""
    announced: Announced
    src_P: torch.Tensor
    where_TK: torch.Tensor
    pairs: int
    ids: "Sent"
    rows: "Sent"
    weights: "Sent"


class Sent(NamedTuple):
    """Rows on their way, and the message that brings them."""
    rows: torch.Tensor
    message: "Message"


class Return(NamedTuple):
    """What `combine` sends."""
    sent: Sent
    rows: "Rows"


class Rows(NamedTuple):
    """What the experts see, by local expert, and the way back."""
    x_ND: torch.Tensor
    weights_N: torch.Tensor
    offsets_E: torch.Tensor
    dropped: torch.Tensor
    src_N: torch.Tensor
    where_QK: torch.Tensor
    src_P: torch.Tensor
    where_TK: torch.Tensor
    sizes: tuple[list[int], list[int]]


class Strategy(Protocol):
    """How many rows to make room for. `rows` and `pairs` are bounds, or None; sizes(announced) -> (rows sent to each
    rank, rows received from each, pairs computed here)."""
    @property
    def rows(self) -> int | None: ...

    @property
    def pairs(self) -> int | None: ...

    def sizes(self, announced: Announced) -> tuple[list[int], list[int], int]: ...


@dataclass(frozen=True)
class exact:
    """Exactly the rows that are needed: the host waits, once a layer, for counts sent off before the router's weights.

    >>> exact().rows is None
    True
    """
    rows: int | None = field(default=None, init=False)
    pairs: int | None = field(default=None, init=False)

    def sizes(self, announced: Announced) -> tuple[list[int], list[int], int]:
        both = announced.copy()
        return both[:, 0].tolist(), both[:, 1].tolist(), int(both[:, 2:].sum())


@dataclass(frozen=True)
class static:
    """Room for `rows` rows a pair of ranks and `pairs` (row, expert) pairs a rank; the host waits for nothing.

    If a step needs more, no update is made (see `Ops.sound`): the state that it returns has the parameters, moments and
    `extra` that it was given. The next step raises `Overflow`, which says what was needed, and so does `settle`, which
    one calls before what is there is saved.

    Raises ValueError if a bound is not positive.

    >>> static(rows=128, pairs=1024).pairs
    1024
    """
    rows: int
    pairs: int

    def __post_init__(self):
        if self.rows < 1 or self.pairs < 1:
            raise ValueError(f"ep: static(rows={self.rows}, pairs={self.pairs}): both have to be at least 1")

    def sizes(self, announced: Announced) -> tuple[list[int], list[int], int]:
        same = [self.rows] * len(announced.mine_R)
        return same, same, self.pairs


class Overflow(RuntimeError):
    """A step needed more room than `static` gives. It made no update."""


def settle() -> None:
    """Wait for the last step of every layout with `static` bounds.

    Raises Overflow, on all ranks, if one was too little for it.

    >>> settle()
    """
    for bounds in list(_unread):
        bounds.settle()


def ep(axis: str = "ep", strategy: Strategy = exact()) -> Transform:
    """Divide experts (leaves with a dim "expert") over a mesh axis; `fsdp` stores them further over its others.

    The axis may be `ulysses`' as well. Nothing is dropped, ever.

    Raises ValueError, naming the leaf, if the axis does not divide the experts, or is none of the mesh.

    >>> ep("ep").name
    'ep'
    """
    bounds = Bounds(strategy)
    return Transform("ep", Stage.EXPERTS, lambda ops, env: _wrap(ops, env, axis, strategy, bounds), step=bounds.checked,
                     claim=lambda p: {axis: p.axes.index("expert")} if "expert" in p.axes else {})


class Bounds:
    """What a step needed beside what `static` gives it; `exact` needs nothing of this."""

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self.env: Env | None = None
        # since the step began: [rows a pair of ranks, pairs a rank], on the device
        self.needed: list[torch.Tensor] = []
        self.most: torch.Tensor | None = None
        # what the last step needed, on its way to the host
        self.coming: Callable[[], dict[str, float]] | None = None

    def over_ranks(self) -> torch.Tensor | None:
        """The most that any rank needed, [2]; asked once a step."""
        if self.most is None and self.needed and self.env is not None:
            self.most = C.max_(torch.stack(self.needed).amax(0), M.world(self.env.mesh))
        return self.most

    def sound(self, ok: torch.Tensor | None) -> torch.Tensor | None:
        most = self.over_ranks()
        if most is None:
            return ok
        fits = self.fits(most)
        return fits if ok is None else ok & fits

    def fits(self, most: torch.Tensor) -> torch.Tensor:
        rows, pairs = self.strategy.rows, self.strategy.pairs
        assert rows is not None and pairs is not None
        return (most[0] <= rows) & (most[1] <= pairs)

    def checked(self, run: Callable) -> Callable:
        if self.strategy.rows is None:
            return run

        def step(state: Any, batch: Any) -> Any:
            self.settle()
            self.needed, self.most = [], None
            out = run(state, batch)
            most = self.over_ranks()
            if most is None:
                return out
            # nothing waits: the host reads what was needed when the next step begins
            self.coming = device.read_later({"rows": most[0], "pairs": most[1]})
            _unread.add(self)
            return _kept(state, out, self.fits(most))
        return step

    def settle(self) -> None:
        coming, self.coming = self.coming, None
        _unread.discard(self)
        rows, pairs = self.strategy.rows, self.strategy.pairs
        if coming is None or rows is None or pairs is None:
            return
        needed = coming()
        if needed["rows"] > rows or needed["pairs"] > pairs:
            bounds = f"static(rows={rows}, pairs={pairs})"
            raise Overflow(f"ep: {bounds} is too little: the last step needed rows={needed['rows']:.0f} and "
                           f"pairs={needed['pairs']:.0f}. It made no update: parameters and moments are as they were; "
                           "raise the bounds, or use exact()")


_unread: weakref.WeakSet[Bounds] = weakref.WeakSet()


def _kept(state: Any, out: Any, fits: torch.Tensor) -> Any:
    """A step's result with the `extra` that it was given where bounds did not fit."""
    new: Any = out[0] if isinstance(out, tuple) and out else None
    if type(new) is not type(state) or not hasattr(new, "extra"):        # not a `TrainState`: a loss, say
        return out
    old = dict(tree.flatten_with_path(state.extra))
    keep = lambda path, x: torch.where(fits, x, old[path]) if _alike(x, old.get(path)) else x
    return replace(new, extra=tree.map_with_path(keep, new.extra)), *out[1:]


def _alike(a: Any, b: Any) -> bool:
    return (type(a) is type(b) is torch.Tensor and a.shape == b.shape and a.dtype == b.dtype
            and a.device == b.device)


class Message:
    """Rows on their way, `send[r]` of them to rank r: started, then awaited; in backward the other way round."""

    def __init__(self, group: C.Group, send: list[int], recv: list[int]):
        self.group, self.send, self.recv = group, send, recv
        self.work: Any = None
        self.kept: Any = None

    def start(self, x: torch.Tensor) -> torch.Tensor:
        out = Start.apply(x, self)
        assert isinstance(out, torch.Tensor)
        return out


class Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, message):
        ctx.message = message
        out, message.work, message.kept = C.all_to_all_start(x, message.send, message.recv, message.group)
        return out

    @staticmethod
    def backward(ctx, *_):
        message = ctx.message
        message.work.wait()                                  # the real gradient: Wait's backward started it
        grad, message.work, message.kept = message.kept[0], None, None
        return grad, None


class Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, message):
        ctx.message = message
        message.work.wait()
        message.work = message.kept = None                   # a work may keep its tensors alive
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        message = ctx.message
        out, message.work, sent = C.all_to_all_start(g, message.recv, message.send, message.group)
        message.kept = out, sent
        return g.new_zeros(()).expand(g.shape), None  # autograd wants the arrival's shape: a placeholder without memory


def wait(sent: Sent) -> torch.Tensor:
    """What arrived, differentiable: in backward the gradient's message starts here."""
    out = Wait.apply(sent.rows, sent.message)
    assert isinstance(out, torch.Tensor)
    return out


def count(experts_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many pairs each expert gets, [E] int64; -1 is nobody."""
    at = torch.where(experts_TK >= 0, experts_TK, num_experts).flatten()
    return torch.zeros(num_experts + 1, dtype=torch.int64, device=at.device).index_add_(0, at, torch.ones_like(at))[:-1]


def _wrap(ops: Ops, env: Env, axis: str, strategy: Strategy, bounds: Bounds) -> Ops:
    if axis not in AXES and axis not in M.axes(env.mesh):
        raise ValueError(f"ep: the mesh is {M.describe(env.mesh)} and has no axis {axis!r}; known axes are "
                         f"{', '.join(AXES)}")
    if env.size(axis) == 1:
        return ops
    bounds.env = env
    group, R = env.group(axis), env.size(axis)

    def announce(experts_TK: torch.Tensor, num_experts: int) -> Announced:
        if num_experts % R:
            raise ValueError(f"ep: {axis}={R} does not divide {num_experts} experts")
        (T, _), e = experts_TK.shape, num_experts // R
        # 1. which ranks each token goes to, once to each (rank R is nobody), and how many pairs each expert gets
        rank_TK = torch.where(experts_TK >= 0, experts_TK // e, R)
        there_TR = torch.zeros(T, R + 1, dtype=torch.bool, device=experts_TK.device).scatter_(1, rank_TK, True)[:, :R]
        dropped = torch.zeros((), dtype=torch.int64, device=experts_TK.device)
        pairs_E = count(experts_TK, num_experts)
        wanted_R = pairs_E.view(R, e).sum(1)
        # 2. under bounds (a capacity): leave out the rows that do not fit, and remember what would have been needed
        if strategy.rows is not None:
            bounds.needed.append(torch.stack([there_TR.sum(0).max(), dropped]))
            fits_TR = there_TR.long().cumsum(0) <= strategy.rows
            fits_TK = F.pad(fits_TR, (0, 1), value=True).gather(1, rank_TK)
            dropped = (~fits_TK).sum()
            experts_TK, there_TR = experts_TK.masked_fill(~fits_TK, -1), there_TR & fits_TR
            pairs_E = count(experts_TK, num_experts)
        # 3. tell each rank how many rows come, and how many pairs they make for each of its experts
        mine_R = there_TR.sum(0)
        said = [mine_R[:, None], pairs_E.view(R, e), *([] if strategy.rows is None else [wanted_R[:, None]])]
        theirs_RX, work, sent = C.all_to_all_start(torch.cat(said, 1), [1] * R, [1] * R, group)
        # 4. exact sizes go to the host, which waits for them in `dispatch`; static ones are known
        if strategy.rows is not None:
            work.wait()
            return Announced(experts_TK, there_TR, mine_R, theirs_RX, lambda: theirs_RX, dropped, e)
        copy = device.host_copy(lambda: torch.cat([mine_R[:, None], theirs_RX], 1), work, sent, experts_TK.device)
        return Announced(experts_TK, there_TR, mine_R, theirs_RX, copy, dropped, e)

    def dispatch(x_TD: torch.Tensor, weights_TK: torch.Tensor, announced: Announced) -> Flight:
        (T, K), e, where = announced.experts_TK.shape, announced.e, x_TD.device
        there_TR = announced.there_TR
        # 1. how many rows each way: the one wait for the host, under exact sizes
        send, recv, pairs = strategy.sizes(announced)
        P = sum(send)
        # 2. where each rank's rows begin among those that leave, and each token's among its rank's
        ends_R = announced.mine_R.cumsum(0)
        begin_R = ends_R - announced.mine_R if strategy.rows is None else torch.arange(R, device=where) * strategy.rows
        at_TR = torch.where(there_TR, begin_R + there_TR.long().cumsum(0) - 1, P)
        # 3. the permutation: which token and rank each row is for, and in which rows each token leaves
        token_TR = torch.where(there_TR, torch.arange(T, device=where)[:, None], T)
        rank_TR = torch.arange(R, device=where).expand(T, R)
        src_P = torch.full((P + 1,), T, device=where).scatter_(0, at_TR.flatten(), token_TR.flatten())[:P]
        rank_P = torch.zeros(P + 1, dtype=torch.int64, device=where).scatter_(0, at_TR.flatten(), rank_TR.flatten())[:P]
        where_TK = at_TR.sort(1).values[:, :min(R, K)]
        # 4. expert ids as the other rank numbers them, e where a choice lives elsewhere
        ids_PK = F.pad(announced.experts_TK, (0, 0, 0, 1), value=-1)[src_P] - rank_P[:, None] * e
        here_PK = (ids_PK >= 0) & (ids_PK < e)
        ids_PK = torch.where(here_PK, ids_PK, e).to(torch.int32)
        # 5. permute, and start three all-to-alls
        parts = ids_PK, spread(x_TD, src_P, where_TK), spread(weights_TK, src_P, where_TK) * here_PK
        messages = [Message(group, send, recv) for _ in parts]
        ids, rows, weights = (Sent(message.start(x), message) for x, message in zip(parts, messages, strict=True))
        return Flight(announced, src_P, where_TK, pairs, ids, rows, weights)

    def arrive(flight: Flight) -> Rows:
        announced, N = flight.announced, flight.pairs
        # 1. wait for the three messages
        ids_QK, x_QD, weights_QK = (wait(sent) for sent in (flight.ids, flight.rows, flight.weights))
        Q, K = ids_QK.shape
        # 2. where each local expert's pairs end, by what the ranks announced; what is beyond the room is left out
        ends_E = announced.theirs_RX[:, 1:1 + announced.e].sum(0).cumsum(0)
        dropped = announced.dropped
        if strategy.pairs is not None:
            bounds.needed.append(torch.stack([torch.zeros_like(dropped), announced.theirs_RX[:, -1].sum()]))
            dropped = dropped + (ends_E[-1] - N).clamp(min=0)
            ends_E = ends_E.clamp(max=N)
        # 3. pairs sorted by expert, stably, so that their order does not depend on the layout's messages
        order_N = ids_QK.flatten().argsort(stable=True)[:N]
        if len(order_N) < N:                                 # more room than rows
            order_N = F.pad(order_N, (0, N - len(order_N)), value=Q * K)
        n = torch.arange(N, device=order_N.device)
        order_N = torch.where(n < ends_E[-1], order_N, Q * K)
        # 4. the second permutation: which row each pair is of, and in which pairs each row is
        src_N = torch.where(order_N < Q * K, order_N // K, Q)
        where_QK = torch.full((Q * K + 1,), N, device=order_N.device).scatter_(
            0, order_N, torch.where(order_N < Q * K, n, N))[:-1].view(Q, K)
        weights_N = spread(weights_QK.reshape(-1, 1), order_N, where_QK.reshape(-1, 1)).squeeze(1)
        return Rows(spread(x_QD, src_N, where_QK), weights_N, ends_E, dropped, src_N, where_QK, flight.src_P,
                    flight.where_TK, (flight.rows.message.send, flight.rows.message.recv))

    def combine(y_ND: torch.Tensor, rows: Rows) -> Return:
        # each row's pairs are summed here (unpermute), so that one row goes home: sizes are those of dispatch, swapped
        message = Message(group, rows.sizes[1], rows.sizes[0])
        return Return(Sent(message.start(collect(y_ND, rows.src_N, rows.where_QK)), message), rows)

    def home(flight: Return) -> torch.Tensor:
        return collect(wait(flight.sent), flight.rows.src_P, flight.rows.where_TK)

    moves = {"announce": announce, "dispatch": dispatch, "arrive": arrive, "combine": combine, "home": home}
    # their sizes depend on values
    return replace(ops, **{name: torch.compiler.disable(move) for name, move in moves.items()},
                   sound=bounds.sound if strategy.rows is not None else ops.sound)
