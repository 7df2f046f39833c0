"""Llama 1 to 3, and SmolLM2, which is one (arXiv 2302.13971, 2407.21783, 2502.02737).

P packs   t positions here   T positions of a pack   S documents   D hidden   d head dim   V vocabulary
"""
from collections.abc import Sequence
from functools import partial

import msgspec
import torch

from xtf import nn
from xtf.data.batch import Batch
from xtf.models.config import decode, default_head_dim, num_kv_heads
from xtf.ops import LOCAL, Ops

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


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are honoured, with the defaults of transformers' LlamaConfig."""
    vocab_size: nn.Size = 32000
    hidden_size: nn.Size = 4096
    intermediate_size: nn.Size = 11008
    num_hidden_layers: nn.Size = 32
    num_attention_heads: nn.Size = 32
    num_key_value_heads: nn.Size = 32
    head_dim: nn.Size = 128
    hidden_act: str = "silu"
    max_position_embeddings: nn.Size = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope: nn.AnyRope = nn.Rope()
    attention_bias: bool = False
    mlp_bias: bool = False
    pad_token_id: int | None = None



def config(hf: dict) -> Config:
    """From the dict of a config.json.

    Raises ValueError naming the field that is unknown, not supported or of a wrong type.

    >>> config({"num_attention_heads": 64}).head_dim
    64
    """
    return decode(Config, hf, num_key_value_heads=num_kv_heads(hf, None, 32), head_dim=default_head_dim(hf, 4096, 32))


def specs(cfg: Config, dtype: torch.dtype = torch.float32) -> dict:
    """The description of every parameter; `head` is absent where embeddings are tied.

    >>> cfg = config({"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1})
    >>> specs(cfg)["layers"][0]["k"]["weight"].shape == (cfg.head_dim, 8)
    True
    """
    product, norm = partial(nn.product, cfg=cfg, dtype=dtype), partial(nn.scale, dtype=dtype)
    D, d, F = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size
    q, kv = cfg.num_attention_heads * d, cfg.num_key_value_heads * d

    def layer() -> dict:
        return {
            "attn_norm": norm(D, "embed"),
            "q": product(q, D, ("heads", "embed"), bias=cfg.attention_bias),
            "k": product(kv, D, ("kv_heads", "embed"), bias=cfg.attention_bias),
            "v": product(kv, D, ("kv_heads", "embed"), bias=cfg.attention_bias),
            "o": product(D, q, ("embed", "heads"), bias=cfg.attention_bias),
            "mlp_norm": norm(D, "embed"),
            "gate": product(F, D, ("mlp", "embed"), bias=cfg.mlp_bias),
            "up": product(F, D, ("mlp", "embed"), bias=cfg.mlp_bias),
            "down": product(D, F, ("embed", "mlp"), bias=cfg.mlp_bias),
        }

    table = lambda: product(cfg.vocab_size, D, ("vocab", "embed"))
    params = {"embed": table(), "layers": [layer() for _ in range(cfg.num_hidden_layers)], "norm": norm(D, "embed")}
    return params if cfg.tie_word_embeddings else params | {"head": table()}


def names(cfg: Config) -> dict[str, str]:
    """Each parameter's path → its name in the checkpoint.

    >>> names(config({"num_hidden_layers": 1}))["layers.0.q.weight"]
    'model.layers.0.self_attn.q_proj.weight'
    """
    return nn.hf_names(NAMES, specs(cfg))


def block(p: dict, x_PtD: torch.Tensor, cos_Ptd: torch.Tensor, sin_Ptd: torch.Tensor, segments_PS: torch.Tensor,
          *, cfg: Config, ops: Ops) -> tuple[torch.Tensor, None]:
    """One layer."""
    x_PtD = x_PtD + nn.attention(p, nn.norm(x_PtD, p["attn_norm"], cfg), cos_Ptd, sin_Ptd, segments_PS, None, cfg, ops)
    return x_PtD + nn.mlp(p, nn.norm(x_PtD, p["mlp_norm"], cfg), cfg, ops), None


def decoder(params: dict, batch: Batch, cfg: Config, ops: Ops) -> torch.Tensor:
    """What the last layer returns, [P, t, D]."""
    x_PtD = ops.use(partial(nn.embed, cfg=cfg), params["embed"], ops.split(batch.input_ids))
    cos_PTd, sin_PTd = nn.rope(cfg.rope, cfg.head_dim, batch.positions, batch.segments, x_PtD.dtype)
    shared = ops.split(cos_PTd), ops.split(sin_PTd), batch.segments
    x_PtD, _ = ops.scan(partial(block, cfg=cfg, ops=ops), params["layers"], x_PtD, *shared)
    return x_PtD


def hidden(params: dict, batch: Batch, cfg: Config, ops: Ops = LOCAL) -> torch.Tensor:
    """Hidden states after the final norm, [P, t, D]."""
    return nn.final_norm(params, decoder(params, batch, cfg, ops), cfg, ops)


def forward(params: dict, batch: Batch, cfg: Config, ops: Ops = LOCAL) -> torch.Tensor:
    """Logits, [P, t, V]."""
    return nn.logits(params, decoder(params, batch, cfg, ops), cfg, ops)


def loss(params: dict, batch: Batch, cfg: Config, ops: Ops = LOCAL) -> torch.Tensor:
    """This rank's sum of loss_mask * nll, a scalar; logits exist a chunk at a time, and the head's gradients are made
    in forward."""
    return nn.summed_loss(params, decoder(params, batch, cfg, ops), batch.labels, batch.loss_mask, cfg, ops)


def token_losses(params: dict, batch: Batch, cfg: Config, ops: Ops = LOCAL) -> torch.Tensor:
    """-log p(label) of every token, [P, t]; logits exist a chunk at a time, and once more in backward."""
    return nn.token_nll(params, decoder(params, batch, cfg, ops), batch.labels, cfg, ops)


def flops(cfg: Config, lengths: Sequence[int]) -> float:
    """FLOPs of a forward pass over documents of these lengths: the formula of `xtf.nn.flops`; times 3 with the backward
    pass."""
    return nn.flops(specs(cfg), cfg, [None] * cfg.num_hidden_layers, lengths)
