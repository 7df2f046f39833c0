"""What the families with experts share: qwen3_moe and gpt_oss the decoder, those and deepseek_v3 what is made of a
decoder that also tells what its routers did.

P packs   t positions here   T positions of a pack   D hidden   d head dim   K experts of a token
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from xtf import moe, nn
from xtf.data.batch import Batch
from xtf.ops import LOCAL, Ops


class SparseConfig(nn.ModelConfig, Protocol):
    """What is read of a family's `Config` that has experts. `windows`: for each layer how many tokens a query sees,
    itself included; None where that is its whole document."""
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def router(self) -> moe.Router: ...


def decoder(params: dict, batch: Batch, cfg: SparseConfig, ops: Ops, routes: Sequence[torch.Tensor] | None = None, *,
            block: Callable) -> tuple[torch.Tensor, list[dict | None]]:
    """What the last layer returns, [P, t, D], and what each layer's router did (None where there is none).

    `block` is the family's layer; its `xs` are its window and the recorded choice of experts to replay, if any.
    """
    x_PtD = ops.use(partial(nn.embed, cfg=cfg), params["embed"], ops.split(batch.input_ids))
    cos_PTd, sin_PTd = nn.rope(cfg.rope, cfg.head_dim, batch.positions, batch.segments, x_PtD.dtype)
    shared = ops.split(cos_PTd), ops.split(sin_PTd), batch.segments, moe.documents(batch, ops)
    xs = list(zip(cfg.windows, moe.replays(routes, params["layers"], ops), strict=True))
    return ops.scan(partial(block, cfg=cfg, ops=ops), params["layers"], x_PtD, *shared, xs=xs)


class RoutedEnd(Protocol):
    """The last of the functions that `ends` makes."""
    def __call__(self, params: dict, batch: Batch, cfg: nn.ModelConfig, ops: Ops = LOCAL,
                 routes: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, moe.Routing]: ...


def ends(decoder: Callable[..., tuple[torch.Tensor, list]]) -> tuple[nn.End, nn.End, nn.End, nn.End, RoutedEnd]:
    """A family's (hidden, forward, loss, token_losses, loss_and_routing), of its `decoder(params, batch, cfg, ops,
    routes)` -> (what the last layer returns, what each layer's router did)."""

    def loss_and_routing(params: dict, batch: Batch, cfg: nn.ModelConfig, ops: Ops = LOCAL,
                         routes: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, moe.Routing]:
        """`loss`, and what the routers did. `routes`, one [P, T, K] a layer with experts (as `Routing.experts`),
        replays recorded choices."""
        x_PtD, routed = decoder(params, batch, cfg, ops, routes)
        return nn.summed_loss(params, x_PtD, batch.labels, batch.loss_mask, cfg, ops), moe.gather(routed)

    return *nn.ends(lambda *args: decoder(*args)[0]), loss_and_routing
