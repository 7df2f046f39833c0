"""Causal attention inside each document of a pack.

On CPU, blocks of queries meet the keys that they may see in batched products: measured 1.25 to 1.6 times as fast as
torch's flash kernel at documents of 64 to 1024 tokens, and more in half precision, where they compute in float32. Small
calls go to torch's masked attention, for the host's sake. On CUDA it is flash attention over varying lengths.

P packs   T positions of a pack   S documents   H query heads   K key-value heads   G = H / K   d head dim
e head dim of values (MLA's differs from d)   B queries of a block   R = B * G its rows   W keys that it meets
"""
import bisect
from collections.abc import Callable, MutableMapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from xtf.kernels import as_cuda, at_least_float32, functorch_active, traced

Tensor = torch.Tensor
BLOCK = 64                      # queries of a block: 32 loses at long documents, 128 wastes a diagonal twice as wide
SMALL = 2 ** 22                 # multiplications of a call, P * T * T * H * d, below which the host's time decides
KEPT_KEYS = 4  # probabilities are saved for backward where a query meets at most 4 * d keys, else computed again


def attend(q_PTHd: Tensor, k_PTKd: Tensor, v_PTKe: Tensor, *, segments: Tensor, window: int | None = None,
           scale: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """Causal attention in which a token sees the tokens of its own document alone. Returns o_PTHe in the dtype of q.

    `segments` [P, S + 1] int32: cumulative document lengths, from 0, padded with T. `window` w: a query sees itself and
    the w - 1 tokens before it. `scale` multiplies the scores (default d ** -0.5). `sinks` [H]: the score of one more
    key, with value zero, that every query sees (GPT-OSS). Query heads in groups of H / K share a key-value head.
    Statistics are in at least float32. On CUDA `segments.longest`, as a `Batch` tells it, spares empty blocks.

    Raises ValueError where shapes do not fit.

    >>> q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    >>> o = attend(q, k, v, segments=torch.tensor([[0, 3, 5]], dtype=torch.int32))
    >>> torch.allclose(o[0, 3, :2], v[0, 3, :1])        # a document's first token sees itself alone
    True
    """
    _check(q_PTHd, k_PTKd, v_PTKe, segments, window, sinks)
    if functorch_active():
        return reference_attend(q_PTHd, k_PTKd, v_PTKe, segments=segments, window=window, scale=scale, sinks=sinks)
    T, factor = q_PTHd.shape[1], q_PTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    if as_cuda(q_PTHd):
        return _attend_cuda(q_PTHd, k_PTKd, v_PTKe, segments, window, factor, sinks)
    if q_PTHd.device.type != "cpu":
        return _attend_masked(q_PTHd, k_PTKd, v_PTKe, segments, window, factor, sinks)
    if traced():                                                               # one operator, with formulas
        return torch.ops.xtf.attend(q_PTHd, k_PTKd, v_PTKe, sinks, segments, window, factor)
    if sinks is None and T * q_PTHd.numel() <= SMALL:
        return _attend_masked(q_PTHd, k_PTKd, v_PTKe, segments, window, factor, None)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q_PTHd, k_PTKd, v_PTKe, sinks)):
        return _Attend.apply(q_PTHd, k_PTKd, v_PTKe, sinks, segments, window, factor)  # type: ignore[return-value]
    return _forward(q_PTHd, k_PTKd, v_PTKe, sinks, _once(segments, _blocks, T, window), factor, None)


def reference_attend(q_PTHd: Tensor, k_PTKd: Tensor, v_PTKe: Tensor, *, segments: Tensor, window: int | None = None,
                     scale: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """`attend` in plain torch, from a mask: the meaning of the fast versions, and what `torch.func` transforms see."""
    (P, T, H, d), K = q_PTHd.shape, k_PTKd.shape[2]
    wide = at_least_float32(q_PTHd.dtype)
    q_PKGTd = q_PTHd.unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).to(wide)
    k_PK1Td, v_PK1Te = (x.transpose(1, 2).unsqueeze(2).to(wide) for x in (k_PTKd, v_PTKe))
    scores = q_PKGTd @ k_PK1Td.transpose(-1, -2) * (d ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible(segments, T, window)[:, None, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).view(1, K, -1, 1, 1).expand(P, -1, -1, T, 1)], -1)
    probs = scores.softmax(-1)[..., :T]
    return (probs @ v_PK1Te).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q_PTHd.dtype)


