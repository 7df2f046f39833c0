"""A model and a step written through public names alone, as a user would: what `assert_equivalent` is shown on.

P packs, t positions here, D embed, H heads, d head dim, F mlp, V vocabulary.
"""
from functools import partial

import torch
import torch.nn.functional as F

import xtf
from xtf.optim import adamw, chain, clip_by_global_norm
from xtf.spec import Normal

V, D, H, d, F_, L = 13, 8, 4, 2, 10, 2


def specs(dtype=torch.float64):
    P = lambda *shape_axes: xtf.Param(tuple(s for s, _ in shape_axes), dtype, tuple(a for _, a in shape_axes),
                                      Normal(0.3))
    D_, heads, mlp, vocab = (D, "embed"), (H * d, "heads"), (F_, "mlp"), (V, "vocab")
    layer = lambda: {"qkv": {n: {"weight": P(heads, D_), "bias": P(heads)} for n in "qkv"},
                     "o": {"weight": P(D_, heads)}, "up": {"weight": P(mlp, D_)}, "down": {"weight": P(D_, mlp)}}
    return {"embed": {"weight": P(vocab, D_)}, "layers": [layer() for _ in range(L)]}


def block(p, x_PtD, segments, ops):
    heads = lambda y: y.unflatten(-1, (-1, d))
    q, k, v = (heads(ops.linear(x_PtD, p["qkv"][n], ("embed", "heads"))) for n in "qkv")
    o_PtHd = ops.name(ops.attend, "attn_out")(q, k, v, segments=segments)
    x_PtD = x_PtD + ops.linear(o_PtHd.flatten(2), p["o"], ("heads", "embed"))
    h_PtF = torch.tanh(ops.linear(x_PtD, p["up"], ("embed", "mlp")))
    return x_PtD + ops.linear(h_PtF, p["down"], ("mlp", "embed")), None


def nll(params, batch, ops):
    embed = lambda p, ids: F.embedding(ids, p["weight"])
    x_PtD = ops.split(ops.use(embed, params["embed"], batch.input_ids))
    x_PtD, _ = ops.scan(partial(block, ops=ops), params["layers"], x_PtD, batch.segments)
    head = lambda p, x, y: F.cross_entropy(ops.linear(x, p, ("embed", "vocab")).flatten(0, 1), y.flatten(),
                                           reduction="none").view(y.shape)
    return ops.use(head, params["embed"], x_PtD, batch.labels)


opt = chain(clip_by_global_norm(0.05), adamw(1e-2))


def step(state, batch, ops=xtf.LOCAL, k=1, mean=False):
    num_tokens = batch.loss_tokens(ops)

    def share(params, batch, ops):
        total = (nll(params, batch, ops) * batch.loss_mask).sum()
        return total / (batch.loss_tokens() if mean else num_tokens)  # mean=True: the planted mistake
    loss, grads = xtf.microbatch(xtf.value_and_grad(share), k)(state.params, batch, ops)
    updates, new = opt.update(grads, state.opt, state.params, ops)
    return state.apply(updates, new), {"loss": loss}
