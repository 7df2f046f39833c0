"""DeepSeek V3 (arXiv 2412.19437) and Kimi K2 (arXiv 2507.20534): latent attention, leading dense layers, experts chosen
by corrected sigmoids, and modules that predict tokens further ahead (MTP, section 2.2).

P packs   t positions here   T positions of a pack   S documents   D hidden   r rotary dims   F mlp or expert width
E experts   K experts of a token   G groups of experts, of which a token chooses g   n tokens of a document
k the number of an MTP module, from 1: it predicts k tokens further ahead than the layers do
"""
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import msgspec
import torch

from xtf import flops as of
from xtf import moe, nn, tree
from xtf.data.batch import Batch
from xtf.models import mla
from xtf.models.config import decode, num_kv_heads, one_spelling
from xtf.ops import LOCAL, Ops
from xtf.spec import ZEROS, Param

LAYER = (
    ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"),
    *((node, f"self_attn.{name}") for node, name in mla.NAMES),
    ("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj"),
    ("router", "mlp.gate"), ("correction.bias", "mlp.gate.e_score_correction_bias"),
    *((f"experts.{node}", f"mlp.experts.{{e}}.{node}_proj") for node in ("gate", "up", "down")),
    *((f"shared.{node}", f"mlp.shared_experts.{node}_proj") for node in ("gate", "up", "down")),
    # MTP modules alone have these
    ("enorm", "enorm"), ("hnorm", "hnorm"), ("eh_proj", "eh_proj"), ("norm", "shared_head.norm"),
)
ENDS = (("embed", "model.embed_tokens"), ("norm", "model.norm"), ("head", "lm_head"))

# What model_type kimi_k2 assumes where its config.json is silent: the published Kimi-K2-Instruct.
KIMI_K2 = {
    "vocab_size": 163840, "num_attention_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 131072, "rope_theta": 50000.0,
}


