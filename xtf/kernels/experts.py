"""Tokens to their experts and back in one process, the meaning that expert parallelism keeps; experts' products.

    announced = announce(experts_TK, E)                   # who goes where: integers alone
    rows = arrive(dispatch(x_TD, weights_TK, announced))  # one row a (token, expert) pair, laid out by expert: permute
    y_TD = home(combine(y_ND, rows))                      # each token's rows summed: unpermute

The four moves are cut where messages fly when experts live on other ranks: `dispatch` and `combine` start, `arrive` and
`home` wait. Nothing is dropped, so there is no capacity factor. Shapes depend on no choice: pairs of nobody are rows
too, past the last offset, where `grouped_linear` (grouped GEMM) and its gradients are zeros. So time and memory hardly
depend on the routing, and torch.compile compiles it once.

T tokens   D hidden   E experts   K choices of a token   N = T K (token, choice) pairs   F features out
A, B rows of any kind
"""
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from xtf.kernels import at_least_float32, functorch_active, is_fake, product_dtype, traced

Tensor = torch.Tensor


class Announced(NamedTuple):
    """Pairs sorted by expert, those of nobody last: row n is pair `pairs_N[n]`.

    Pair p (choice p % K of token p // K) is row `where_TK[p]`.
    """
    pairs_N: Tensor
    where_TK: Tensor
    offsets_E: Tensor


class Rows(NamedTuple):
    """What the experts see: rows by expert, each pair's weight, where each one's rows end; and the way back."""
    x_ND: Tensor
    weights_N: Tensor
    offsets_E: Tensor
    announced: Announced

    @property
    def dropped(self) -> Tensor:
        """Pairs that were left out: none, ever (a static bound of `ep` may)."""
        return torch.zeros((), dtype=torch.int64, device=self.offsets_E.device)


class Flight(NamedTuple):
    """What `dispatch` sends: rows and weights, not yet laid out by expert."""
    x_TD: Tensor
    weights_TK: Tensor
    announced: Announced


class Return(NamedTuple):
    """What `combine` sends: the experts' rows, not yet summed."""
    y_ND: Tensor
    announced: Announced


# ---------------------------------------------------------------- the way there and back

def announce(experts_TK: Tensor, num_experts: int) -> Announced:
    """Sort the (token, choice) pairs by expert. `experts_TK` holds expert ids, -1 where nobody is chosen.

    Raises ValueError at ids outside [-1, num_experts); on an accelerator, which is not waited for, its own assertion
    does.

    >>> announce(torch.tensor([[1, 0], [1, -1]]), 2).offsets_E.tolist()
    [1, 3]
    """
    flat_N = experts_TK.flatten()
    if not (functorch_active() or traced() or is_fake(flat_N)) and flat_N.numel():
        fits = ((flat_N >= -1) & (flat_N < num_experts)).all()
        if flat_N.is_cuda:
            torch._assert_async(fits, f"announce: expert ids must lie in [-1, {num_experts})")
        elif not fits:
            raise ValueError(f"announce: expert ids in [{int(flat_N.min())}, {int(flat_N.max())}], but there are "
                             f"{num_experts} experts; -1 means nobody")
    ids_N, pairs_N = torch.where(flat_N < 0, num_experts, flat_N).sort(stable=True)
    experts_E = torch.arange(num_experts, device=flat_N.device)
    if functorch_active():
        offsets_E = (ids_N <= experts_E[:, None]).sum(1)
    else:
        offsets_E = torch.searchsorted(ids_N, experts_E.to(ids_N.dtype), right=True)
    return Announced(pairs_N, pairs_N.argsort().view(experts_TK.shape), offsets_E)


def dispatch(x_TD: Tensor, weights_TK: Tensor, announced: Announced) -> Flight:
    """Start each token's row and weights on their way."""
    return Flight(x_TD, weights_TK, announced)


