"""GPT-OSS (arXiv 2508.10925): sinks, windows in every other layer, and experts with biases and a clamped swiglu.

P packs   t positions here   S documents   D hidden   d head dim   F expert width   G gates and ups (2 F)   E experts
K experts of a token   N (token, expert) pairs
"""
from collections.abc import Generator, Sequence
from functools import partial

import msgspec
import torch

from xtf import moe, nn, tree
from xtf.hf import Transposed
from xtf.models import dense, sparse
from xtf.models.config import decode, default_head_dim, layer_windows, num_kv_heads, one_spelling
from xtf.ops import ExpertRows, Ops
from xtf.spec import Normal, Param

NAMES = (
    *dense.NAMES,
    ("layers.{i}.sinks.weight", "model.layers.{i}.self_attn.sinks"),
    ("layers.{i}.router", "model.layers.{i}.mlp.router"),
    ("layers.{i}.experts.gate_up.weight", Transposed("model.layers.{i}.mlp.experts.gate_up_proj")),
    ("layers.{i}.experts.gate_up.bias", "model.layers.{i}.mlp.experts.gate_up_proj_bias"),
    ("layers.{i}.experts.down.weight", Transposed("model.layers.{i}.mlp.experts.down_proj")),
    ("layers.{i}.experts.down.bias", "model.layers.{i}.mlp.experts.down_proj_bias"),
)
THETA, YARN = 150000.0, {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are honoured, defaults as in transformers' GptOssConfig; windows are resolved.

    `output_router_logits` and `router_aux_loss_coef` are for the training step: whether a balancing loss is added, and
    what `xtf.moe.balance` is multiplied by. `hidden_act` is "silu": it names the swiglu that `swiglu_alpha` and
    `swiglu_limit` describe.
    """
    vocab_size: nn.Size = 201088
    hidden_size: nn.Size = 2880
    intermediate_size: nn.Size = 2880
    num_hidden_layers: nn.Size = 36
    num_attention_heads: nn.Size = 64
    num_key_value_heads: nn.Size = 8
    head_dim: nn.Size = 64
    hidden_act: str = "silu"
    max_position_embeddings: nn.Size = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope: nn.AnyRope = nn.YarnRope(rope_theta=THETA, factor=32.0, original_max_position_embeddings=4096, truncate=False)
    attention_bias: bool = True
    sliding_window: nn.Size | None = 128
    layer_types: tuple[str, ...] | None = None
    num_local_experts: nn.Size = 128
    num_experts_per_tok: nn.Size = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many tokens a query sees, itself included; None where that is its whole document."""
        return layer_windows(self)

    @property
    def router(self) -> moe.Router:
        return moe.Router(self.num_local_experts, self.num_experts_per_tok, "softmax_top_k")


def config(hf: dict) -> Config:
    """From the dict of a config.json, OpenAI's own names (`experts_per_token`, `initial_context_length`) among them.

    Raises ValueError naming the field that is unknown, not supported or of a wrong type.

    >>> config({"num_hidden_layers": 3}).windows
    (128, None, 128)
    """
    hf = one_spelling(one_spelling(hf, "num_local_experts", "num_experts"), "num_experts_per_tok", "experts_per_token")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"gpt_oss config: hidden_act={hf['hidden_act']!r} is not supported: its experts have a "
                         "swiglu of their own; set it to silu")
    hf = {"rope_theta": THETA, "head_dim": 64} | hf
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf |= {"rope_parameters": YARN}
    cfg = decode(Config, hf, ["initial_context_length"], num_key_value_heads=num_kv_heads(hf, 8, 64),
                 head_dim=default_head_dim(hf, 2880, 64))
    types = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(cfg.num_hidden_layers))
    cfg = msgspec.structs.replace(cfg, layer_types=types if cfg.layer_types is None else cfg.layer_types)
    layer_windows(cfg)
    return cfg


