"""`python -m xtf.parity` and `logits_and_grads`: against transformers, on one process and on four, and when something
is wrong."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, Qwen3Config, Qwen3MoeConfig

from xtf import hf, models, parity
from xtf.testing import logits_and_grads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("mesh", ["", "dp=2,sp=2"])
def test_a_sound_checkpoint_passes(checkpoint, mesh, capsys):
    assert parity.main([str(checkpoint), "--mesh", mesh]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.self_attn.q_norm.weight" in out and "of 26 tensors" in out and ": ok" in out


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "initializer_range": 0.2}
EXPERTS = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=48,
                                moe_intermediate_size=16, num_experts=4,
                                num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=32, num_local_experts=4,
                            num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(**SMALL, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
                                    n_group=2, topk_group=1,
                                    moe_intermediate_size=16, intermediate_size=48, first_k_dense_replace=1,
                                    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                                    v_head_dim=8),
}


@pytest.mark.parametrize("family, mesh, last", [("qwen3_moe", "ep=2", "model.layers.1.mlp.experts.3.down_proj.weight"),
                                                ("deepseek_v3", "", "model.layers.1.mlp.experts.3.down_proj.weight"),
                                                ("gpt_oss", "", "model.layers.1.mlp.experts.down_proj")])
def test_experts_by_the_names_of_the_files(family, mesh, last, tmp_path, capsys):
    """Each expert's gradient by itself, though transformers stacks them too; DeepSeek's from block FP8, GPT-OSS's from
    MXFP4."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(EXPERTS[family]).save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain"
    if family == "deepseek_v3":
        module, cfg = models.from_hf(path)
        params = hf.load(path, module.specs(cfg), module.names(cfg))
        hf.save(path := tmp_path / "fp8", params, module.names(cfg), like=tmp_path / "plain", quantise="fp8")
    if family == "gpt_oss":
        tensors = load_file(path / "model.safetensors")
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            E, inside, out = tensors.pop(name).shape
            tensors[name + "_blocks"] = torch.randint(0, 256, (E, out, inside // 32, 16), dtype=torch.uint8)
            tensors[name + "_scales"] = torch.full((E, out, inside // 32), 124, dtype=torch.uint8)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
        (path / "config.json").write_text(json.dumps(config))
    assert parity.main([str(path), "--mesh", mesh]) == 0, capsys.readouterr()
    assert last in capsys.readouterr().out


def test_layouts_agree_in_float64(checkpoint):
    sequences = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
    one, four = (logits_and_grads(checkpoint, sequences, torch.float64, layout)
                 for layout in (None, {"dp": 2, "sp": 2}))
    assert [tuple(x.shape) for x in one[0]] == [(5, 61), (1, 61), (3, 61)]
    assert set(one[1]) == set(load_file(checkpoint / "model.safetensors")) == set(four[1])
    for a, b in [*zip(one[0], four[0], strict=True), *((one[1][k], four[1][k]) for k in one[1])]:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * a.abs().max().item())


def test_a_wrong_model_fails(checkpoint, tmp_path, capsys, monkeypatch):
    """A norm's epsilon that only we read differently is beyond the bound, and named."""
    theirs = parity.reference(str(checkpoint), [[1, 2, 3]], torch.float32)
    config = json.loads((checkpoint / "config.json").read_text()) | {"rms_norm_eps": 1e-2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(checkpoint / "model.safetensors"), tmp_path / "model.safetensors")
    monkeypatch.setattr(parity, "reference", lambda *a: theirs)
    assert parity.main([str(tmp_path), "--lengths", "3"]) == 1
    assert "BEYOND  logits" in capsys.readouterr().out


def test_a_corrupt_file_is_one_line_on_ranks_too(checkpoint, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    assert parity.main([str(tmp_path), "--mesh", "dp=2"]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors: truncated" in error and "Traceback" not in error and error.count("\n") == 1


def test_dynamic_rope_remembers_nothing(checkpoint, tmp_path):
    """A long sequence, then a shorter one that is beyond the trained length too."""
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | rope))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert parity.main([str(tmp_path), "--lengths", "40,25"]) == 0


@pytest.mark.parametrize("arguments, message", [(["nowhere"], "nowhere/config.json: no such file"),
                                                (["--mesh", "tp=2"], "'tp=2' is not one of")])
def test_what_cannot_be_compared_is_said(checkpoint, arguments, message, capsys):
    assert parity.main([str(checkpoint), *arguments] if arguments[0].startswith("-") else arguments) == 1
    assert message in capsys.readouterr().err
