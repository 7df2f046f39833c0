"""The head's product and the cross-entropy of its logits in one, by chunks of tokens: all logits never exist at once.

`linear_cross_entropy` makes both gradients in forward, while a chunk's probabilities are there, so the three products
of the head are all that is ever computed. `token_logprobs`, whose cotangents are not known in forward, computes the
logits again in backward.

T tokens   n of them with weight   C tokens of a chunk   V vocabulary   D hidden
"""
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from xtf.kernels import as_cuda, at_least_float32, functorch_active, is_fake, product_dtype, traced

Tensor = torch.Tensor
# bytes of a column of operands (256 float32 tokens): less, and the passes over the weight's gradient show (7 % at half)
MIN_CHUNK = 1024
CPU_LOGITS, GPU_LOGITS = 2 ** 22, 2 ** 28        # elements of a chunk, where the vocabulary leaves room for more tokens


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, *,
                         z_loss: float = 0.0) -> Tensor:
    """The sum over tokens of `weights * (nll + z_loss * lse ** 2)`, lse the logsumexp of the logits `x @ weight.T`.

    `labels_T` int64; any valid id where `weights_T` is 0. Tokens of weight 0 are left out on CPU. Statistics and the
    gradients' sums are in at least float32, and so is the scalar returned (nats). Memory: one chunk of logits, and the
    two gradients. Logits of narrower inputs are float32 on CUDA; on CPU they carry the rounding of a product in the
    inputs' dtype.

    Raises ValueError where shapes do not fit or `weights_T` needs a gradient, RuntimeError at a second backward of one
    call without `retain_graph=True`. z-loss: PaLM (arXiv 2204.02311), section 5.

    >>> x, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> round(linear_cross_entropy(x, weight, torch.tensor([1, 2]), torch.tensor([1.0, 0.0])).item(), 4)    # ln 8
    2.0794
    """
    _check(x_TD, weight_VD, labels_T)
    if weights_T.shape != labels_T.shape or weights_T.requires_grad:
        raise ValueError(f"linear_cross_entropy: weights must have the labels' shape {tuple(labels_T.shape)} and need "
                         f"no gradient; got {tuple(weights_T.shape)}, requires_grad={weights_T.requires_grad} "
                         "(token_logprobs differentiates per token)")
    if functorch_active():
        return reference(x_TD, weight_VD, labels_T, weights_T, z_loss=z_loss)
    if traced():
        needs = torch.is_grad_enabled() and x_TD.requires_grad, torch.is_grad_enabled() and weight_VD.requires_grad
        return torch.ops.xtf.linear_cross_entropy(x_TD, weight_VD, labels_T, weights_T, z_loss, *needs)[0]
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, weights_T, z_loss)  # type: ignore[return-value]
    return _loss_and_gradients(x_TD, weight_VD, labels_T, weights_T, z_loss, False, False)[0]


def token_logprobs(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The log-probability [T] of each label under logits `x @ weight.T`, in at least float32.

    Backward computes the logits again by chunks, of the tokens whose cotangent is not 0 (on CUDA of all). Raises
    ValueError where shapes do not fit.

    >>> token_logprobs(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2])).exp().tolist()
    [0.125, 0.125]
    """
    _check(x_TD, weight_VD, labels_T)
    if functorch_active():
        return reference_logprobs(x_TD, weight_VD, labels_T)
    if traced():
        return torch.ops.xtf.token_logprobs(x_TD, weight_VD, labels_T)
    return _TokenLogprobs.apply(x_TD, weight_VD, labels_T)  # type: ignore[return-value]


def reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, *, z_loss: float = 0.0) -> Tensor:
    """`linear_cross_entropy` in plain torch, all logits at once: its meaning, and what `torch.func` transforms see."""
    logits_TV = _plain_logits(x_TD, weight_VD)
    lse_T = logits_TV.logsumexp(-1)
    nll_T = lse_T - logits_TV.gather(-1, labels_T[:, None]).squeeze(-1)
    return (weights_T * (nll_T + z_loss * lse_T.square())).sum()


def reference_logprobs(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """`token_logprobs` in plain torch, all logits at once."""
    logits_TV = _plain_logits(x_TD, weight_VD)
    return logits_TV.gather(-1, labels_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)


def _plain_logits(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
    x_TD, weight_VD = _operands(x_TD, weight_VD)
    return F.linear(x_TD, weight_VD).to(at_least_float32(x_TD.dtype))


def _check(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> None:
    if (x_TD.dim() != 2 or weight_VD.dim() != 2 or x_TD.shape[1] != weight_VD.shape[1]
            or labels_T.shape != x_TD.shape[:1]):
        raise ValueError(f"x {tuple(x_TD.shape)} [T, D], weight {tuple(weight_VD.shape)} [V, D] and labels "
                         f"{tuple(labels_T.shape)} [T] do not fit; flatten packs and positions to T first")


# ---------------------------------------------------------------- products

def _operands(x_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which their products are computed."""
    dtype = product_dtype(torch.promote_types(x_TD.dtype, weight_VD.dtype), x_TD.device)
    return x_TD.to(dtype), weight_VD.to(dtype)


