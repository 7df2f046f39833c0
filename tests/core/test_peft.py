"""Adapters in PEFT's format, beside peft itself: ours there, theirs here, for every kind of model; and what is refused
by name."""
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import xtf
from tests.core.test_lora import batch, drawn
from xtf import hf, models, peft, tree
from xtf.transforms._lora import adapters, base, join, lora, merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

COMMON = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
          "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "qwen3": {**COMMON, "model_type": "qwen3", "attention_bias": True},
    "qwen3_moe": {**COMMON, "model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 4,
                  "num_experts_per_tok": 2},
    "mixed": {**COMMON, "model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 4,
              "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    "gpt_oss": {**COMMON, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": 4, "intermediate_size": 12},
    "deepseek_v3": {**COMMON, "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 8,
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
                    "n_shared_experts": 1, "q_lora_rank": 8,
                    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
                    "num_nextn_predict_layers": 0},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = batch(packs=1).input_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of each kind, as transformers saves it."""
    folder = tmp_path_factory.mktemp("peft")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**config)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    return folder


def of(folder, t):
    """(module, config, run, parameters whose adapters do something) of a directory under a transform."""
    module, cfg = models.from_hf(folder)
    run = xtf.shard(lambda state, batch, ops: None, t, specs=module.specs(cfg))
    return module, cfg, run, join(hf.load(folder, base(run.specs), module.names(cfg)), adapters(drawn(run.specs)))


def logits(module, cfg, params, ops):
    with torch.no_grad():
        whole = replace(batch(packs=1), segments=torch.tensor([[0, IDS.shape[1]]], dtype=torch.int32))
        return module.forward(params, whole, cfg, ops)


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def by_peft(folder, adapter):
    """Logits as peft computes them; every number of a B must have found its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(theirs(folder), adapter)
    with torch.no_grad():
        out = model(input_ids=IDS).logits
    placed = sum(p.count_nonzero() for n, p in model.named_parameters() if "lora_B" in n)
    assert placed == sum(x.count_nonzero() for n, x in load_file(adapter / peft.FILE).items() if "lora_B" in n)
    return out


OURS = [("qwen3", None), ("qwen3", ["q", "layers.1.down"]), ("qwen3_moe", None), ("qwen3_moe", ["v", "experts.down"]),
        ("mixed", None), ("mixed", ["experts"]), ("gpt_oss", None), ("gpt_oss", ["o", "experts.down"]),
        ("gpt_oss", ["layers.1.experts.gate_up"]),
        ("deepseek_v3", None), ("deepseek_v3", ["shared.gate", "layers.0.up", "experts.down"]),
        ("deepseek_v3", ["layers.0.gate", "q_a", "shared"])]


@pytest.mark.parametrize("name, targets", OURS)
def test_peft_reads_ours_and_we_do(folders, tmp_path, name, targets):
    t = lora(3, alpha=5.0, targets=targets)
    module, cfg, run, params = of(folders / name, t)
    ours, plain = logits(module, cfg, params, run.ops), logits(module, cfg, base(params), xtf.LOCAL)
    assert (ours - plain).abs().max() > 1e-3
    names = module.names(cfg)
    peft.save(tmp_path / "adapter", params, names, t, folders / name)
    torch.testing.assert_close(by_peft(folders / name, tmp_path / "adapter"), ours, rtol=1e-4, atol=1e-5)
    again = peft.read(tmp_path / "adapter", names)
    assert again.specs(module.specs(cfg)) == run.specs and (again.rank, again.alpha) == (3, 5.0)
    loaded = peft.load(tmp_path / "adapter", run.specs, names, again)
    for (path, x), y in zip(tree.flatten_with_path(adapters(params)), tree.leaves(loaded), strict=True):
        assert torch.equal(x, y) and y.requires_grad, path
    hf.save(tmp_path / "merged", merge(params, t), names, like=folders / name)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path / "merged")(IDS).logits, ours, rtol=1e-4, atol=1e-5)


THEIRS = [("qwen3", {"target_modules": "all-linear"}),
          ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
          ("qwen3_moe", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
          ("qwen3_moe", {"target_parameters": EXPERTS[1:]}),
          ("gpt_oss", {"target_modules": ["k_proj"], "target_parameters": EXPERTS}),
          ("gpt_oss", {"target_parameters": EXPERTS[:1]})]


@pytest.mark.parametrize("name, config", THEIRS)
def test_we_read_theirs(folders, tmp_path, name, config):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(theirs(folders / name), LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **config))
        model.save_pretrained(tmp_path / "adapter")
    module, cfg = models.from_hf(folders / name)
    t = peft.read(tmp_path / "adapter", module.names(cfg))
    module, cfg, run, params = of(folders / name, t)
    params = join(base(params), peft.load(tmp_path / "adapter", run.specs, module.names(cfg), t))
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        plain = theirs(folders / name)(IDS).logits
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(module, cfg, params, run.ops), want, rtol=1e-4, atol=1e-5)


