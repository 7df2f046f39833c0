"""Multi-token prediction written out: the modules of DeepSeek V3 (arXiv 2412.19437, section 2.2) on one document, in
plain torch.

As in the paper each depth is a shorter sequence, experts are a loop over tokens, and heads are a loop. From the code
that made and serves the weights it takes what the paper leaves open: the embedding's half comes first in eh_proj
(vLLM's and SGLang's deepseek_nextn, Megatron's multi_token_prediction), and what a depth hands on is after its last
norm. Weights go by their names in the files.
"""
from collections.abc import Mapping

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def logits(files: Mapping[str, Tensor], hf: dict, hidden_nD: Tensor, ids_n: Tensor, cos_nr: Tensor, sin_nr: Tensor,
           scale: float) -> list[Tensor]:
    """For each depth k the logits [n - k, V] of token i + k + 1, given the main model's normed output. cos, sin: of the
    plain layout, by halves."""
    out = []
    for k in range(1, hf["num_nextn_predict_layers"] + 1):
        prefix = f"model.layers.{hf['num_hidden_layers'] + k - 1}."
        w = {name.removeprefix(prefix).removesuffix(".weight"): x for name, x in files.items()
             if name.startswith(prefix)}
        length = len(ids_n) - k
        if length < 1:
            out.append(hidden_nD.new_empty(0, hf["vocab_size"]))
            continue
        later_nD = F.embedding(ids_n[k:], files["model.embed_tokens.weight"], padding_idx=hf.get("pad_token_id"))
        eps = hf["rms_norm_eps"]
        both = torch.cat([norm(later_nD, w["enorm"], eps), norm(hidden_nD[:length], w["hnorm"], eps)], -1)
        x_nD = both @ w["eh_proj"].T
        x_nD = x_nD + attention(w, hf, norm(x_nD, w["input_layernorm"], eps), cos_nr[:length], sin_nr[:length], scale)
        x_nD = x_nD + experts(w, hf, norm(x_nD, w["post_attention_layernorm"], eps))
        hidden_nD = norm(x_nD, w["shared_head.norm"], eps)
        out.append(hidden_nD @ files.get("lm_head.weight", files["model.embed_tokens.weight"]).T)
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turn(x_nr: Tensor, cos_nr: Tensor, sin_nr: Tensor, interleaved: bool) -> Tensor:
    """Each pair as a complex number, times exp(i angle)."""
    half = x_nr.shape[-1] // 2
    first, second = (x_nr[:, 0::2], x_nr[:, 1::2]) if interleaved else (x_nr[:, :half], x_nr[:, half:])
    turned = torch.complex(first, second) * torch.complex(cos_nr[:, :half], sin_nr[:, :half])
    return torch.cat([turned.real, turned.imag], -1)


def attention(w: Mapping[str, Tensor], hf: dict, x_nD: Tensor, cos_nr: Tensor, sin_nr: Tensor, scale: float) -> Tensor:
    nope, rot, v_dim, rank = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"], hf["kv_lora_rank"]
    bias = lambda name: w.get(f"self_attn.{name}.bias", 0.0)
    if hf["q_lora_rank"] is None:
        q = x_nD @ w["self_attn.q_proj"].T
    else:
        q = norm(x_nD @ w["self_attn.q_a_proj"].T + bias("q_a_proj"), w["self_attn.q_a_layernorm"],
                 1e-6) @ w["self_attn.q_b_proj"].T
    latent = x_nD @ w["self_attn.kv_a_proj_with_mqa"].T + bias("kv_a_proj_with_mqa")
    k_rot = turn(latent[:, rank:], cos_nr, sin_nr, hf["rope_interleave"])
    kv = norm(latent[:, :rank], w["self_attn.kv_a_layernorm"], 1e-6) @ w["self_attn.kv_b_proj"].T
    heads = []
    for h in range(hf["num_attention_heads"]):
        q_h, kv_h = q[:, h * (nope + rot):(h + 1) * (nope + rot)], kv[:, h * (nope + v_dim):(h + 1) * (nope + v_dim)]
        scores = q_h[:, :nope] @ kv_h[:, :nope].T + turn(q_h[:, nope:], cos_nr, sin_nr, hf["rope_interleave"]) @ k_rot.T
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append((scores * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ kv_h[:, nope:])
    return torch.cat(heads, -1) @ w["self_attn.o_proj"].T + bias("o_proj")


def experts(w: Mapping[str, Tensor], hf: dict, x_nD: Tensor) -> Tensor:
    """Eq. 12 to 16 with the limit on groups (section 2.1.2), token by token."""
    mlp = lambda name, x: (F.silu(x @ w[f"{name}.gate_proj"].T)
                           * (x @ w[f"{name}.up_proj"].T)) @ w[f"{name}.down_proj"].T
    out, size = [], hf["n_routed_experts"] // hf["n_group"]
    for x_D in x_nD:
        score = (w["mlp.gate"] @ x_D).sigmoid()
        corrected = (score + w["mlp.gate.e_score_correction_bias"]).tolist()
        groups = [range(g * size, (g + 1) * size) for g in range(hf["n_group"])]
        groups.sort(key=lambda group: -sum(sorted(corrected[e] for e in group)[-2:]))
        allowed = [e for group in groups[:hf["topk_group"]] for e in group]
        chosen = sorted(allowed, key=lambda e: -corrected[e])[:hf["num_experts_per_tok"]]
        total = sum(score[e] for e in chosen) + 1e-20 if hf["norm_topk_prob"] else 1.0
        y_D = sum(hf["routed_scaling_factor"] * score[e] / total * mlp(f"mlp.experts.{e}", x_D) for e in chosen)
        out.append(y_D + mlp("mlp.shared_experts", x_D) if hf["n_shared_experts"] else y_D)
    return torch.stack(out)
