"""Qwen3, dense: grouped-query attention with q and k normed by head (arXiv 2505.09388).

P packs   t positions here   T positions of a pack   S documents   D hidden   d head dim   V vocabulary
"""
from collections.abc import Sequence
from functools import partial

import msgspec
import torch

from xtf import nn
from xtf.data.batch import Batch
from xtf.models.config import decode, layer_windows, num_kv_heads, resolve_windows
from xtf.ops import LOCAL, Ops

NAMES = (
    ("embed", "model.embed_tokens"),
    ("layers.{i}.attn_norm", "model.layers.{i}.input_layernorm"),
    ("layers.{i}.q", "model.layers.{i}.self_attn.q_proj"),
    ("layers.{i}.k", "model.layers.{i}.self_attn.k_proj"),
    ("layers.{i}.v", "model.layers.{i}.self_attn.v_proj"),
    ("layers.{i}.o", "model.layers.{i}.self_attn.o_proj"),
    ("layers.{i}.q_norm", "model.layers.{i}.self_attn.q_norm"),
    ("layers.{i}.k_norm", "model.layers.{i}.self_attn.k_norm"),
    ("layers.{i}.mlp_norm", "model.layers.{i}.post_attention_layernorm"),
    ("layers.{i}.gate", "model.layers.{i}.mlp.gate_proj"),
    ("layers.{i}.up", "model.layers.{i}.mlp.up_proj"),
    ("layers.{i}.down", "model.layers.{i}.mlp.down_proj"),
    ("norm", "model.norm"),
    ("head", "lm_head"),
)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are honoured, with the defaults of transformers' Qwen3Config; windows are
    resolved."""
    vocab_size: nn.Size = 151936
    hidden_size: nn.Size = 4096
    intermediate_size: nn.Size = 22016
    num_hidden_layers: nn.Size = 32
    num_attention_heads: nn.Size = 32
    num_key_value_heads: nn.Size = 32
    head_dim: nn.Size = 128
    hidden_act: str = "silu"
    max_position_embeddings: nn.Size = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope: nn.AnyRope = nn.Rope()
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: nn.Size | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many tokens a query sees, itself included; None where that is its whole document."""
        return layer_windows(self)



def config(hf: dict) -> Config:
    """From the dict of a config.json.

    Raises ValueError naming the field that is unknown, not supported or of a wrong type.

    >>> config({"num_hidden_layers": 2, "max_window_layers": 1, "use_sliding_window": True, "sliding_window": 8}).windows
    (None, 8)
    """
    return resolve_windows(decode(Config, hf, num_key_value_heads=num_kv_heads(hf, 32, 32)))


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
            "q_norm": norm(d, "head_dim"),
            "k_norm": norm(d, "head_dim"),
            "mlp_norm": norm(D, "embed"),
            "gate": product(F, D, ("mlp", "embed")),
            "up": product(F, D, ("mlp", "embed")),
            "down": product(D, F, ("embed", "mlp")),
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
          *, xs: int | None, cfg: Config, ops: Ops) -> tuple[torch.Tensor, None]:
    """One layer; `xs` is its window."""
    x_PtD = x_PtD + nn.attention(p, nn.norm(x_PtD, p["attn_norm"], cfg), cos_Ptd, sin_Ptd, segments_PS, xs, cfg, ops)
    return x_PtD + nn.mlp(p, nn.norm(x_PtD, p["mlp_norm"], cfg), cfg, ops), None


def decoder(params: dict, batch: Batch, cfg: Config, ops: Ops) -> torch.Tensor:
    """What the last layer returns, [P, t, D]."""
    x_PtD = ops.use(partial(nn.embed, cfg=cfg), params["embed"], ops.split(batch.input_ids))
    cos_PTd, sin_PTd = nn.rope(cfg.rope, cfg.head_dim, batch.positions, batch.segments, x_PtD.dtype)
    shared = ops.split(cos_PTd), ops.split(sin_PTd), batch.segments
    x_PtD, _ = ops.scan(partial(block, cfg=cfg, ops=ops), params["layers"], x_PtD, *shared, xs=cfg.windows)
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
    return nn.flops(specs(cfg), cfg, cfg.windows, lengths)
