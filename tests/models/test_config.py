"""config.json: every field is honoured, known to be without effect, or refused by name."""
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config

from tests.models import reference as R
from xtf import models, nn
from xtf.models.config import NO_EFFECT, ONLY, ROPE

CLASSES = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act":
    "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "transformers.js_config":
    {"kv_cache_dtype": {"fp16": "float16"}}, "use_cache": True, "vocab_size": 49152,
}
OTHER = {
    "vocab_size": 11, "hidden_size": 128, "intermediate_size": 7, "num_hidden_layers": 3, "num_attention_heads": 64,
    "num_key_value_heads": 2,
    "head_dim": 10, "hidden_act": "relu", "max_position_embeddings": 5, "initializer_range": 0.5, "rms_norm_eps": 0.25,
    "tie_word_embeddings": True,
    "mlp_bias": True, "attention_bias": True, "use_sliding_window": True, "max_window_layers": 1, "pad_token_id": 4,
}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_and_fields_are_those_of_transformers(name):
    """Every key that the installed class writes is accounted for, and a missing field is its default."""
    hf, cls = CLASSES[name]().to_dict(), models.FAMILIES[name].Config
    honoured = {f.name for f in msgspec.structs.fields(cls)}
    assert set(hf) <= honoured | NO_EFFECT | set(ONLY) | ROPE
    assert not honoured & NO_EFFECT and not honoured & set(ONLY)
    cfg = models.FAMILIES[name].config({})
    assert cfg == models.FAMILIES[name].config(hf)
    for field in honoured - {"rope"}:
        want = getattr(CLASSES[name](), field, 128)                          # Qwen2's class has no head_dim: 4096 / 32
        assert getattr(cfg, field) == (tuple(want) if isinstance(want, list) else want), field
    assert cfg.rope == nn.Rope(rope_theta=10000.0)


@pytest.mark.parametrize("name", CLASSES)
@given(data=st.data())
@settings(max_examples=50)
def test_spellings_decode_alike(name, data):
    """transformers 4's, transformers 5's, and what transformers 5 writes for either; a Config can be a dictionary's
    key."""
    hf = data.draw(R.configs(name))
    module, cfg = R.family(hf)
    assert module.config(R.spelled_4(hf)) == cfg and hash(module.config(R.spelled_4(hf))) == hash(cfg)
    for spelling in (hf, R.spelled_4(hf)):
        written = json.loads(AutoConfig.for_model(**{k: v for k, v in spelling.items()
                                                     if v is not None}).to_json_string(use_diff=False))
        assert module.config(written) == cfg


@pytest.mark.parametrize("name", CLASSES)
def test_each_honoured_field_is_read(name):
    """Another value in the file is another value in the Config."""
    module = models.FAMILIES[name]
    default = module.config({})
    for field in {f.name for f in msgspec.structs.fields(module.Config)} & set(OTHER):
        assert getattr(module.config({field: OTHER[field]}), field) == OTHER[field] != getattr(default, field)
    linear, dynamic = {"type": "linear", "factor": 2}, {"rope_type": "dynamic", "factor": 3.0}
    for key, value in {"rope_theta": 5.0, "rope_scaling": linear, "rope_parameters": dynamic}.items():
        assert module.config({key: value}).rope != default.rope


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("field", sorted(NO_EFFECT))
def test_fields_without_effect(name, field):
    assert models.FAMILIES[name].config({field: "anything" if field != "model_type"
                                         else name}) == models.FAMILIES[name].config({})


REFUSED = [
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"pretraining_tp": 2}, "pretraining_tp=2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*dequantise"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"is_causal": False}, "is_causal"),
    ({"hidden_act": "xielu"}, "hidden_act='xielu'.*silu"),
    ({"brand_new_field": None}, "unknown field brand_new_field"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"pad_token_id": 10**6}, "pad_token_id=1000000"),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.*linear.*factor"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_scaling.*mrope"),
    ({"rope_parameters": {"rope_type": "default", "beta_fast": 2.0}}, "rope_parameters.*beta_fast"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.*full_attention"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}, "truncate"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}},
     "rope_parameters.*high_freq_factor"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor.*64"),
    ({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "rope_scaling says.*rope_parameters"),
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("hf, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refused_by_name(name, hf, message):
    with pytest.raises(ValueError, match=message):
        models.FAMILIES[name].config(hf)


@pytest.mark.parametrize("hf, message", [
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=32"),
    ({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "linear_attention"),
    ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "use_sliding_window=true"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
])
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_windows_refused_by_name(name, hf, message):
    with pytest.raises(ValueError, match=message):
        models.FAMILIES[name].config(hf)


def test_fields_of_other_families_are_refused():
    others = [("llama", "sliding_window"), ("llama", "layer_types"), ("qwen2", "attention_bias"), ("qwen3", "mlp_bias"),
              ("qwen3", "num_experts")]
    for name, field in others:
        with pytest.raises(ValueError, match=f"{name} config: unknown field {field}"):
            models.FAMILIES[name].config({field: 1})


def test_heads_from_other_fields():
    """null key-value heads are as many as query heads; Llama's and Qwen2's heads divide the hidden size unless told
    otherwise."""
    assert models.qwen3.config({"num_attention_heads": 8, "num_key_value_heads": None}).num_key_value_heads == 8
    assert models.qwen3.config({"num_attention_heads": 64}).num_key_value_heads == 32
    assert models.llama.config({"num_attention_heads": 8}).num_key_value_heads == 8
    assert models.llama.config({"hidden_size": 64, "num_attention_heads": 8, "head_dim": None}).head_dim == 8
    assert models.qwen2.config({"hidden_size": 64, "num_attention_heads": 32, "head_dim": 16}).head_dim == 16
    with pytest.raises(ValueError, match="num_attention_heads=7 does not divide hidden_size=64"):
        models.llama.config({"hidden_size": 64, "num_attention_heads": 7})


def test_original_length_beside_the_rope_parameters_wins():
    """As in transformers (it is where Phi3 keeps it)."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    rope = models.llama.config({"rope_parameters": yarn, "original_max_position_embeddings": 32}).rope
    assert rope == nn.YarnRope(factor=4.0, original_max_position_embeddings=32)


def test_from_hf(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        models.from_hf(tmp_path)
    file = tmp_path / "config.json"
    for text, message in [
        ("{", "config.json: not JSON"), ("[" * 100_000, "config.json: not JSON"), ("[]", "model_type None"),
        ('{"model_type": ["qwen3"]}', r"model_type \['qwen3'\] is not supported"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2'.*llama, qwen2, qwen3"),
        ('{"model_type": "llama", "zzz": 1}', "config.json: llama config: unknown field zzz"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            models.from_hf(tmp_path)
    file.write_text(json.dumps(SMOLLM2))
    module, cfg = models.from_hf(str(tmp_path))
    assert module is models.llama and cfg.head_dim == 64
    assert cfg.rope == nn.Rope(rope_theta=100000.0) and cfg.pad_token_id == 2


@pytest.mark.parametrize("name", CLASSES)
def test_from_hf_reads_what_transformers_writes(name, tmp_path):
    CLASSES[name](num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
                  num_key_value_heads=2).save_pretrained(tmp_path)
    module, cfg = models.from_hf(tmp_path)
    assert module is models.FAMILIES[name] and (cfg.num_hidden_layers, cfg.hidden_size,
                                                cfg.num_attention_heads) == (2, 64, 4)