def test_what_peft_made_of_ours_comes_back(folders, tmp_path):
    """peft fuses gate's and up's adapters into one of twice the rank; saved by it, they come apart again, bit for
    bit."""
    t = lora(2, alpha=3.0)
    module, cfg, run, params = of(folders / "qwen3_moe", t)
    peft.save(tmp_path / "ours", params, module.names(cfg), t, folders / "qwen3_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(theirs(folders / "qwen3_moe"), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert "base_layer" in " ".join(load_file(tmp_path / "theirs" / peft.FILE))
    back = peft.load(tmp_path / "theirs", run.specs, module.names(cfg),
                     peft.read(tmp_path / "theirs", module.names(cfg)))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(adapters(params)), tree.leaves(back), strict=True))


def test_models_whose_own_code_has_a_module_for_each_expert(tmp_path):
    """Kimi K2: plain modules, and no parameters, for experts and shared experts alike."""
    cfg = models.deepseek_v3.config(CONFIGS["deepseek_v3"] | {"model_type": "kimi_k2"})
    t = lora(2)
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k2"}')
    peft.save(tmp_path / "adapter", xtf.init(t.specs(models.deepseek_v3.specs(cfg))), models.deepseek_v3.names(cfg), t,
              tmp_path)
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert "target_parameters" not in config and {"gate_proj", "up_proj", "down_proj", "o_proj",
                                                  "kv_b_proj"} < set(config["target_modules"])
    found = load_file(tmp_path / "adapter" / peft.FILE)
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight" in found


def test_starting_is_loading_and_drawing(folders):
    module, cfg, run, _ = of(folders / "qwen3", lora(2))
    names = module.names(cfg)
    params = peft.start(folders / "qwen3", run.specs, names, seed=4)
    for ours, want in ((base(params), hf.load(folders / "qwen3", module.specs(cfg), names)),
                       (adapters(params), adapters(xtf.init(run.specs, 4)))):
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(ours), tree.leaves(want), strict=True))
    plain = peft.start(folders / "qwen3", module.specs(cfg), names)
    assert all(x.requires_grad for x in tree.leaves(plain))


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    t = lora(3, alpha=5.0, targets=["q", "down"])
    module, cfg, _, params = of(folders / "qwen3", t)
    path = tmp_path_factory.mktemp("saved") / "adapter"
    peft.save(path, params, module.names(cfg), t, folders / "qwen3")
    return path


def changed(source, out, change=None, **fields):
    shutil.copytree(source, out)
    config = json.loads((out / peft.CONFIG).read_text()) | fields
    (out / peft.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    tensors = load_file(out / peft.FILE)
    save_file(change(tensors) if change else tensors, out / peft.FILE)
    return out


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("fields, change, message", [
    ({"use_dora": True}, None, "adapter_config.json: use_dora = True is not supported"),
    ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save = \['lm_head'\] is not supported"),
    ({"init_lora_weights": "pissa"}, None, "init_lora_weights = 'pissa' is not supported"),
    ({"bias": "all"}, None, "bias = 'all' is not supported"),
    ({"something_new": 1}, None, "something_new = 1 is not supported"),
    ({"peft_type": "IA3"}, None, "peft_type IA3, r 3, lora_alpha 5: must be LORA"),
    ({"r": "gone"}, None, "not the config of a LoRA adapter .KeyError: 'r'"),
    ({"alpha_pattern": {"q_proj": 9}}, None, "scale some adapters differently"),
    ({"lora_alpha": 9.0}, None, "scaled by 3, the transform's by 1.66667"),
    ({}, lambda x: {k: v for k, v in x.items() if k != Q.replace("_A", "_B")},
     r"layers\.0\.q\.lora_b: .*q_proj\.lora_B\.weight is missing"),
    ({}, lambda x: {k: v for k, v in x.items() if "layers.0.self_attn.q_proj" not in k},
     r"layers\.0\.q\.lora_a: the file has no adapter for it"),
    ({}, lambda x: x | {Q: x[Q][:2]}, r"lora_A\.weight has shape \[2, 16\], expected \[3, 16\]"),
    ({}, lambda x: x | {Q.replace("q_proj", "k_proj"): x[Q] + 1},
     r"the specs have no adapter for base_model\S*\.k_proj\.lora_A"),
])
def test_adapters_that_do_not_fit_are_refused_by_name(folders, saved, tmp_path, fields, change, message):
    module, cfg, run, _ = of(folders / "qwen3", lora(3, alpha=5.0, targets=["q", "down"]))
    with pytest.raises(ValueError, match=message):
        peft.load(changed(saved, tmp_path / "x", change, **fields), run.specs, module.names(cfg), lora(3, alpha=5.0))


def test_folders_that_are_something_else(folders, saved, tmp_path):
    module, cfg, _, params = of(folders / "qwen3", lora(2))
    names = module.names(cfg)
    with pytest.raises(FileNotFoundError,
                       match=r"adapter_config\.json: no such file; give the folder of a PEFT adapter"):
        peft.read(folders / "qwen3", names)
    with pytest.raises(ValueError, match="no adapter is of a product of this model"):
        peft.read(saved, {"x.weight": "other.x.weight"})
    with pytest.raises(ValueError, match="the parameters have no adapters"):
        peft.save(tmp_path / "x", base(params), names, lora(2))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes would be replaced whole"):
        peft.save(tmp_path / "notes", params, names, lora(2))
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
