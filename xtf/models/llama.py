"""Llama 1 to 3, and SmolLM2, which is one (arXiv 2302.13971, 2407.21783, 2502.02737).

The dense family without norms of q and k; a config may have biases everywhere.
"""
import msgspec
import torch

from xtf import nn
from xtf.models import dense
from xtf.models.config import decode, default_head_dim, num_kv_heads
from xtf.models.dense import block, decoder, flops, forward, hidden, loss, token_losses

__all__ = ["NAMES", "Config", "block", "config", "decoder", "flops", "forward", "hidden", "loss", "names", "specs",
           "token_losses"]

NAMES = dense.NAMES


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

    @property
    def windows(self) -> tuple[None, ...]:
        """For each layer how many tokens a query sees: its whole document."""
        return (None,) * self.num_hidden_layers


def config(hf: dict) -> Config:
    """From the dict of a config.json.

    Raises ValueError naming the field that is unknown, not supported or of a wrong type.

    >>> config({"num_attention_heads": 64}).head_dim
    64
    """
    return decode(Config, hf, num_key_value_heads=num_kv_heads(hf, None, 32), head_dim=default_head_dim(hf, 4096, 32))


def specs(cfg: Config, dtype: torch.dtype = torch.float32) -> dict:
    """The description of every parameter; `head` is absent where embeddings are tied.

    >>> cfg = config({"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    ...               "num_hidden_layers": 1})
    >>> specs(cfg)["layers"][0]["k"]["weight"].shape == (cfg.head_dim, 8)
    True
    """
    return dense.specs(cfg, dtype, qkv_bias=cfg.attention_bias, o_bias=cfg.attention_bias, mlp_bias=cfg.mlp_bias)


def names(cfg: Config) -> dict[str, str]:
    """Each parameter's path → its name in the checkpoint.

    >>> names(config({"num_hidden_layers": 1}))["layers.0.q.weight"]
    'model.layers.0.self_attn.q_proj.weight'
    """
    return nn.hf_names(NAMES, specs(cfg))
