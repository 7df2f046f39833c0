"""What the dense families share, llama, qwen2 and qwen3: layers of attention and a gated MLP, and all that is made of
them. They differ in their configs, in their biases and in whether q and k are normed.

P packs   t positions here   T positions of a pack   S documents   D hidden   d head dim   F mlp width
"""
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from xtf import nn, tree
from xtf.data.batch import Batch
from xtf.ops import Ops

NAMES = (
    ("embed", "model.embed_tokens"),
    ("layers.{i}.attn_norm", "model.layers.{i}.input_layernorm"),
    ("layers.{i}.q", "model.layers.{i}.self_attn.q_proj"),
    ("layers.{i}.k", "model.layers.{i}.self_attn.k_proj"),
    ("layers.{i}.v", "model.layers.{i}.self_attn.v_proj"),
    ("layers.{i}.o", "model.layers.{i}.self_attn.o_proj"),
    ("layers.{i}.mlp_norm", "model.layers.{i}.post_attention_layernorm"),
    ("layers.{i}.gate", "model.layers.{i}.mlp.gate_proj"),
    ("layers.{i}.up", "model.layers.{i}.mlp.up_proj"),
    ("layers.{i}.down", "model.layers.{i}.mlp.down_proj"),
    ("norm", "model.norm"),
    ("head", "lm_head"),
)


class DenseConfig(nn.ModelConfig, Protocol):
    """What is read of a dense family's `Config`. `windows`: for each layer how many tokens a query sees, itself
    included; None where that is its whole document."""
    @property
    def intermediate_size(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...


def specs(cfg: DenseConfig, dtype: torch.dtype = torch.float32, *, qkv_bias: bool = False, o_bias: bool = False,
          mlp_bias: bool = False, qk_norm: bool = False) -> dict:
    """The description of every parameter; `head` is absent where embeddings are tied, `q_norm` and `k_norm` without
    `qk_norm`."""
    product, norm = partial(nn.product, cfg=cfg, dtype=dtype), partial(nn.scale, dtype=dtype)
    D, d, F = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size
    q, kv = cfg.num_attention_heads * d, cfg.num_key_value_heads * d

    def layer() -> dict:
        return {
            "attn_norm": norm(D, "embed"),
            "q": product(q, D, ("heads", "embed"), bias=qkv_bias),
            "k": product(kv, D, ("kv_heads", "embed"), bias=qkv_bias),
            "v": product(kv, D, ("kv_heads", "embed"), bias=qkv_bias),
            "o": product(D, q, ("embed", "heads"), bias=o_bias),
            **({"q_norm": norm(d, "head_dim"), "k_norm": norm(d, "head_dim")} if qk_norm else {}),
            "mlp_norm": norm(D, "embed"),
            "gate": product(F, D, ("mlp", "embed"), bias=mlp_bias),
            "up": product(F, D, ("mlp", "embed"), bias=mlp_bias),
            "down": product(D, F, ("embed", "mlp"), bias=mlp_bias),
        }

    table = lambda: product(cfg.vocab_size, D, ("vocab", "embed"))
    params = {"embed": table(), "layers": [layer() for _ in range(cfg.num_hidden_layers)], "norm": norm(D, "embed")}
    return params if cfg.tie_word_embeddings else params | {"head": table()}


def block(p: dict, x_PtD: torch.Tensor, cos_Ptd: torch.Tensor, sin_Ptd: torch.Tensor, segments_PS: torch.Tensor,
          *, xs: int | None, cfg: DenseConfig, ops: Ops) -> tuple[torch.Tensor, None]:
    """One layer; `xs` is its window."""
    x_PtD = x_PtD + nn.attention(p, nn.norm(x_PtD, p["attn_norm"], cfg), cos_Ptd, sin_Ptd, segments_PS, xs, cfg, ops)
    return x_PtD + nn.mlp(p, nn.norm(x_PtD, p["mlp_norm"], cfg), cfg, ops), None


def decoder(params: dict, batch: Batch, cfg: DenseConfig, ops: Ops) -> torch.Tensor:
    """What the last layer returns, [P, t, D]."""
    x_PtD = ops.use(partial(nn.embed, cfg=cfg), params["embed"], ops.split(batch.input_ids))
    cos_PTd, sin_PTd = nn.rope(cfg.rope, cfg.head_dim, batch.positions, batch.segments, x_PtD.dtype)
    shared = ops.split(cos_PTd), ops.split(sin_PTd), batch.segments
    x_PtD, _ = ops.scan(partial(block, cfg=cfg, ops=ops), params["layers"], x_PtD, *shared, xs=cfg.windows)
    return x_PtD


hidden, forward, loss, token_losses = nn.ends(decoder)


def flops(cfg: DenseConfig, lengths: Sequence[int], step: tree.Tree | None = None) -> float:
    """FLOPs of documents of these lengths, by `xtf.nn.flops`: of a forward pass; with a `step`'s specs, of that."""
    return nn.flops(specs(cfg), cfg, cfg.windows, lengths, step)
