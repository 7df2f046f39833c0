"""Qwen3-MoE: Qwen3's attention, and in most layers experts instead of one MLP (arXiv 2505.09388).

P packs   t positions here   S documents   D hidden   d head dim   F expert width   E experts   K experts of a token
"""
from collections.abc import Generator, Sequence
from functools import partial

import msgspec
import torch

from xtf import moe, nn, tree
from xtf.models import dense, qwen3, sparse
from xtf.models.config import decode, default_head_dim, num_kv_heads, one_spelling
from xtf.ops import Ops

NAMES = (
    *qwen3.NAMES,
    ("layers.{i}.router", "model.layers.{i}.mlp.gate"),
    ("layers.{i}.experts.gate", "model.layers.{i}.mlp.experts.{e}.gate_proj"),
    ("layers.{i}.experts.up", "model.layers.{i}.mlp.experts.{e}.up_proj"),
    ("layers.{i}.experts.down", "model.layers.{i}.mlp.experts.{e}.down_proj"),
)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are honoured, defaults as in transformers' Qwen3MoeConfig; the window is resolved.

    `output_router_logits` and `router_aux_loss_coef` are for the training step: whether a balancing loss is added, and
    what `xtf.moe.balance` is multiplied by.
    """
    vocab_size: nn.Size = 151936
    hidden_size: nn.Size = 2048
    intermediate_size: nn.Size = 6144
    num_hidden_layers: nn.Size = 24
    num_attention_heads: nn.Size = 32
    num_key_value_heads: nn.Size = 4
    head_dim: nn.Size = 64
    hidden_act: str = "silu"
    max_position_embeddings: nn.Size = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope: nn.AnyRope = nn.Rope()
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: nn.Size | None = None
    decoder_sparse_step: nn.Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    moe_intermediate_size: nn.Size = 768
    num_experts: nn.Size = 128
    num_experts_per_tok: nn.Size = 8
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many tokens a query sees, itself included; None where that is its whole document."""
        return (self.sliding_window,) * self.num_hidden_layers

    @property
    def sparse(self) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        return tuple((i + 1) % self.decoder_sparse_step == 0 and i not in self.mlp_only_layers
                     for i in range(self.num_hidden_layers))

    @property
    def router(self) -> moe.Router:
        return moe.Router(self.num_experts, self.num_experts_per_tok, "softmax", normalise=self.norm_topk_prob)


def config(hf: dict) -> Config:
    """From the dict of a config.json. As in transformers a window is every layer's: `max_window_layers` has no effect.

    Raises ValueError naming the field that is unknown, not supported or of a wrong type.

    >>> config({"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}).sparse
    (False, True, False, False)
    """
    hf = one_spelling(hf, "num_experts", "num_local_experts")
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return decode(Config, hf, ["max_window_layers"], num_key_value_heads=num_kv_heads(hf, 4, 32),
                  head_dim=default_head_dim(hf, 2048, 32), sliding_window=window,
                  mlp_only_layers=hf.get("mlp_only_layers") or ())


def specs(cfg: Config, dtype: torch.dtype = torch.float32) -> dict:
    """The description of every parameter: Qwen3's, with a router and stacked experts for the MLP of sparse layers.

    >>> cfg = config({"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    ...               "num_hidden_layers": 1})
    >>> specs(cfg)["layers"][0]["experts"]["down"]["weight"].shape
    (128, 8, 768)
    """
    params = dense.specs(cfg, dtype, qkv_bias=cfg.attention_bias, o_bias=cfg.attention_bias, qk_norm=True)
    product = partial(nn.product, cfg=cfg, dtype=dtype)
    D, F, E = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_experts
    for i in (i for i, has_experts in enumerate(cfg.sparse) if has_experts):
        attention = {name: node for name, node in params["layers"][i].items() if name not in ("gate", "up", "down")}
        params["layers"][i] = attention | {
            "router": product(E, D, ("router", "embed")),
            "experts": {
                "gate": product(F, D, ("mlp", "embed"), num_experts=E),
                "up": product(F, D, ("mlp", "embed"), num_experts=E),
                "down": product(D, F, ("embed", "mlp"), num_experts=E),
            },
        }
    return params


def names(cfg: Config) -> dict[str, str]:
    """Each parameter's path → its name in the checkpoint, `{e}` standing for the expert.

    >>> names(config({"num_hidden_layers": 1}))["layers.0.experts.up.weight"]
    'model.layers.0.mlp.experts.{e}.up_proj.weight'
    """
    return nn.hf_names(NAMES, specs(cfg))


@moe.staged
def block(p: dict, x_PtD: torch.Tensor, cos_Ptd: torch.Tensor, sin_Ptd: torch.Tensor, segments_PS: torch.Tensor,
          documents_Pt: torch.Tensor, *, xs: tuple[int | None, torch.Tensor | None], cfg: Config,
          ops: Ops) -> Generator:
    """One layer; `xs` is its window and the recorded choice of experts to replay, if any."""
    window, routes_PtK = xs
    x_PtD = x_PtD + nn.attention(p, nn.norm(x_PtD, p["attn_norm"], cfg), cos_Ptd, sin_Ptd, segments_PS, window, cfg,
                                 ops)
    h_PtD = nn.norm(x_PtD, p["mlp_norm"], cfg)
    if "router" not in p:
        yield x_PtD + nn.mlp(p, h_PtD, cfg, ops), None
        return
    yield from moe.layer(p, h_PtD, documents_Pt, segments_PS.shape[1] - 1, cfg.router, ops,
                         onto=x_PtD, experts=partial(nn.experts, cfg=cfg), routes=routes_PtK)


decoder = partial(sparse.decoder, block=block)
hidden, forward, loss, token_losses, loss_and_routing = sparse.ends(decoder)


def flops(cfg: Config, lengths: Sequence[int], step: tree.Tree | None = None) -> float:
    """FLOPs of documents of these lengths, by `xtf.nn.flops`: of a forward pass; with a `step`'s specs, of that."""
    return nn.flops(specs(cfg), cfg, cfg.windows, lengths, step)