def visible(segments: Tensor, T: int, window: int | None = None) -> Tensor:
    """[P, T, T] bool: whether the query (dim 1) sees the key (dim 2).

    >>> visible(torch.tensor([[0, 2, 4]]), 4).int()[0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    at_T = torch.arange(T, device=segments.device)
    document_PT = (at_T[:, None] >= segments[:, None, 1:]).sum(-1)
    back_TT = at_T[:, None] - at_T
    seen_TT = back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)
    return (document_PT[:, :, None] == document_PT[:, None, :]) & seen_TT


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int | None, sinks: Tensor | None) -> None:
    if (k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]
            or segments.shape[0] != q.shape[0]):
        raise ValueError(f"attend: q {tuple(q.shape)} [P, T, H, d], k {tuple(k.shape)} [P, T, K, d], v "
                         f"{tuple(v.shape)} [P, T, K, e] and segments {tuple(segments.shape)} [P, S + 1] do not fit: "
                         "P, T, d must agree and K divide H")
    if window is not None and window < 1:
        raise ValueError(f"attend: window={window} hides every key; it counts the query itself, so it is at least 1 "
                         "(None: no window)")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"attend: sinks has shape {tuple(sinks.shape)}; expected one a query head, ({q.shape[2]},)")


# ---------------------------------------------------------------- CPU

class Block(NamedTuple):
    """Queries start:stop of a pack and the keys low:stop that any of them sees; some do not see those before `high`."""
    pack: int
    start: int
    stop: int
    low: int
    high: int
    first_T: Tensor | None      # the first key that each query of the pack sees; None if no block of the pack needs it


def _blocks(segments: Tensor, T: int, window: int | None) -> list[Block]:
    """Cut each pack into blocks of at most BLOCK queries, at ends of documents where that leaves half a block."""
    blocks: list[Block] = []
    for pack, ends in enumerate(segments.tolist()):
        start, spans = 0, []                                                   # (start, stop, low, high)
        while start < T:
            stop = min(start + BLOCK, T)
            end = ends[bisect.bisect_right(ends, stop) - 1]
            stop = end if end >= start + BLOCK // 2 else stop
            low, high = (ends[bisect.bisect_right(ends, i) - 1] for i in (start, stop - 1))
            if window is not None:
                low, high = max(low, start - window + 1), max(high, stop - window)
            spans.append((start, stop, low, high))
            start = stop
        first_T = None
        if any(high > low for _, _, low, high in spans):
            first_T = segments[pack, :-1].repeat_interleave(segments[pack].diff())
            if window is not None:
                first_T = torch.maximum(first_T, torch.arange(1 - window, T + 1 - window, dtype=first_T.dtype))
        blocks += [Block(pack, start, stop, low, high, first_T) for start, stop, low, high in spans]
    return blocks


_seen: MutableMapping[Tensor, dict] = WeakIdKeyDictionary()


def _once(segments: Tensor, make: Callable[..., Any], *args: Any) -> Any:
    """`make(segments, *args)`, made once for all layers that are called with this tensor, and forgotten with it.

    What is made under a mode (a plan's) may have no numbers: it is not kept, real calls would find it.
    """
    if segments.is_inference() or torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return make(segments, *args)
    known, key = _seen.setdefault(segments, {}), (make, segments._version, *args)
    if key not in known:
        known[key] = make(segments, *args)
    return known[key]


def _queries(x_PTHd: Tensor, b: Block, K: int) -> Tensor:
    """A block's queries as a view [K, B, G, d]. (`as_strided` is one call where indexing and transposing are five.)"""
    (sp, st, sh, sd), G = x_PTHd.stride(), x_PTHd.shape[2] // K
    return x_PTHd.as_strided((K, b.stop - b.start, G, x_PTHd.shape[3]), (G * sh, st, sh, sd),
                             x_PTHd.storage_offset() + b.pack * sp + b.start * st)


def _keys(x_PTKd: Tensor, b: Block) -> Tensor:
    """The keys (values) that a block meets, as a view [K, W, d]."""
    (_, _, K, d), (sp, st, sh, sd) = x_PTKd.shape, x_PTKd.stride()
    return x_PTKd.as_strided((K, b.stop - b.low, d), (sh, st, sd), x_PTKd.storage_offset() + b.pack * sp + b.low * st)


def _kept(b: Block, d: int) -> bool:
    """Whether a block's probabilities are saved for backward."""
    return b.stop - b.low <= KEPT_KEYS * d


class _Scores:
    """Makes probabilities, in room for the largest block's scores, with what the blocks of a call share."""

    def __init__(self, blocks: list[Block], q_PTHd: Tensor, sinks_KG: Tensor | None, scale: float):
        self.front = int(sinks_KG is not None)  # a sink's scores stand before those of the keys
        self.size = q_PTHd.shape[2] * max(((b.stop - b.start) * (self.front + b.stop - b.low) for b in blocks),
                                          default=0)
        tall = max((b.stop - b.start for b in blocks), default=0)
        self.later_BB = q_PTHd.new_full((tall, tall), -torch.inf).triu_(1)     # a key after its query
        self.sinks_KG, self.scale = sinks_KG, scale

    def room(self, n: int) -> Tensor:
        return self.later_BB.new_empty(n, self.size)

    def probs(self, q_KRd: Tensor, k_KWd: Tensor, b: Block, buffer: Tensor | None) -> Tensor:
        """A block's probabilities [K, R, front + W], in `buffer` if there is one."""
        (K, R, _), B = q_KRd.shape, b.stop - b.start
        shape = K, R, self.front + b.stop - b.low
        s_KRW = q_KRd.new_empty(shape) if buffer is None else buffer[:shape[0] * shape[1] * shape[2]].view(shape)
        keys = s_KRW[..., self.front:] if self.front else s_KRW
        torch.baddbmm(keys, q_KRd, k_KWd.transpose(1, 2), beta=0, alpha=self.scale, out=keys)
        s_KBGW = s_KRW.view(K, B, R // B, -1)
        s_KBGW[..., -B:].add_(self.later_BB[:B, None, :B])
        if b.high > b.low:
            hidden_BW = torch.arange(b.low, b.high) < b.first_T[b.start:b.stop, None]  # type: ignore[index]
            s_KBGW[..., self.front:self.front + b.high - b.low].masked_fill_(hidden_BW[:, None], -torch.inf)
        if self.sinks_KG is not None:
            s_KBGW[..., 0] = self.sinks_KG[:, None]
        return torch.softmax(s_KRW, -1, out=s_KRW)


def _widened(*xs: Tensor) -> list[Tensor]:
    return [x.to(at_least_float32(x.dtype)) for x in xs]


def _groups(sinks: Tensor | None, K: int) -> Tensor | None:
    return None if sinks is None else sinks.to(at_least_float32(sinks.dtype)).view(K, -1)


def _forward(q_PTHd: Tensor, k_PTKd: Tensor, v_PTKe: Tensor, sinks: Tensor | None, blocks: list[Block], scale: float,
             kept: list[Tensor] | None) -> Tensor:
    """o_PTHe; `kept` (if a list) receives the probabilities that backward will not have to compute again."""
    o_PTHe, K = q_PTHd.new_empty(*q_PTHd.shape[:3], v_PTKe.shape[3]), k_PTKd.shape[2]
    q, k, v = _widened(q_PTHd, k_PTKd, v_PTKe)
    scores, buffer = _Scores(blocks, q, _groups(sinks, K), scale), None
    for b in blocks:
        q_KBGd, k_KWd, v_KWe, o_KBGe = _queries(q, b, K), _keys(k, b), _keys(v, b), _queries(o_PTHe, b, K)
        keep = kept is not None and _kept(b, q.shape[-1])
        buffer = scores.room(1)[0] if buffer is None and not keep else buffer
        p_KRW = scores.probs(q_KBGd.reshape(K, -1, q.shape[-1]), k_KWd, b, None if keep else buffer)
        o_KBGe.copy_(torch.bmm(p_KRW[..., scores.front:], v_KWe).view(o_KBGe.shape))
        if keep:
            kept.append(p_KRW)  # type: ignore[union-attr]
    return o_PTHe


def _backward(g_PTHe: Tensor, q_PTHd: Tensor, k_PTKd: Tensor, v_PTKe: Tensor, sinks: Tensor | None, blocks: list[Block],
              scale: float, kept: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and sinks; `kept` as forward left it, or empty: then probabilities are made again."""
    dq_PTHd, K, d = torch.empty_like(q_PTHd, memory_format=torch.contiguous_format), *k_PTKd.shape[2:]
    g, q, k, v = _widened(g_PTHe, q_PTHd, k_PTKd, v_PTKe)
    dk, dv, sinks_KG = k.new_zeros(k.shape), v.new_zeros(v.shape), _groups(sinks, K)
    dsinks_KG, saved = None if sinks_KG is None else torch.zeros_like(sinks_KG), iter(kept)
    scores = _Scores(blocks, q, sinks_KG, scale)
    buffers = scores.room(2)
    for b in blocks:
        g_KBGe, q_KBGd, dq_KBGd = _queries(g, b, K), _queries(q, b, K), _queries(dq_PTHd, b, K)
        k_KWd, v_KWe = _keys(k, b), _keys(v, b)
        dk_KWd, dv_KWe = _keys(dk, b), _keys(dv, b)
        q_KRd, g_KRe = q_KBGd.reshape(K, -1, d), g_KBGe.reshape(K, -1, g.shape[-1])
        p_KRW = next(saved) if kept and _kept(b, d) else scores.probs(q_KRd, k_KWd, b, buffers[0])
        dv_KWe.baddbmm_(p_KRW[..., scores.front:].transpose(1, 2), g_KRe)
        ds_KRW = buffers[1, :p_KRW.numel()].view(p_KRW.shape)
        torch.bmm(g_KRe, v_KWe.transpose(1, 2), out=ds_KRW[..., scores.front:])
        if scores.front:
            ds_KRW[..., 0] = 0                                                 # a sink's value is zero
        torch._softmax_backward_data(ds_KRW, p_KRW, -1, p_KRW.dtype, grad_input=ds_KRW)
        if dsinks_KG is not None:
            dsinks_KG += ds_KRW[..., 0].unflatten(1, (-1, dsinks_KG.shape[1])).sum(1)
        ds_KRW = ds_KRW[..., scores.front:]
        dq_KBGd.copy_(torch.baddbmm(q_KRd, ds_KRW, k_KWd, beta=0, alpha=scale).view(q_KBGd.shape))
        dk_KWd.baddbmm_(ds_KRW.transpose(1, 2), q_KRd, alpha=scale)
    dsinks = None if sinks is None or dsinks_KG is None else dsinks_KG.view(-1).to(sinks.dtype)
    return dq_PTHd, dk.to(k_PTKd.dtype), dv.to(v_PTKe.dtype), dsinks


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, segments, window, scale):
        ctx.blocks, ctx.scale, kept = _once(segments, _blocks, q.shape[1], window), scale, []
        o = _forward(q, k, v, sinks, ctx.blocks, scale, kept)
        ctx.save_for_backward(q, k, v, sinks, *kept)  # through autograd, so that remat and offload see them
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v, sinks, *kept = ctx.saved_tensors
        return *_backward(g, q, k, v, sinks, ctx.blocks, ctx.scale, kept), None, None, None


# ------------------------------------------------- one operator, for torch.compile and the modes that look at operators

@torch.library.custom_op("xtf::attend", mutates_args=(), device_types="cpu")
def _op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor, window: int | None,
        scale: float) -> Tensor:
    return _forward(q, k, v, sinks, _blocks(segments, q.shape[1], window), scale, None)


@torch.library.custom_op("xtf::attend_backward", mutates_args=(), device_types="cpu")
def _op_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor, window: int | None,
                 scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dsinks = _backward(g, q, k, v, sinks, _blocks(segments, q.shape[1], window), scale, [])
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@_op.register_fake
def _(q, k, v, sinks, segments, window, scale):
    return q.new_empty(*q.shape[:3], v.shape[3])


@_op_backward.register_fake
def _(g, q, k, v, sinks, segments, window, scale):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save(ctx, inputs, output):
    q, k, v, sinks, segments, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, sinks, segments)


def _op_gradients(ctx, g):
    q, k, v, sinks, segments = ctx.saved_tensors
    dq, dk, dv, dsinks = torch.ops.xtf.attend_backward(g, q, k, v, sinks, segments, ctx.window, ctx.scale)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None


_op.register_autograd(_op_gradients, setup_context=_save)


def attention_pairs(segments: Tensor, T: int, window: int | None = None) -> int:
    """How many (query, key) pairs of one head see each other; of a fake tensor, as if each pack were one document.

    >>> attention_pairs(torch.tensor([[0, 2, 5]]), 5), attention_pairs(torch.tensor([[0, 2, 5]]), 5, window=2)
    (9, 8)
    """
    real = type(segments) is Tensor and segments.device.type != "meta"
    ends_of = segments.tolist() if real else [[0, T]] * len(segments)
    pairs = 0
    for ends in ends_of:
        for n in (b - a for a, b in pairwise(ends)):
            w = n if window is None else min(n, window)
            pairs += w * n - w * (w - 1) // 2
    return pairs


@register_flop_formula(torch.ops.xtf.attend, get_raw=True)
def _flops(q, k, v, sinks, segments, window, scale, *, out_val=None, **_):
    return 2 * attention_pairs(segments, q.shape[1], window) * q.shape[2] * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.xtf.attend_backward, get_raw=True)
def _flops_backward(g, q, k, v, sinks, segments, window, scale, *, out_val=None, **_):
    return attention_pairs(segments, q.shape[1], window) * q.shape[2] * (6 * q.shape[3] + 4 * v.shape[3])


# ---------------------------------------------------------------- accelerators

# Asked once: whether this torch was built with flash attention. The device `meta` stands for one that was.
FLASH = bool(torch.version.cuda or torch.version.hip) and torch.backends.cuda.is_flash_attention_available()


def _attend_cuda(q_PTHd: Tensor, k_PTKd: Tensor, v_PTKe: Tensor, segments: Tensor, window: int | None, scale: float,
                 sinks: Tensor | None) -> Tensor:
    """Flash attention over one list of cumulative lengths, made on the device; what it does not take, by a mask.

    The kernel starts blocks for each document as if it were the longest, whose length the host has to know: it is what
    `xtf.data.Batch` tells with its segments, or else all of T.
    """
    (P, T, _, d), e = q_PTHd.shape, v_PTKe.shape[3]
    if not (FLASH or q_PTHd.is_meta) or q_PTHd.dtype.itemsize != 2 or d % 8 or d > 256 or e > d:
        return _attend_masked(q_PTHd, k_PTKd, v_PTKe, segments, window, scale, sinks)
    first_P1 = torch.arange(0, P * T, T, device=segments.device, dtype=torch.int32)[:, None]
    ends = F.pad((segments[:, :-1] + first_P1).flatten(), (0, 1), value=P * T)  # documents of no token are harmless
    q, k, v = (x.flatten(0, 1) for x in (q_PTHd, k_PTKd, F.pad(v_PTKe, (0, d - e)) if e < d else v_PTKe))
    longest = getattr(segments, "longest", T)                        # torch.compile guards it like any other number
    o = _Flash.apply(q, k, v, sinks, ends, longest, window, scale)
    return o.unflatten(0, (P, T))[..., :e]  # type: ignore[union-attr]


class _Flash(torch.autograd.Function):
    """Flash attention [N, H, d], grouped heads as they are; and its softmax may have one more key, a sink, of which the
    kernel knows nothing.

    The kernel itself is called, not torch.nn.attention.varlen: in torch 2.11 that knows no grouped heads, though the
    kernel does, and gives a window (-1, 0) where there is none, with which FlashAttention 4 refuses to go backward.

    With sinks outputs shrink by the sink's part of the total. Backward is the kernel's own, given the shrunk outputs
    and the grown logsumexp: its probabilities are exp(score - logsumexp), and what it subtracts from their gradients is
    grad · output, also where a key has value zero.
    """
    @staticmethod
    def forward(ctx, q, k, v, sinks, ends, longest, window, scale):
        ctx.longest, ctx.options = longest, _flash_options(window, scale)
        o, lse_HN, *ctx.state = _flash(q, k, v, ends, longest, ctx.options)
        if sinks is not None:
            total_HN = torch.logaddexp(lse_HN, sinks.float()[:, None])
            o, lse_HN = (o * (lse_HN - total_HN).exp().T[..., None]).to(o.dtype), total_HN
        ctx.save_for_backward(q, k, v, sinks, ends, o, lse_HN)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v, sinks, ends, o, lse_HN = ctx.saved_tensors
        dq, dk, dv = _flash_backward(g.contiguous(), q, k, v, o, lse_HN, ends, ctx.longest, ctx.options, ctx.state)
        dsinks = None
        if sinks is not None:
            dsinks = -((sinks.float()[:, None] - lse_HN).exp() * (g.float() * o.float()).sum(-1).T).sum(1)
            dsinks = dsinks.to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None, None


def _flash_options(window: int | None, scale: float) -> dict[str, Any]:
    windows = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {"is_causal": window is None, "scale": scale, **windows}


def _flash(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Outputs [N, H, d], logsumexps [H, N], and two tensors of random state that backward asks for."""
    return torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, return_debug_mask=False,
                                                   **options)[:4]


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_HN: Tensor, ends: Tensor, longest: int,
                    options: dict[str, Any], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    seed, unused = state
    return torch.ops.aten._flash_attention_backward(g, q, k, v, o, lse_HN, ends, ends, longest, longest, 0.0,
                                                    rng_state=seed, unused=unused, **options)


def _attend_masked(q_PTHd: Tensor, k_PTKd: Tensor, v_PTKe: Tensor, segments: Tensor, window: int | None, scale: float,
                   sinks: Tensor | None) -> Tensor:
    if sinks is not None:
        return reference_attend(q_PTHd, k_PTKd, v_PTKe, segments=segments, window=window, scale=scale, sinks=sinks)
    T = q_PTHd.shape[1]
    mask = visible(segments, T, window) if traced() else _once(segments, visible, T, window)
    q, k, v = (x.transpose(1, 2) for x in (q_PTHd, k_PTKd, v_PTKe))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=True)
    return o.transpose(1, 2)
