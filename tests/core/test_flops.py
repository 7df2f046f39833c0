"""The formula for a step's FLOPs against what torch counts of real steps, whatever is trained."""
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import xtf
from xtf import cli, models, tree
from xtf.data import Sample, pack
from xtf.transforms import lora

SIZE = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10}
DEEPSEEK = SIZE | EXPERTS | {"num_key_value_heads": 4, "n_routed_experts": 6, "n_group": 2, "topk_group": 1,
                             "kv_lora_rank": 6, "qk_nope_head_dim": 6, "v_head_dim": 10, "qk_rope_head_dim": 4,
                             "head_dim": 4, "first_k_dense_replace": 1}
CONFIGS = {
    "qwen3": ("qwen3", SIZE | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {k: v for k, v in SIZE.items() if k != "head_dim"}),
    "llama": ("llama", SIZE),
    "qwen3_moe": ("qwen3_moe", SIZE | EXPERTS | {"num_experts": 5, "decoder_sparse_step": 2}),
    "gpt_oss": ("gpt_oss", SIZE | {"num_experts_per_tok": 2, "num_local_experts": 5, "sliding_window": 4}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | {"q_lora_rank": 6, "num_nextn_predict_layers": 2}),
    "kimi_k2": ("kimi_k2", DEEPSEEK | {"model_type": "kimi_k2", "q_lora_rank": None, "n_group": 1}),
}


def random_leaves(seed):
    """Each leaf trained with a probability that is the step's own: most, or few."""
    def specs(specs):
        g = torch.Generator().manual_seed(seed)
        part = torch.rand((), generator=g)
        chosen = tree.tree_map(lambda p: replace(p, trainable=p.trainable and bool(
            torch.rand((), generator=g) < part ** 3)), specs)
        return specs if not any(p.trainable for p in tree.leaves(chosen)) else chosen
    return xtf.Transform("random", 5, specs=specs)


def only(*parts):
    """Leaves whose path has one of these are trained."""
    kept = lambda path, p: replace(p, trainable=p.trainable and any(f".{part}." in f".{path}." for part in parts))
    return xtf.Transform("only", 5, specs=lambda specs: tree.map_with_path(kept, specs))


TRAINED = {"all": (), "lora": (lora(3),), "lora of some": (lora(3, targets=["down", "o"]),),
           "last layer": (only("layers.2"),), "head": (only("norm", "head", "embed"),),
           "norms": (only("mlp_norm"),),
           "routers": (only("router", "layers.2.q"),),
           **{f"random {seed}": (random_leaves(seed),) for seed in range(9)}}


def counted(module, cfg, transforms, lengths):
    """FLOPs that torch counts of a step, attention's backward without the scores that it computes again; the specs."""
    batch = pack([Sample([1 + i % 50 for i in range(n)], [1] * n) for n in lengths], sum(lengths), len(lengths))
    batch = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    fn = getattr(module, "loss_and_routing", lambda *args: (module.loss(*args), None))

    def step(params, batch, ops=xtf.LOCAL):
        return xtf.value_and_grad(lambda p, b, o: fn(p, b, cfg, o)[0])(params, batch, ops)[1]
    run = xtf.shard(step, *transforms, specs=module.specs(cfg))
    with FlopCounterMode(display=False) as counter:
        run(xtf.init(run.specs, 0), batch)
    ops = counter.get_flop_counts()["Global"]
    again = ops.get(torch.ops.xtf.attend_backward, 0)
    d, e = (cfg.head_dim,) * 2 if not hasattr(cfg, "kv_lora_rank") else (
        cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim)
    return counter.get_total_flops() - again * 2 * d / (6 * d + 4 * e), run.specs


@pytest.mark.parametrize("what", TRAINED)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_steps_flops_are_those_that_torch_counts(name, what):
    family, hf = CONFIGS[name]
    module = models.FAMILIES[family]
    cfg = module.config(hf)
    want, specs = counted(module, cfg, TRAINED[what], [11])
    assert module.flops(cfg, [11], specs) == pytest.approx(want, rel=1e-12)
    assert module.flops(cfg, [11, 5], specs) == module.flops(cfg, [11], specs) + module.flops(cfg, [5], specs)
    whole = module.flops(cfg, [11], module.specs(cfg))
    assert whole == 3 * module.flops(cfg, [11])
    assert module.flops(cfg, [11], specs) <= (1.2 if "lora" in what else 1) * whole


def test_what_a_run_logs_is_counted_with_its_adapters():
    """The specs that a run counts are those of its step."""
    cfg = models.llama.config(SIZE)
    flags = cli.Flags(model="", data=(), out="", lora=3, dtype="bf16")
    step = xtf.shard(lambda *_: None, *cli.transforms(flags), specs=models.llama.specs(cfg))
    assert cli.step_specs(flags, models.llama.specs(cfg)) == step.specs
