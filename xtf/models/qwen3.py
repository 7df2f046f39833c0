"""Qwen3, dense: grouped-query attention with q and k normed by head (arXiv 2505.09388).

The dense family with these norms, and with windows; a config may have biases in attention.
"""
import msgspec
import torch

from xtf import nn
from xtf.models import dense
from xtf.models.config import decode, layer_windows, num_kv_heads, resolve_windows
from xtf.models.dense import block, decoder, flops, forward, hidden, loss, token_losses

__all__ = ["NAMES", "Config", "block", "config", "decoder", "flops", "forward", "hidden", "loss", "names", "specs",
           "token_losses"]

NAMES = (
    *dense.NAMES,
    ("layers.{i}.q_norm", "model.layers.{i}.self_attn.q_norm"),
    ("layers.{i}.k_norm", "model.layers.{i}.self_attn.k_norm"),
)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are honoured, defaults as in transformers' Qwen3Config; windows are resolved."""
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

    >>> config({"num_hidden_layers": 2, "max_window_layers": 1,
    ...         "use_sliding_window": True, "sliding_window": 8}).windows
    (None, 8)
    """
    return resolve_windows(decode(Config, hf, num_key_value_heads=num_kv_heads(hf, 32, 32)))


def specs(cfg: Config, dtype: torch.dtype = torch.float32) -> dict:
    """The description of every parameter; `head` is absent where embeddings are tied.

    >>> cfg = config({"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    ...               "num_hidden_layers": 1})
    >>> specs(cfg)["layers"][0]["k"]["weight"].shape == (cfg.head_dim, 8)
    True
    """
    return dense.specs(cfg, dtype, qkv_bias=cfg.attention_bias, o_bias=cfg.attention_bias, qk_norm=True)


def names(cfg: Config) -> dict[str, str]:
    """Each parameter's path → its name in the checkpoint.

    >>> names(config({"num_hidden_layers": 1}))["layers.0.q.weight"]
    'model.layers.0.self_attn.q_proj.weight'
    """
    return nn.hf_names(NAMES, specs(cfg))
