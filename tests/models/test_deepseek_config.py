"""config.json of DeepSeek V3 and Kimi K2: every field is honoured, known to be without effect, or refused by name."""
import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config

from tests.models import reference as R
from tests.models.test_deepseek import configs
from xtf import moe, nn, tree
from xtf.models import deepseek_v3, mla
from xtf.models.config import NO_EFFECT, ONLY, ROPE

PUBLISHED_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
PUBLISHED_K2 = PUBLISHED_V3 | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn"},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1, "vocab_size": 163840,
}


@pytest.mark.parametrize("hf, parameters, active", [(PUBLISHED_V3, 671.0, 36.6), (PUBLISHED_K2, 1026.4, 32.0)])
def test_the_published_configs(hf, parameters, active):
    """All fields are accounted for, and the parameters (in billions, without MTP) are those that the model cards
    give."""
    cfg = msgspec.structs.replace(deepseek_v3.config(hf), num_nextn_predict_layers=0)
    total = sum(math.prod(p.shape) for p in tree.leaves(deepseek_v3.specs(cfg))) / 1e9
    assert abs(total - parameters) < 0.1
    a_token = deepseek_v3.flops(cfg, [1] * 1000) / 2e12          # documents of one token: next to no attention
    assert abs(a_token - active) < 1.1                           # the cards round, and count the embedding or not
    gain = 0.1 * math.log(cfg.rope.factor) + 1
    assert mla.scale(cfg) == pytest.approx(192 ** -0.5 * gain ** 2, rel=1e-12)
    assert cfg.router == moe.Router(hf["n_routed_experts"], 8, "sigmoid", True, hf["routed_scaling_factor"],
                                    hf["n_group"], hf["topk_group"])


def test_a_silent_kimi_config_is_the_published_one():
    kimi = {k: v for k, v in PUBLISHED_K2.items() if k not in deepseek_v3.KIMI_K2}
    assert deepseek_v3.config(kimi
                              | {"rope_theta": 50000.0}) == deepseek_v3.config(kimi) == deepseek_v3.config(PUBLISHED_K2)
    assert deepseek_v3.config({"model_type": "kimi_k2", "num_attention_heads": 8}).num_key_value_heads == 8


def test_defaults_and_fields_are_those_of_transformers():
    """Every key that the installed class writes is accounted for, and a missing field is its default."""
    hf = DeepseekV3Config().to_dict()
    honoured = {f.name for f in msgspec.structs.fields(deepseek_v3.Config)}
    assert set(hf) - {"head_dim", "qk_head_dim", "output_router_logits"} <= honoured | NO_EFFECT | set(ONLY) | ROPE
    assert not honoured & NO_EFFECT and not honoured & set(ONLY)
    cfg = deepseek_v3.config({})
    assert cfg == deepseek_v3.config(hf) == deepseek_v3.config({"model_type": "deepseek_v3"})
    for field in honoured & set(hf):
        assert getattr(cfg, field) == hf[field], field
    assert cfg.rope == nn.Rope(rope_theta=10000.0)


@given(data=st.data())
@settings(max_examples=30)
def test_spellings_decode_alike(data):
    """transformers 4's, transformers 5's, and what transformers 5 writes for either."""
    hf = data.draw(configs(mtp=2))
    cfg = deepseek_v3.config(hf)
    assert deepseek_v3.config(R.spelled_4(hf)) == cfg and hash(cfg) == hash(deepseek_v3.config(hf))
    written = json.loads(DeepseekV3Config(**{k: v for k, v in hf.items()
                                             if k != "model_type"}).to_json_string(use_diff=False))
    assert deepseek_v3.config(written) == cfg


OTHER = {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 7, "moe_intermediate_size": 5, "num_hidden_layers": 3,
    "num_nextn_predict_layers": 2,
    "n_shared_experts": 3, "n_routed_experts": 64, "routed_scaling_factor": 1.5, "kv_lora_rank": 9, "q_lora_rank": None,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7, "qk_nope_head_dim": 5, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "moe_layer_freq": 2, "first_k_dense_replace": 0,
    "norm_topk_prob": False, "hidden_act": "relu", "max_position_embeddings": 5, "initializer_range": 0.5,
    "rms_norm_eps": 0.25,
    "tie_word_embeddings": True, "rope_interleave": False, "attention_bias": True, "aux_loss_alpha": 0.125,
    "mtp_loss_weight": 0.125, "pad_token_id": 4,
}


def test_each_honoured_field_is_read():
    default = deepseek_v3.config({})
    heads = {"num_attention_heads", "num_key_value_heads"}                                   # together
    assert set(OTHER) == {f.name for f in msgspec.structs.fields(deepseek_v3.Config)} - {"rope"} - heads
    for field, value in OTHER.items():
        assert getattr(deepseek_v3.config({field: value}), field) == value != getattr(default, field), field
    assert deepseek_v3.config({"num_attention_heads": 2, "num_key_value_heads": 2}).num_attention_heads == 2
    assert deepseek_v3.config({"num_mtp_layers": 2, "num_local_experts": 64}) == deepseek_v3.config(
        {"num_nextn_predict_layers": 2, "n_routed_experts": 64})


@pytest.mark.parametrize("field", ["ep_size", "auto_map", "output_router_logits", *sorted(NO_EFFECT - {"model_type"})])
def test_fields_without_effect(field):
    assert deepseek_v3.config({field: "anything"}) == deepseek_v3.config({})


@pytest.mark.parametrize("hf, message", [
    ({"scoring_func": "softmax"}, "scoring_func='softmax'.*sigmoid"),
    ({"seq_aux": False}, "seq_aux=False.*True"),
    ({"topk_method": "greedy"}, "topk_method='greedy'.*noaux_tc"),
    ({"num_key_value_heads": 32}, "num_key_value_heads=32.*128"),
    ({"head_dim": 128}, "head_dim=128.*64"),
    ({"qk_head_dim": 128}, "qk_head_dim=128.*192"),
    ({"n_group": 3}, "n_group=3.*n_routed_experts=256"),
    ({"topk_group": 9}, "topk_group=9"),
    ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok=33.*topk_group=1"),
    ({"n_routed_experts": None}, "n_routed_experts"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ({"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_nextn_predict_layers=1 and num_mtp_layers=2"),
    ({"qk_rope_head_dim": 7}, "7 is odd"),
    ({"v_head_dim": None}, "v_head_dim"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"index_topk": 2048}, "unknown field index_topk"),                                      # DeepSeek V3.2
    ({"sliding_window": 8}, "unknown field sliding_window"),
])
def test_refused_by_name(hf, message):
    with pytest.raises(ValueError, match=message):
        deepseek_v3.config(hf)