def specs(cfg: Config, dtype: torch.dtype = torch.float32) -> dict:
    """The description of every parameter; no `head` where embeddings are tied. `gate_up` has gate and up in turns.

    >>> cfg = config({"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    ...               "num_hidden_layers": 1})
    >>> specs(cfg)["layers"][0]["experts"]["gate_up"]["bias"].shape
    (128, 5760)
    """
    product, norm = partial(nn.product, cfg=cfg, dtype=dtype), partial(nn.scale, dtype=dtype)
    D, d, F, E = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size, cfg.num_local_experts
    q, kv = cfg.num_attention_heads * d, cfg.num_key_value_heads * d

    def layer() -> dict:
        return {
            "attn_norm": norm(D, "embed"),
            "q": product(q, D, ("heads", "embed"), bias=cfg.attention_bias),
            "k": product(kv, D, ("kv_heads", "embed"), bias=cfg.attention_bias),
            "v": product(kv, D, ("kv_heads", "embed"), bias=cfg.attention_bias),
            "o": product(D, q, ("embed", "heads"), bias=cfg.attention_bias),
            "sinks": {"weight": Param((cfg.num_attention_heads,), dtype, ("heads",), Normal(cfg.initializer_range))},
            "mlp_norm": norm(D, "embed"),
            "router": product(E, D, ("router", "embed"), bias=True),
            "experts": {
                "gate_up": product(2 * F, D, ("mlp", "embed"), bias=True, num_experts=E),
                "down": product(D, F, ("embed", "mlp"), bias=True, num_experts=E),
            },
        }

    table = lambda: product(cfg.vocab_size, D, ("vocab", "embed"))
    params = {"embed": table(), "layers": [layer() for _ in range(cfg.num_hidden_layers)], "norm": norm(D, "embed")}
    return params if cfg.tie_word_embeddings else params | {"head": table()}


def names(cfg: Config) -> dict[str, str]:
    """Each parameter's path → its name in the checkpoint, where the experts' weights are [E, in, out].

    >>> names(config({"num_hidden_layers": 1}))["layers.0.experts.down.weight"]
    'model.layers.0.mlp.experts.down_proj'
    """
    return nn.hf_names(NAMES, specs(cfg))


def experts(p: dict, rows: ExpertRows, cfg: Config, ops: Ops) -> torch.Tensor:
    """down((up x + 1) * gate x * sigmoid(alpha gate x)) of every row, up and gate clamped, times the row's weight.

    The weight comes last, since `down` has a bias. Source: transformers' GptOssExperts.
    """
    gate_up_NG = ops.grouped_linear(rows.x_ND, p["gate_up"], rows.offsets_E, ("embed", "mlp"))
    gate_NF = gate_up_NG[:, 0::2].clamp(max=cfg.swiglu_limit)
    up_NF = gate_up_NG[:, 1::2].clamp(-cfg.swiglu_limit, cfg.swiglu_limit)
    hidden_NF = (up_NF + 1) * gate_NF * torch.sigmoid(cfg.swiglu_alpha * gate_NF)
    y_ND = ops.grouped_linear(hidden_NF, p["down"], rows.offsets_E, ("mlp", "embed"))
    return (y_ND * rows.weights_N[:, None]).to(y_ND.dtype)


@moe.staged
def block(p: dict, x_PtD: torch.Tensor, cos_Ptd: torch.Tensor, sin_Ptd: torch.Tensor, segments_PS: torch.Tensor,
          documents_Pt: torch.Tensor, *, xs: tuple[int | None, torch.Tensor | None], cfg: Config,
          ops: Ops) -> Generator:
    """One layer; `xs` is its window and the recorded choice of experts to replay, if any."""
    window, routes_PtK = xs
    x_PtD = x_PtD + nn.attention(p, nn.norm(x_PtD, p["attn_norm"], cfg), cos_Ptd, sin_Ptd, segments_PS, window, cfg,
                                 ops)
    yield from moe.layer(p, nn.norm(x_PtD, p["mlp_norm"], cfg), documents_Pt, segments_PS.shape[1] - 1, cfg.router, ops,
                         onto=x_PtD, experts=partial(experts, cfg=cfg), routes=routes_PtK)


decoder = partial(sparse.decoder, block=block)
hidden, forward, loss, token_losses, loss_and_routing = sparse.ends(decoder)


def flops(cfg: Config, lengths: Sequence[int], step: tree.Tree | None = None) -> float:
    """FLOPs of documents of these lengths, by `xtf.nn.flops`: of a forward pass; with a `step`'s specs, of that."""
    return nn.flops(specs(cfg), cfg, cfg.windows, lengths, step)