def _chunks(x_nD: Tensor, V: int) -> Iterator[slice]:
    """Slices of about equal length."""
    n, logits = len(x_nD), CPU_LOGITS if x_nD.device.type == "cpu" else GPU_LOGITS
    size = max(MIN_CHUNK // x_nD.dtype.itemsize, logits // V)
    size = math.ceil(n / math.ceil(n / size)) if n else 1
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def _product(a: Tensor, b: Tensor, out: Tensor, narrow: Tensor | None = None) -> Tensor:
    """`out = a @ b`, `out` in at least float32; on CPU the product is made in the dtype of a and b, in `narrow`."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if as_cuda(a):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b) if narrow is None else torch.mm(a, b, out=narrow))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, with `total` in at least float32. The out= forms are the ones that FlopCounterMode counts."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif as_cuda(a):
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:  # widened in pieces that stay in cache: torch's sum over two dtypes takes five times as long
        for total_part, part in zip(total.split(512), torch.mm(a, b).split(512), strict=True):
            total_part += part.to(total.dtype)


def _to_probs(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into probabilities in place, each row `total` times too large. Returns (label's logit, logsumexp,
    total), all [C]; on a CPU in float64.

    The largest probability is exp(0) / sum, and never underflows; one fused softmax and two maxima are the fewest
    passes that torch has. A CPU's softmax adds a row up in float32, lane by lane, and its sum is off by up to 4e-5 at
    150,000 logits. So what came out is added up once more, by `sum`, which is off by 1e-7: a row's total is the true
    sum over the one that softmax divided by.
    """
    exact = logits_CV.dtype if logits_CV.device.type != "cpu" else torch.float64
    label_C, top_C = logits_CV.gather(1, labels_C1).squeeze(1).to(exact), logits_CV.amax(-1).to(exact)
    torch.softmax(logits_CV, -1, out=logits_CV)
    largest_C = logits_CV.amax(-1).to(exact)
    total_C = torch.ones_like(top_C) if exact == logits_CV.dtype != torch.float64 else logits_CV.sum(-1).to(exact)
    return label_C, top_C + (total_C / largest_C).log(), total_C


# ---------------------------------------------------------------- the loss

def _loss_and_gradients(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, z_loss: float,
                        needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients, in at least float32; the gradient of x for all T tokens."""
    T = len(x_TD)
    readable = x_TD.device.type == "cpu" and not is_fake(weights_T)  # counting on CUDA would wait for the device
    chosen = weights_T.nonzero().squeeze(1) if readable else None
    if chosen is not None and len(chosen) < T:
        x_TD, labels_T, weights_T = (t.index_select(0, chosen) for t in (x_TD, labels_T, weights_T))
    x_nD, weight_VD = _operands(x_TD, weight_VD)
    (n, D), V, wide = x_nD.shape, len(weight_VD), at_least_float32(x_nD.dtype)
    weights_n = weights_T.to(wide)
    loss = x_nD.new_zeros((), dtype=torch.float64 if x_nD.device.type == "cpu" else wide)
    dx_nD = x_nD.new_empty(n, D, dtype=wide) if needs_x else None
    dweight_VD = x_nD.new_empty(V, D, dtype=wide) if needs_weight and n else None
    buffer = narrow = None
    for at in _chunks(x_nD, V):
        x_CD, weights_C, labels_C1 = x_nD[at], weights_n[at], labels_T[at, None]
        if buffer is None or narrow is None:  # the first chunk is the longest
            buffer = x_nD.new_empty(len(x_CD), V, dtype=wide)
            # products, then probabilities, in their dtype
            narrow = buffer if wide == x_nD.dtype else x_nD.new_empty(len(x_CD), V)
        d_CV = _product(x_CD, weight_VD.T, buffer[:len(x_CD)], narrow[:len(x_CD)])
        label_C, lse_C, total_C = _to_probs(d_CV, labels_C1)
        loss += (weights_C * (lse_C - label_C + z_loss * lse_C.square())).sum()
        if dx_nD is None and dweight_VD is None:
            continue
        if z_loss:
            d_CV.mul_((1 + 2 * z_loss * lse_C).to(wide)[:, None])
        d_CV.scatter_add_(1, labels_C1, -total_C.to(wide)[:, None])
        weights_C = (weights_C / total_C).to(wide)
        d_CV = d_CV if narrow is buffer else narrow[:len(x_CD)].copy_(d_CV)
        if dweight_VD is not None:               # the tokens' weights multiply rows of D numbers, not of V
            rows_CD = (x_CD * weights_C[:, None]).to(x_CD.dtype)
            if at.start == 0:
                _product(d_CV.T, rows_CD, dweight_VD)
            else:
                _add_product(dweight_VD, d_CV.T, rows_CD)
        if dx_nD is not None:
            _product(d_CV, weight_VD, dx_nD[at]).mul_(weights_C[:, None])
    if needs_weight and dweight_VD is None:
        dweight_VD = x_nD.new_zeros(V, D, dtype=wide)
    if dx_nD is not None and n < T:
        assert chosen is not None
        dx_nD = dx_nD.new_zeros(T, D).index_copy_(0, chosen, dx_nD)
    return loss.to(wide), dx_nD, dweight_VD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, weights, z_loss):
        ctx.dtypes = x.dtype, weight.dtype
        loss, *ctx.gradients = _loss_and_gradients(x, weight, labels, weights, z_loss, *ctx.needs_input_grad[:2])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients, made in forward, were handed out; say "
                               "retain_graph=True in the first backward")
        # with retain_graph they may be asked for again
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
        gradients, ctx.gradients = ctx.gradients, (ctx.gradients if again else None)
        dx, dweight = (None if d is None else _scaled(d, g, dtype, again)
                       for d, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dx, dweight, None, None, None


def _scaled(d: Tensor, g: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    """`g * d` rounded once to `dtype`; in place unless `keep`."""
    if keep:
        return (d * g).to(dtype)
    return (d if d.device.type == "cpu" and not is_fake(g) and g.item() == 1 else d.mul_(g)).to(dtype)


# ---------------------------------------------------------------- log-probabilities of single tokens

def _logprobs(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    x_TD, weight_VD = _operands(x_TD, weight_VD)
    out_T = x_TD.new_empty(len(x_TD), dtype=at_least_float32(x_TD.dtype))
    buffer = None
    for at in _chunks(x_TD, len(weight_VD)):
        buffer = out_T.new_empty(len(x_TD[at]), len(weight_VD)) if buffer is None else buffer
        label_C, lse_C, _ = _to_probs(_product(x_TD[at], weight_VD.T, buffer[:len(x_TD[at])]), labels_T[at, None])
        out_T[at] = label_C - lse_C
    return out_T


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T):
        ctx.save_for_backward(x_TD, weight_VD, labels_T)
        return _logprobs(x_TD, weight_VD, labels_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_T):
        x_TD, weight_VD, labels_T = ctx.saved_tensors
        _, dx, dweight = _loss_and_gradients(x_TD, weight_VD, labels_T, -g_T, 0.0, *ctx.needs_input_grad[:2])
        return None if dx is None else dx.to(x_TD.dtype), None if dweight is None else dweight.to(weight_VD.dtype), None


# ---------------------------------------- the same as operators, for torch.compile and the modes that look at operators

@torch.library.custom_op("xtf::linear_cross_entropy", mutates_args=())
def _op(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, z_loss: float, needs_x: bool,
        needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss, dx, dweight = _loss_and_gradients(x, weight, labels, weights, z_loss, needs_x, needs_weight)
    return loss, loss.new_empty(0) if dx is None else dx, loss.new_empty(0) if dweight is None else dweight


@_op.register_fake
def _(x, weight, labels, weights, z_loss, needs_x, needs_weight):
    empty = lambda *shape: x.new_empty(shape, dtype=at_least_float32(torch.promote_types(x.dtype, weight.dtype)))
    return empty(), empty(*x.shape) if needs_x else empty(0), empty(*weight.shape) if needs_weight else empty(0)


def _save(ctx, inputs, output):
    x, weight, *_, needs_x, needs_weight = inputs
    ctx.needs, ctx.dtypes = (needs_x, needs_weight), (x.dtype, weight.dtype)
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, g, *_):
    scaled = [(d * g).to(dtype) if needs else None
              for d, dtype, needs in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)]
    return *scaled, None, None, None, None, None


_op.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("xtf::token_logprobs", mutates_args=())
def _logprobs_op(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _logprobs(x, weight, labels)


@_logprobs_op.register_fake
def _(x, weight, labels):
    return x.new_empty(x.shape[0], dtype=at_least_float32(torch.promote_types(x.dtype, weight.dtype)))


def _logprobs_gradients(ctx, g):
    (x, weight, labels), (needs_x, needs_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
    _, dx, dweight = torch.ops.xtf.linear_cross_entropy(x, weight, labels, -g, 0.0, needs_x, needs_weight)
    return dx.to(x.dtype) if needs_x else None, dweight.to(weight.dtype) if needs_weight else None, None


_logprobs_op.register_autograd(_logprobs_gradients,
                               setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@register_flop_formula(torch.ops.xtf.linear_cross_entropy, get_raw=True)
def _flops(x, weight, labels, weights, z_loss, needs_x, needs_weight, **_):
    """A product for the logits, one for each gradient; of tokens with weight, where weights can be read for free."""
    n = int(weights.count_nonzero()) if type(weights) is Tensor and weights.device.type == "cpu" else len(x)
    return 2 * n * weight.numel() * (1 + needs_x + needs_weight)


@register_flop_formula(torch.ops.xtf.token_logprobs)
def _logprobs_flops(x_shape, weight_shape, *_, **__):
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