Count = Annotated[int, msgspec.Meta(ge=0)]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are honoured, with the defaults of transformers' DeepseekV3Config.

    For the training step: `aux_loss_alpha`, what `xtf.moe.balance` is multiplied by, and `mtp_loss_weight`, λ of eq.
    25, which no config.json has.
    """
    vocab_size: nn.Size = 129280
    hidden_size: nn.Size = 7168
    intermediate_size: nn.Size = 18432
    moe_intermediate_size: nn.Size = 2048
    num_hidden_layers: nn.Size = 61
    num_nextn_predict_layers: Count = 1
    num_attention_heads: nn.Size = 128
    num_key_value_heads: nn.Size = 128
    n_shared_experts: Count = 1
    n_routed_experts: nn.Size = 256
    routed_scaling_factor: float = 2.5
    kv_lora_rank: nn.Size = 512
    q_lora_rank: nn.Size | None = 1536
    qk_rope_head_dim: nn.Size = 64
    v_head_dim: nn.Size = 128
    qk_nope_head_dim: nn.Size = 128
    n_group: nn.Size = 8
    topk_group: nn.Size = 4
    num_experts_per_tok: nn.Size = 8
    moe_layer_freq: nn.Size = 1
    first_k_dense_replace: Count = 3
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: nn.Size = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope: nn.AnyRope = nn.Rope()
    rope_interleave: bool = True
    attention_bias: bool = False
    aux_loss_alpha: float = 0.0
    mtp_loss_weight: float = 0.3
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        """The dims of a head that rotary positions turn, as transformers calls them."""
        return self.qk_rope_head_dim

    @property
    def sparse(self) -> tuple[bool, ...]:
        """For each layer whether it has experts; MTP modules always have."""
        return tuple(i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0
                     for i in range(self.num_hidden_layers))

    @property
    def router(self) -> moe.Router:
        return moe.Router(self.n_routed_experts, self.num_experts_per_tok, "sigmoid", self.norm_topk_prob,
                          self.routed_scaling_factor, self.n_group, self.topk_group)


def config(hf: dict) -> Config:
    """From the dict of a config.json, of model_type deepseek_v3 or kimi_k2.

    Without effect are `ep_size` and `auto_map`; `seq_aux` can only be true, since the balancing loss is over documents
    unless the training step says otherwise. Raises ValueError naming the field that is unknown, not supported or of a
    wrong type.

    >>> config({"num_hidden_layers": 4}).sparse, config({"model_type": "kimi_k2"}).router.num_experts
    ((False, False, False, True), 384)
    """
    hf = one_spelling(one_spelling(hf, "num_nextn_predict_layers", "num_mtp_layers"), "n_routed_experts",
                      "num_local_experts")
    family = hf.get("model_type") or "deepseek_v3"
    hf = (KIMI_K2 if family == "kimi_k2" else {}) | hf
    if hf.get("n_shared_experts", 1) is None:
        hf["n_shared_experts"] = 0
    cfg = decode(Config, hf, ("ep_size", "auto_map", "output_router_logits", "head_dim", "qk_head_dim", "scoring_func",
                              "topk_method", "seq_aux"),
                 num_key_value_heads=num_kv_heads(hf, None, 128))
    only = {
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "seq_aux": True, "head_dim": cfg.qk_rope_head_dim,
        "qk_head_dim": cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, "num_key_value_heads": cfg.num_attention_heads,
    }
    for name, value in only.items():
        if hf.get(name) not in (None, value):
            raise ValueError(f"{family} config: {name}={hf[name]!r} is not supported: it can only be {value!r} here")
    E, G, g, K = cfg.n_routed_experts, cfg.n_group, cfg.topk_group, cfg.num_experts_per_tok
    if E % G or g > G or K > E // G * g:
        raise ValueError(f"{family} config: num_experts_per_tok={K} of topk_group={g} of n_group={G} of "
                         f"n_routed_experts={E} does not work out: n_group divides the experts, and the groups chosen "
                         "have at least as many experts as a token chooses")
    return cfg


def fit(cfg: Config, tensors: Iterable[str]) -> Config:
    """`cfg` without the MTP modules that it announces where the directory's `tensors` (names) have none of them.

    >>> fit(config({"num_hidden_layers": 2}), ["model.layers.1.mlp.gate.weight"]).num_nextn_predict_layers
    0
    """
    first = cfg.num_hidden_layers
    prefixes = tuple(f"model.layers.{i}." for i in range(first, first + cfg.num_nextn_predict_layers))
    if any(name.startswith(prefixes) for name in tensors):
        return cfg
    return msgspec.structs.replace(cfg, num_nextn_predict_layers=0)


def specs(cfg: Config, dtype: torch.dtype = torch.float32) -> dict:
    """The description of every parameter; no `head` where embeddings are tied, no `mtp` without such modules.

    >>> cfg = config({"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
    ...               "first_k_dense_replace": 0})
    >>> specs(cfg)["layers"][0]["experts"]["down"]["weight"].shape, specs(cfg)["mtp"][0]["eh_proj"]["weight"].shape
    ((256, 8, 2048), (8, 16))
    """
    product, norm = partial(nn.product, cfg=cfg, dtype=dtype), partial(nn.scale, dtype=dtype)
    D, E = cfg.hidden_size, cfg.n_routed_experts

    def mlp(F: int, num_experts: int = 0) -> dict:
        return {
            "gate": product(F, D, ("mlp", "embed"), num_experts=num_experts),
            "up": product(F, D, ("mlp", "embed"), num_experts=num_experts),
            "down": product(D, F, ("embed", "mlp"), num_experts=num_experts),
        }

    def layer(sparse: bool) -> dict:
        nodes = {"attn_norm": norm(D, "embed"), **mla.specs(cfg, dtype), "mlp_norm": norm(D, "embed")}
        if not sparse:
            return nodes | mlp(cfg.intermediate_size)
        nodes |= {
            "router": {"weight": replace(product(E, D, ("router", "embed"))["weight"], wide=True)},
            "correction": {"bias": Param((E,), torch.float32, ("router",), ZEROS, trainable=False)},
            "experts": mlp(cfg.moe_intermediate_size, E),
        }
        if cfg.n_shared_experts:
            nodes["shared"] = mlp(cfg.moe_intermediate_size * cfg.n_shared_experts)
        return nodes

    def mtp_module() -> dict:
        return {"enorm": norm(D, "embed"), "hnorm": norm(D, "embed"), "eh_proj": product(D, 2 * D, ("embed", "embeds")),
                **layer(True), "norm": norm(D, "embed")}

    table = lambda: product(cfg.vocab_size, D, ("vocab", "embed"))
    params = {"embed": table(), "layers": [layer(sparse) for sparse in cfg.sparse], "norm": norm(D, "embed")}
    params |= {} if cfg.tie_word_embeddings else {"head": table()}
    if cfg.num_nextn_predict_layers:
        params["mtp"] = [mtp_module() for _ in range(cfg.num_nextn_predict_layers)]
    return params


def names(cfg: Config) -> dict[str, str]:
    """Each parameter's path → its name in the checkpoint, where MTP modules are the layers after the last.

    >>> names(config({"num_hidden_layers": 2, "first_k_dense_replace": 1}))["mtp.0.correction.bias"]
    'model.layers.2.mlp.gate.e_score_correction_bias'
    """
    whole = specs(cfg)
    modules = whole.pop("mtp", [])
    layers = ((f"layers.{{i}}.{node}", f"model.layers.{{i}}.{name}") for node, name in LAYER)
    found = nn.hf_names((*layers, *ENDS), whole)
    for i, p in enumerate(modules):
        found |= {f"mtp.{i}.{path}": f"model.layers.{cfg.num_hidden_layers + i}.{name}"
                  for path, name in nn.hf_names(LAYER, p).items()}
    return found


@moe.staged
def block(p: dict, x_PtD: torch.Tensor, cos_Ptr: torch.Tensor, sin_Ptr: torch.Tensor, segments_PS: torch.Tensor,
          documents_Pt: torch.Tensor, *, xs: torch.Tensor | None, cfg: Config, ops: Ops) -> Generator:
    """One layer; `xs` is the recorded choice of experts [P, t, K] to replay, if any."""
    x_PtD = x_PtD + mla.attention(p, nn.norm(x_PtD, p["attn_norm"], cfg), cos_Ptr, sin_Ptr, segments_PS, cfg, ops)
    h_PtD = nn.norm(x_PtD, p["mlp_norm"], cfg)
    if "router" not in p:
        yield x_PtD + nn.mlp(p, h_PtD, cfg, ops), None
        return
    shared = partial(nn.mlp, p["shared"], h_PtD, cfg, ops) if "shared" in p else None
    yield from moe.layer(p, h_PtD, documents_Pt, segments_PS.shape[1] - 1, cfg.router, ops,
                         onto=x_PtD, experts=partial(nn.experts, cfg=cfg), shared=shared, routes=xs)


@moe.staged
def mtp_block(p: dict, h_PtD: torch.Tensor, next_PtD: torch.Tensor, *shared: torch.Tensor, xs: torch.Tensor | None,
              cfg: Config, ops: Ops) -> Generator:
    """One MTP module (eq. 21, 22): a layer over a projection of a later token's embedding and the last depth's output.

    The embedding's half comes first in eh_proj, as its name says and as DeepSeek's weights have it (vLLM, SGLang,
    Megatron; the paper writes it second). The depth before's output is after its own last norm, as in all of them.
    """
    both = torch.cat([nn.norm(next_PtD, p["enorm"], cfg), nn.norm(h_PtD, p["hnorm"], cfg)], -1)
    x_PtD = ops.linear(both, p["eh_proj"], ("embeds", "embed"))
    yield from block.stages(p, x_PtD, *shared, xs=xs, cfg=cfg, ops=ops)  # pyright: ignore[reportFunctionMemberAccess]


def decoder(params: dict, batch: Batch, cfg: Config, ops: Ops, routes: Sequence[torch.Tensor] | None = None,
            mtp: bool = False) -> tuple[list[torch.Tensor], list[dict | None]]:
    """What the last layer returns, [P, t, D], with `mtp` what each module does; and what the routers did."""
    modules = params.get("mtp", []) if mtp else []
    ids = [ops.split(later(batch.input_ids, batch, k)) for k in range(len(modules) + 1)]
    embedded = ops.use(partial(nn.embed, cfg=cfg), params["embed"], torch.cat(ids, 1)).chunk(len(ids), 1)
    cos_PTr, sin_PTr = nn.rope(cfg.rope, cfg.qk_rope_head_dim, batch.positions, batch.segments, embedded[0].dtype)
    shared, documents_Pt = (ops.split(cos_PTr), ops.split(sin_PTr), batch.segments), moe.documents(batch, ops)
    replays = moe.replays(routes, [*params["layers"], *modules], ops)
    num_layers = len(params["layers"])
    x_PtD, routed = ops.scan(partial(block, cfg=cfg, ops=ops), params["layers"], embedded[0], *shared, documents_Pt,
                             xs=replays[:num_layers])
    outputs, before = [x_PtD], params
    for k, p in enumerate(modules, 1):
        h_PtD = nn.final_norm(before, outputs[-1], cfg, ops)
        # where there is no later token, experts see nothing
        there_Pt = ops.split(later(torch.ones_like(batch.input_ids), batch, k))
        layers = [{name: node for name, node in p.items() if name != "norm"}]
        x_PtD, y = ops.scan(partial(mtp_block, cfg=cfg, ops=ops), layers, h_PtD, embedded[k], *shared,
                            documents_Pt.where(there_Pt > 0, -1), xs=replays[num_layers + k - 1:][:1])
        outputs, routed, before = [*outputs, x_PtD], [*routed, *y], p
    return outputs, routed


def later(x_PT: torch.Tensor, batch: Batch, k: int) -> torch.Tensor:
    """What is k positions later in the same document, 0 where it ends before.

    >>> from xtf.data import Sample, pack
    >>> batch = pack([Sample([5, 6, 7], [1, 1, 1]), Sample([8, 9], [1, 1])], seq_len=5, max_documents=2)
    >>> later(batch.input_ids, batch, 1).tolist()
    [[6, 7, 0, 9, 0]]
    """
    there_PT = batch.positions + k < nn.document_lengths(batch.segments, x_PT.shape[1])
    return x_PT.roll(-k, 1).where(there_PT, 0) if k else x_PT


# without MTP
hidden, forward, loss, token_losses = nn.ends(lambda *args: decoder(*args)[0][0])


def loss_and_routing(params: dict, batch: Batch, cfg: Config, ops: Ops = LOCAL,
                     routes: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, moe.Routing]:
    """`loss` + λ × the mean over MTP modules of their summed losses (eq. 24, 25); what the routers did, modules' last.

    Module k predicts at position i the token i + k + 1 of the same document, weighted as `loss_mask` weights that
    token: the mask is cut over positions, so ranks that hold other positions of the same packs first put it together
    (an all-reduce of P × T numbers). `routes`, one [P, T, K] a layer with experts (as `Routing.experts`), replays
    recorded choices.
    """
    (x_PtD, *ahead), routed = decoder(params, batch, cfg, ops, routes, mtp=True)
    total = nn.summed_loss(params, x_PtD, batch.labels, batch.loss_mask, cfg, ops)
    if ahead:
        at_Pt = ops.split(torch.arange(batch.input_ids.shape[1], device=x_PtD.device).expand_as(batch.input_ids))
        mask_PT = ops.same_packs(batch.loss_mask.new_zeros(batch.input_ids.shape).scatter(1, at_Pt, batch.loss_mask))
        head = params["head"] if "head" in params else params["embed"]
        for k, (x_PtD, p) in enumerate(zip(ahead, params["mtp"], strict=True), 1):
            labels_Pt, weights_Pt = ops.split(later(batch.input_ids, batch, k + 1)), ops.split(later(mask_PT, batch, k))
            nll = nn.summed_loss({"norm": p["norm"], "head": head}, x_PtD, labels_Pt, weights_Pt, cfg, ops)
            total = total + cfg.mtp_loss_weight / len(ahead) * nll
    return total, moe.gather(routed)


def flops(cfg: Config, lengths: Sequence[int], step: tree.Tree | None = None) -> float:
    """FLOPs of `loss_and_routing` over documents of these lengths: forward, or with the specs of a `step` those of
    forward and of the gradients that are made, as in `xtf.nn.flops`.

    Attention is `mla.flops` for each layer and module. The head comes once more for each MTP module, in the k-th of
    which the last k tokens of a document choose no expert and predict nothing.
    """
    whole, tokens, scores = specs(cfg) if step is None else step, sum(lengths), mla.flops(cfg, lengths)
    head, embedded = whole["head" if "head" in whole else "embed"], of.trained(whole["embed"])
    count = lambda work: work.forward if step is None else work.both
    attention = lambda work: scores * (1 if step is None else 1 + 2 * work.attention)
    total, needs, before = 0.0, embedded, whole
    for p in whole["layers"]:
        work = of.layer(p, needs, tokens, cfg.num_experts_per_tok)
        total, needs = total + count(work) + attention(work), work.needs
    total += count(of.product(head, needs or of.trained(whole["norm"]), tokens))
    for k, p in enumerate(whole.get("mtp", []), 1):
        there = tokens - sum(min(k, n) for n in lengths)
        both = needs or embedded or of.trained([before["norm"], p["enorm"], p["hnorm"]])
        joined = of.product(p["eh_proj"], both, tokens)
        rest = {name: node for name, node in p.items() if name not in ("enorm", "hnorm", "eh_proj", "norm")}
        work = of.layer(rest, joined.needs, tokens, cfg.num_experts_per_tok, there)
        total, needs, before = total + count(joined) + count(work) + attention(work), work.needs, p
        total += count(of.product(head, needs or of.trained(p["norm"]), there))
    return total