def arrive(flight: Flight) -> Rows:
    """The rows, laid out by expert."""
    x_TD, weights_TK, (pairs_N, where_TK, offsets_E) = flight
    x_ND = spread(x_TD, pairs_N // weights_TK.shape[1], where_TK)
    weights_N1 = spread(weights_TK.reshape(-1, 1), pairs_N, where_TK.view(-1, 1))
    return Rows(x_ND, weights_N1.squeeze(1), offsets_E, flight.announced)


def combine(y_ND: Tensor, rows: Rows) -> Return:
    """Start the experts' outputs on their way home.

    `y_ND` already carries `rows.weights_N`: multiplied into the narrow hidden rows (or the outputs, where there is a
    bias), so that the way home is a sum and saves nothing. Rows past the last offset must be zeros, as `grouped_linear`
    leaves them.
    """
    return Return(y_ND, rows.announced)


def home(flight: Return) -> Tensor:
    """The sum, for each token, over the rows of the experts that it chose; zeros where nobody was chosen."""
    y_ND, (pairs_N, where_TK, _) = flight
    return collect(y_ND, pairs_N // where_TK.shape[1], where_TK)


# ---------------------------------------------------------------- one pair of adjoint moves

def spread(x_AD: Tensor, src_B: Tensor, where_AK: Tensor) -> Tensor:
    """y_b = x[src_b], zeros where `src_b` = A. `where_AK`: the at most K places b to which each row went, B for none.

    The adjoint is `collect(g, src, where)`, a sum of K rows in a fixed order: nothing is added atomically. Saves the
    two index tensors.

    >>> src, where = torch.tensor([1, 0, 1, 2]), torch.tensor([[1, 4], [0, 2]])
    >>> spread(torch.tensor([[1.0], [2.0]]), src, where).flatten().tolist()
    [2.0, 1.0, 2.0, 0.0]
    """
    return _rows(x_AD, src_B) if functorch_active() else torch.ops.xtf.spread(x_AD, src_B, where_AK)


def collect(y_BD: Tensor, src_B: Tensor, where_AK: Tensor) -> Tensor:
    """x_a = sum over k of y[where_ak], in at least float32, without those that are B: adjoint to `spread`.

    >>> src, where = torch.tensor([1, 0, 1]), torch.tensor([[1, 3], [0, 2]])
    >>> collect(torch.tensor([[1.0], [2.0], [4.0]]), src, where).flatten().tolist()
    [2.0, 5.0]
    """
    return _summed(y_BD, where_AK) if functorch_active() else torch.ops.xtf.collect(y_BD, src_B, where_AK)


def _rows(x_AD: Tensor, src_B: Tensor) -> Tensor:
    """`spread` in plain torch, on any device and under any transform: no copy of x with a row more, no wait."""
    if not len(x_AD):
        return x_AD.new_zeros(len(src_B), x_AD.shape[1])
    return torch.where((src_B < len(x_AD))[:, None], x_AD[src_B.clamp(max=len(x_AD) - 1)], 0)


def _summed(y_BD: Tensor, where_AK: Tensor) -> Tensor:
    """`collect` in plain torch."""
    wide = at_least_float32(y_BD.dtype)
    rows = (_rows(y_BD, at_A).to(wide) for at_A in where_AK.unbind(1))
    return sum(rows, y_BD.new_zeros((), dtype=wide)).to(y_BD.dtype)


@torch.library.custom_op("xtf::spread", mutates_args=())
def _spread(x: Tensor, src: Tensor, where: Tensor) -> Tensor:
    if not x.is_cpu or not len(x):
        return _rows(x, src)
    nowhere = (src == len(x)).nonzero().squeeze(1)
    out = x.index_select(0, src.index_fill(0, nowhere, 0) if len(nowhere) else src)
    return out.index_fill_(0, nowhere, 0) if len(nowhere) else out


@torch.library.custom_op("xtf::collect", mutates_args=())
def _collect(y: Tensor, src: Tensor, where: Tensor) -> Tensor:
    if not y.is_cpu or not len(y):
        return _summed(y, where)
    there = where < len(y)
    if there.all():
        return F.embedding_bag(where, y, mode="sum")  # one pass, several times as fast as adding up K gathers
    return F.embedding_bag(where[there], y, F.pad(there.sum(1), (1, 0)).cumsum(0)[:-1], mode="sum")


# `shape[0]` in what torch.compile traces, never `len`: that makes a number of a symbolic size, and each length a graph
_spread.register_fake(lambda x, src, where: x.new_empty(src.shape[0], x.shape[1]))
_collect.register_fake(lambda y, src, where: y.new_empty(where.shape[0], y.shape[1]))


def _keep_index(ctx, inputs, output):
    # Not through saved-tensor hooks: a checkpoint's recompute stops before a move whose adjoint needs nothing but
    # integers.
    ctx.index = inputs[1:]


_spread.register_autograd(lambda ctx, g: (torch.ops.xtf.collect(g, *ctx.index), None, None), setup_context=_keep_index)
_collect.register_autograd(lambda ctx, g: (torch.ops.xtf.spread(g, *ctx.index), None, None), setup_context=_keep_index)


# ---------------------------------------------------------------- products

def grouped_linear(x_ND: Tensor, node: dict, offsets_E: Tensor, axes: tuple[str, str] | None = None) -> Tensor:
    """Rows `offsets_E[e - 1]:offsets_E[e]` times expert e's weight [E, F, D], plus its bias [E, F] if `node` has one.

    Rows past the last offset come out as zeros, get zeros for gradient and cost nothing. `axes` = (in, out) logical
    names, for wrappers.
    FLOPs: 2 D F for each row up to the last offset, twice that in backward. Saves x and the weight. On CPU products go
    slice by slice into one buffer, and so do the weight's gradients: autograd sees one product. In bf16 on CUDA it is
    `F.grouped_mm`, which waits for nothing; other dtypes there read the offsets on the host. Raises ValueError if the
    weight does not hold one matrix an offset.

    >>> weight = torch.stack([torch.eye(2), 10 * torch.eye(2)])
    >>> grouped_linear(torch.ones(3, 2), {"weight": weight}, torch.tensor([1, 3]))[:, 0].tolist()
    [1.0, 10.0, 10.0]
    """
    weight_EFD, bias_EF = node["weight"], node.get("bias")
    if len(weight_EFD) != len(offsets_E):
        raise ValueError(f"grouped_linear {axes}: {len(offsets_E)} offsets but a weight of {len(weight_EFD)} experts; "
                         "they must be one to one")
    if functorch_active():
        return reference_grouped_linear(x_ND, weight_EFD, bias_EF, offsets_E)
    return torch.ops.xtf.grouped_linear(x_ND, weight_EFD, bias_EF, offsets_E)


def reference_grouped_linear(x_ND: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, offsets_E: Tensor) -> Tensor:
    """`grouped_linear` in plain torch, every expert on every row: its meaning, and what `torch.func` transforms see."""
    y_NF, start = x_ND.new_zeros(len(x_ND), weight_EFD.shape[1]), 0
    row_N1 = torch.arange(len(x_ND), device=x_ND.device)[:, None]
    for e, end in enumerate(offsets_E.unbind()):
        bias_F = None if bias_EF is None else bias_EF[e].to(x_ND.dtype)
        y_NF = torch.where((start <= row_N1) & (row_N1 < end), F.linear(x_ND, weight_EFD[e], bias_F), y_NF)
        start = end
    return y_NF


def _sizes(offsets_E: Tensor, num_rows: int) -> list[int]:
    """How many rows each expert has, and how many are nobody's."""
    ends = [0, *offsets_E.tolist(), num_rows]
    return [end - start for start, end in pairwise(ends)]


ALIGNED = 8                            # numbers of bf16 in 16 bytes, of which F.grouped_mm wants rows to be a multiple


def _grouped_on_device(*operands: Tensor) -> bool:
    """Whether `F.grouped_mm` takes them, once they are aligned: bf16 on CUDA, some of it."""
    return all(x.is_cuda and x.dtype is torch.bfloat16 and x.numel() for x in operands)


def _aligned(*operands: Tensor, dims: int = 1) -> list[Tensor]:
    """Operands with zeros after each of the last `dims` dims that is no multiple of 16 bytes (an adapter's rank of 4):
    they add nothing to a product."""
    gaps = [[gap for size in reversed(x.shape[-dims:]) for gap in (0, -size % ALIGNED)] for x in operands]
    return [F.pad(x, gap) if any(gap) else x for x, gap in zip(operands, gaps, strict=True)]


def _expert_of_row(offsets_E: Tensor, num_rows: int) -> Tensor:
    """[num_rows], E past the last offset."""
    return torch.searchsorted(offsets_E, torch.arange(num_rows, device=offsets_E.device), right=True)


def _past_the_end(y: Tensor, offsets_E: Tensor) -> Tensor:
    """`y` with zeros in the rows that `F.grouped_mm` does not write."""
    return y.masked_fill_(torch.arange(len(y), device=y.device)[:, None] >= offsets_E[-1], 0)


@torch.library.custom_op("xtf::grouped_linear", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    N, (E, num_out, _) = len(x), weight.shape
    if not N:                                                        # and no need to wait for offsets
        return x.new_zeros(0, num_out)
    if _grouped_on_device(x, weight):
        (x,), (weight,) = _aligned(x), _aligned(weight, dims=2)
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets.to(torch.int32))[:, :num_out].contiguous()
        if bias is not None:
            y += bias.to(y.dtype)[_expert_of_row(offsets, N).clamp_(max=E - 1)]
        return _past_the_end(y, offsets)
    dtype = product_dtype(x.dtype, x.device)
    y, sizes = x.new_empty(N, num_out, dtype=dtype), _sizes(offsets, N)
    *ys, rest = y.split(sizes)
    rest.zero_()
    for e, (x_nD, y_nF, w_FD) in enumerate(zip(x.to(dtype).split(sizes), ys, weight.unbind(), strict=False)):
        if not len(x_nD):
            continue
        if bias is None:
            torch.mm(x_nD, w_FD.to(dtype).T, out=y_nF)
        else:
            torch.addmm(bias[e].to(dtype), x_nD, w_FD.to(dtype).T, out=y_nF)
    return y.to(x.dtype)


@torch.library.custom_op("xtf::grouped_linear_backward", mutates_args=())
def _grouped_backward(g: Tensor, x: Tensor | None, weight: Tensor, offsets: Tensor, needs_x: bool,
                      needs_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the weight (where `x` is given) and the bias (at least float32); empty where not needed."""
    N, E, dtype = len(g), len(weight), product_dtype(g.dtype, g.device)
    dx, dweight, dbias = _empty_gradients(g, x, weight, offsets, needs_x, needs_bias)
    if not N:
        return dx, dweight.zero_(), dbias.zero_()
    g = g.contiguous()
    if _grouped_on_device(g, weight):
        (g_al, *x_al), (w_al,) = _aligned(g, *(() if x is None else (x,))), _aligned(weight, dims=2)
        offs, (_, num_out, D) = offsets.to(torch.int32), weight.shape
        if needs_x:
            dx = _past_the_end(F.grouped_mm(g_al, w_al, offs=offs)[:, :D].contiguous(), offsets)
        if x is not None:  # of experts without rows it is garbage on some devices
            rows_E = offsets.diff(prepend=offsets.new_zeros(1))
            dweight = F.grouped_mm(g_al.T, *x_al, offs=offs)[:, :num_out, :D].contiguous()
            dweight.masked_fill_((rows_E == 0)[:, None, None], 0)
        if needs_bias:  # rows of an expert summed by a product: no atomics
            of_EN = _expert_of_row(offsets, N) == torch.arange(E, device=g.device)[:, None]
            dbias = (of_EN.to(g.dtype) @ g).to(dbias.dtype)
        return dx, dweight, dbias
    sizes = _sizes(offsets, N)
    gs = g.to(dtype).split(sizes)
    if needs_x:
        wide = dx if dx.dtype == dtype else dx.to(dtype)
        *dxs, rest = wide.split(sizes)
        rest.zero_()
        for g_nF, w_FD, dx_nD in zip(gs, weight.unbind(), dxs, strict=False):
            if len(g_nF):
                torch.mm(g_nF, w_FD.to(dtype), out=dx_nD)
        dx = wide.to(dx.dtype)
    if x is not None:
        for g_nF, x_nD, dw_FD in zip(gs, x.to(dtype).split(sizes), dweight.unbind(), strict=False):
            if not len(g_nF):
                dw_FD.zero_()
            elif dw_FD.dtype == dtype:
                torch.mm(g_nF.T, x_nD, out=dw_FD)
            else:
                dw_FD.copy_(g_nF.T @ x_nD)
    if needs_bias:
        for g_nF, db_F in zip(gs, dbias.unbind(), strict=False):
            torch.sum(g_nF, 0, dtype=dbias.dtype, out=db_F)
    return dx, dweight, dbias


def _empty_gradients(g, x, weight, offsets, needs_x, needs_bias):
    E, num_out, D = weight.shape
    return (g.new_empty((g.shape[0], D) if needs_x else 0), weight.new_empty(0 if x is None else weight.shape),
            g.new_empty((E, num_out) if needs_bias else 0, dtype=at_least_float32(g.dtype)))


_grouped.register_fake(lambda x, weight, bias, offsets: x.new_empty(x.shape[0], weight.shape[1]))
_grouped_backward.register_fake(_empty_gradients)


def _save(ctx, inputs, output):
    x, weight, bias, offsets = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # a frozen weight (under lora) keeps no rows
    ctx.save_for_backward(x if weight.requires_grad else None, weight, offsets)


def _gradients(ctx, g):
    x, weight, offsets = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.xtf.grouped_linear_backward(g, x if needs_weight else None, weight, offsets, needs_x,
                                                               needs_bias)
    return (dx if needs_x else None, dweight if needs_weight else None,
            dbias.to(ctx.bias_dtype) if needs_bias else None, None)


_grouped.register_autograd(_gradients, setup_context=_save)


def _num_rows(x: Tensor, offsets: Tensor) -> int:
    """Rows that are multiplied; all, where the offsets cannot be read for nothing."""
    return int(offsets[-1]) if type(offsets) is Tensor and offsets.is_cpu else len(x)


@register_flop_formula(torch.ops.xtf.grouped_linear, get_raw=True)
def _flops(x, weight, bias, offsets, **_):
    return 2 * _num_rows(x, offsets) * weight.shape[1] * weight.shape[2]


@register_flop_formula(torch.ops.xtf.grouped_linear_backward, get_raw=True)
def _backward_flops(g, x, weight, offsets, needs_x, needs_bias, **_):
    return 2 * _num_rows(g, offsets) * weight.shape[1] * weight.shape[2] * (needs_x + (x is not None))
