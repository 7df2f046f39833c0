"""Plans of deep models from shallow ones, beside plans of the whole; attention's FLOPs beside formulas; what a plan
leaves behind."""
import math

import pytest
import torch

from tests.core.test_plan import DENSE, EXPERTS, LATENT, family
from xtf import models, plan
from xtf.data.batch import Batch
from xtf.kernels import attention
from xtf.plan.layers import pattern, shallow

WINDOWS = {"model_type": "gpt_oss", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 64,
           "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8,
           "num_experts_per_tok": 2, "sliding_window": 32}


@pytest.mark.parametrize("hf, found", [
    (DENSE | {"num_hidden_layers": 9}, (0, 1)), (LATENT | {"num_hidden_layers": 9, "first_k_dense_replace": 2}, (2, 1)),
    (WINDOWS | {"num_hidden_layers": 9}, (0, 2)),
    (DENSE | {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, (4, 1)),
    (EXPERTS | {"num_hidden_layers": 6, "mlp_only_layers": [1, 4]}, (0, 3)),
    (EXPERTS | {"num_hidden_layers": 6, "decoder_sparse_step": 2}, (0, 2)),
], ids=lambda x: str(x.get("model_type")) if isinstance(x, dict) else str(x))
def test_the_pattern_of_layers(hf, found):
    model, cfg = family(hf)
    assert pattern(model, cfg) == found
    few = shallow(cfg, sum(found))
    assert list(map(str, model.specs(few)["layers"])) == list(map(str, model.specs(cfg)["layers"][:sum(found)]))


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("hf, sizes, options", [
    (DENSE | {"num_hidden_layers": 8}, {"dp": 4, "sp": 2}, {"remat_": True}),
    slow(EXPERTS | {"num_hidden_layers": 9}, {"replicate": 2, "dp": 2, "ep": 2}, {"packs": 2}),
    slow(LATENT | {"num_hidden_layers": 8, "first_k_dense_replace": 2}, {"dp": 2, "ep": 4}, {"moments": "int8"}),
    slow(WINDOWS | {"num_hidden_layers": 13}, {"dp": 2, "ep": 2}, {"documents": 4}),
    slow(EXPERTS | {"num_hidden_layers": 8}, {"ep": 4}, {"packs": 2, "overlap_": True, "remat_": True}),
    (EXPERTS | {"num_hidden_layers": 7}, {"replicate": 2, "dp": 2}, {"rank": 8, "experts_on": "dp"}),
], ids=lambda x: x["model_type"] if isinstance(x, dict) and "model_type" in x else str(x))
def test_the_arithmetic_is_the_whole(hf, sizes, options):
    model, cfg = family(hf)
    whole, quick = (how(model, cfg, sizes, seq_len=512, **options) for how in (plan.measure, plan.estimate))
    assert quick.parameters == whole.parameters and quick.flops == whole.flops and quick.tokens == whole.tokens
    bytes_of = lambda seen: {(m.kind, m.axes, m.ranks): m.bytes for m in seen.messages}
    assert bytes_of(quick) == bytes_of(whole)
    for a, b in zip(quick.messages, whole.messages, strict=True):
        assert abs(a.count - b.count) <= 0.05 * b.count, (a, b)      # some buckets hold several layers' leaves
    assert sum(quick.memory.values()) == quick.peak == pytest.approx(whole.peak, rel=2e-3), (quick.memory, whole.memory)


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes", [
    ("Qwen3-235B-A22B", {"dp": 8, "ep": 8}), ("DeepSeek-V3", {"dp": 32, "ep": 8}), ("gpt-oss-120b", {"dp": 8})])
def test_the_arithmetic_is_the_whole_of_large_models(name, sizes):
    model, cfg = models.from_hf(f"docs/configs/{name}")
    whole, quick = (how(model, cfg, sizes, seq_len=4096, remat_=True) for how in (plan.measure, plan.estimate))
    assert quick.flops == whole.flops and quick.parameters == whole.parameters
    assert quick.peak == pytest.approx(whole.peak, rel=2e-3)


def test_attention_of_gpt_oss_120b_is_the_formula_of_its_windows():
    """Forward 4 H d for each pair of a query and a key that it sees, backward 2.5 times that; every second layer sees
    128 tokens."""
    model, cfg = models.from_hf("docs/configs/gpt-oss-120b")
    seen = plan.estimate(model, cfg, {"dp": 8}, seq_len=4096)
    pairs = 18 * (4096 * 4097 // 2) + 18 * (128 * 129 // 2 + (4096 - 128) * 128)
    assert seen.flops["attention"] == pytest.approx(3.5 * 4 * 64 * 64 * pairs, rel=1e-2)
    assert seen.parameters == pytest.approx(116.8e9, rel=1e-3)       # arXiv 2508.10925, table 1: 116.83 B


@pytest.mark.parametrize("kind, seq_len", [("cpu", 64), ("cpu", 512), ("meta", 64)])
@pytest.mark.parametrize("hf", [DENSE, WINDOWS | {"num_hidden_layers": 2}, LATENT], ids=lambda hf: hf["model_type"])
def test_attention_is_counted_at_every_length(hf, kind, seq_len):
    """Between the pairs that are seen, with what backward computes once or twice, and all pairs of a mask."""
    model, cfg = family(hf)
    seen = plan.measure(model, cfg, {}, seq_len=seq_len, kind=kind, dtype="bf16" if kind == "meta" else "fp32")
    layers = cfg.num_hidden_layers + hf.get("num_nextn_predict_layers", 0)
    wide = (48, 32) if hf is LATENT else (cfg.head_dim, cfg.head_dim)
    windows = getattr(cfg, "windows", (None,) * layers)
    pairs = lambda w: w * (w + 1) // 2 + (seq_len - w) * w
    least = sum(2 * cfg.num_attention_heads * sum(wide) * pairs(min(w or seq_len, seq_len)) for w in windows)
    most = layers * 2 * cfg.num_attention_heads * 2 * wide[0] * seq_len * (seq_len + attention.BLOCK)
    assert 3 * least <= seen.flops["attention"] <= 3.5 * most


def test_a_plan_leaves_nothing_to_the_calls_after_it():
    """Masks of tensors without numbers were found by real calls that had the same segments."""
    model, cfg = family(DENSE)
    ids = torch.randint(cfg.vocab_size, (1, 64))
    batch = Batch(ids, ids, torch.ones(1, 64), torch.arange(64)[None], torch.tensor([[0, 64]], dtype=torch.int32),
                  torch.tensor([64]), 64)
    plan.measure(model, cfg, {}, seq_len=64, kind="cpu", dtype="fp32", batch=batch)
    q = torch.randn(1, 64, 8, 32)
    out = attention.attend(q, q, q, segments=batch.segments)
    want = attention.reference_attend(q, q, q, segments=batch.segments)
    torch.testing.assert_close(out, want)
    assert math.isfinite(out.sum().item())
