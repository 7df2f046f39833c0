"""Tiny configs of the families with experts, and a training step with everything that experts add to it."""
import torch

import xtf
from xtf import models, moe
from xtf.optim import adamw, chain, clip_by_global_norm

VOCAB, EXPERTS = 13, 4
SHARED = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
          "initializer_range": 0.3, "max_position_embeddings": 64}
LATENT = SHARED | {"num_key_value_heads": 4, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 5, "intermediate_size": 6, "first_k_dense_replace": 1,
                   "kv_lora_rank": 6, "q_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
CONFIGS = {
    "qwen3_moe": SHARED | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 2, "num_experts": EXPERTS,
                           "num_experts_per_tok": 2,
                           "moe_intermediate_size": 5, "norm_topk_prob": True},
    "qwen3_moe with a dense layer": SHARED
    | {"model_type": "qwen3_moe", "num_key_value_heads": 1, "head_dim": 2, "num_experts": EXPERTS,
       "num_experts_per_tok": 1, "moe_intermediate_size": 3, "mlp_only_layers": [0], "intermediate_size": 6},
    "gpt_oss": SHARED | {"model_type": "gpt_oss", "num_key_value_heads": 2, "head_dim": 2, "num_local_experts": EXPERTS,
                         "num_experts_per_tok": 3,
                         "intermediate_size": 5, "sliding_window": 3,
                         "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": LATENT
    | {"model_type": "deepseek_v3", "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.5,
       "norm_topk_prob": True, "num_nextn_predict_layers": 1},
    "kimi_k2": LATENT
    | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.8,
       "norm_topk_prob": True, "num_nextn_predict_layers": 0},
}
NUMBER = ("num_experts", "num_local_experts", "n_routed_experts")
# three and six ranks divide six experts
CONFIGS |= {f"{name} of six": hf | {field: 6 for field in NUMBER if field in hf} for name, hf in CONFIGS.items()}
opt = chain(clip_by_global_norm(0.5), adamw(1e-2))


def family(name: str, dtype: torch.dtype = torch.float64):
    """(module, cfg, specs, state.extra) of one of CONFIGS."""
    hf = CONFIGS[name]
    module = models.FAMILIES[hf["model_type"]]
    cfg = module.config(hf)
    specs = module.specs(cfg, dtype)
    layers = sum("router" in layer for layer in [*specs["layers"], *specs.get("mtp", [])])
    return module, cfg, specs, {"counts": torch.zeros(layers, cfg.router.num_experts, dtype=dtype)}


def everybody_to_the_same(cfg, batch, layers):
    """Recorded routes in which all tokens choose experts 0, 1, ..., so that others get none."""
    return [torch.arange(cfg.router.top_k).expand(*batch.input_ids.shape, -1)] * layers


def step(state, batch, ops=xtf.LOCAL, *, name, k=1, over="document", same=False, mutant=""):
    """One step of a family: the summed loss, a balancing loss, a z-loss, corrections where there are any, and router
    statistics.

    `same`: every token goes to the same experts. `mutant` plants a mistake.
    """
    module, cfg, _, _ = family(name)
    num_tokens, num_real = batch.loss_tokens(ops), moe.num_tokens(batch, ops)
    previous = state.extra["counts"] if over == "batch" else None

    def share(params, batch, ops):
        routes = everybody_to_the_same(cfg, batch, len(state.extra["counts"])) if same else None
        loss, routing = module.loss_and_routing(params, batch, cfg, ops, routes)
        local = xtf.LOCAL if mutant == "balance of local means" else ops
        return (loss / num_tokens + 0.1 * moe.balance(routing, num_real, local, over, previous) + 0.01
                * moe.z_loss(routing, num_real), moe.sums(routing))
    (loss, sums), grads = xtf.microbatch(xtf.value_and_grad(share), k)(state.params, batch, ops)
    updates, new = opt.update(grads, state.opt, state.params, ops)
    if cfg.router.score == "sigmoid":
        updates = moe.correct(updates, state.params, sums["counts"], 1e-3, ops)
    extra = {"counts": sums["counts"].to(state.extra["counts"].dtype)}
    return state.apply(updates, new, extra), {"loss": loss, **moe.metrics(sums)}
