"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1; DeepSeek V3, arXiv 2412.19437, eq. 1 to 11).

Keys and values of all heads come from one narrow latent, queries from another or straight from the hidden state. Of
each key's d = n + r dims, n are the head's own and know no position; r turn with it and are shared by all heads. Values
have v dims.

P packs   t positions here   S documents   D hidden   H heads   c dims of keys' and values' latent
b dims of queries' latent   Q dims of all heads' queries, H (n + r)
"""
import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from xtf import nn
from xtf.kernels.rms_norm import rms_norm
from xtf.kernels.rope import apply_rope
from xtf.ops import Ops

EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says: so in the published code and in transformers

NAMES = (
    ("q", "q_proj"), ("q_a", "q_a_proj"), ("q_a_norm", "q_a_layernorm"), ("q_b", "q_b_proj"),
    ("kv_a", "kv_a_proj_with_mqa"),
    ("kv_a_norm", "kv_a_layernorm"), ("kv_b", "kv_b_proj"), ("o", "o_proj"),
)


class LatentConfig(nn.ModelConfig, Protocol):
    """What is read of the `Config` of a family with this attention."""
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def rope_interleave(self) -> bool: ...
    @property
    def attention_bias(self) -> bool: ...


def specs(cfg: LatentConfig, dtype: torch.dtype) -> dict:
    """The nodes of one layer's attention."""
    product, norm = partial(nn.product, cfg=cfg, dtype=dtype), partial(nn.scale, dtype=dtype)
    D, H, bias = cfg.hidden_size, cfg.num_attention_heads, cfg.attention_bias
    n, r, v, c, b = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank, cfg.q_lora_rank
    queries = {"q": product(H * (n + r), D, ("heads", "embed"))} if b is None else {
        "q_a": product(b, D, ("q_latent", "embed"), bias=bias),
        "q_a_norm": norm(b, "q_latent"),
        "q_b": product(H * (n + r), b, ("heads", "q_latent")),
    }
    return queries | {
        "kv_a": product(c + r, D, ("kv_latent", "embed"), bias=bias),
        "kv_a_norm": norm(c, "kv_latent"),
        "kv_b": product(H * (n + v), c, ("heads", "kv_latent")),
        "o": product(D, H * v, ("embed", "heads"), bias=bias),
    }


def attention(p: dict, x_PtD: torch.Tensor, cos_Ptr: torch.Tensor, sin_Ptr: torch.Tensor, segments_PS: torch.Tensor,
              cfg: LatentConfig, ops: Ops) -> torch.Tensor:
    """Attention of one layer `p`, [P, t, D]; the number of heads is read off the products, which may be split."""
    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    turned = partial(apply_rope, cos_PTr=cos_Ptr, sin_PTr=sin_Ptr, interleaved=cfg.rope_interleave)
    if "q" in p:
        q_PtQ = ops.linear(x_PtD, p["q"], ("embed", "heads"))
    else:
        q_Ptb = rms_norm(ops.linear(x_PtD, p["q_a"], ("embed", "q_latent")), p["q_a_norm"]["weight"], EPS)
        q_PtQ = ops.linear(q_Ptb, p["q_b"], ("q_latent", "heads"))
    kv_Ptc, k_Ptr = ops.linear(x_PtD, p["kv_a"], ("embed", "kv_latent")).split((cfg.kv_lora_rank, r), -1)
    kv_Ptc = rms_norm(kv_Ptc, p["kv_a_norm"]["weight"], EPS)
    k_PtHn, v_PtHv = ops.linear(kv_Ptc, p["kv_b"], ("kv_latent", "heads")).unflatten(-1, (-1, n + v)).split((n, v), -1)
    k_PtHr = turned(k_Ptr.unsqueeze(2)).expand(-1, -1, k_PtHn.shape[2], -1)
    q_PtHd, k_PtHd = turned(q_PtQ.unflatten(-1, (-1, n + r))), torch.cat([k_PtHn, k_PtHr], -1)
    o_PtHv = ops.name(ops.attend, "attn_out")(q_PtHd, k_PtHd, v_PtHv, segments=segments_PS, scale=scale(cfg))
    return ops.linear(o_PtHv.flatten(-2), p["o"], ("heads", "embed"))


def scale(cfg: LatentConfig) -> float:
    """What scores are multiplied by: (n + r) ** -0.5, under YaRN times the square of 0.1 mscale_all_dim ln(factor) + 1.

    >>> from types import SimpleNamespace
    >>> scale(SimpleNamespace(qk_nope_head_dim=3, qk_rope_head_dim=1, rope=nn.Rope()))
    0.5
    """
    plain = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    if isinstance(cfg.rope, nn.YarnRope) and cfg.rope.factor > 1:
        return plain * (0.1 * (cfg.rope.mscale_all_dim or 0.0) * math.log(cfg.rope.factor) + 1.0) ** 2
    return plain


def flops(cfg: LatentConfig, lengths: Sequence[int]) -> float:
    """Forward FLOPs of one layer's scores and sums, without products with weights: 2 H (n + r + v) a visible pair."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 2.0 * cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim) * pairs
