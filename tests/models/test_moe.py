"""Mixtures of experts against transformers, and against themselves in float64."""
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, GptOssConfig, Qwen3MoeConfig

import xtf
from tests.models import reference as R
from tests.models import reference_moe as M
from xtf import hf, models, moe, tree
from xtf.data.batch import Sample, pack, stack
from xtf.kernels.attention import reference_attend, visible
from xtf.models.config import NO_EFFECT, ONLY, ROPE
from xtf.spec import num_params

BOUND = 1e-5  # fp32 against fp32: what the project promises, of each tensor's largest
EXACT = 1e-12                                      # float64


def gradients(module, cfg, params, batch, fn="loss"):
    """The summed loss by one of four ways, and its gradients by path."""
    def share(p, b, ops):
        if fn == "loss":
            return module.loss(p, b, cfg, ops)
        if fn == "loss_and_routing":
            return module.loss_and_routing(p, b, cfg, ops)[0]
        if fn == "token_losses":
            return (module.token_losses(p, b, cfg, ops) * b.loss_mask).sum()
        logits = module.forward(p, b, cfg, ops).transpose(1, 2)
        return (F.cross_entropy(logits, b.labels, reduction="none") * b.loss_mask).sum()
    loss, grads = xtf.value_and_grad(share)(params, batch)
    return loss, dict(tree.flatten_with_path(grads))


@pytest.mark.parametrize("skewed", [False, True], ids=["", "skewed"])
@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=15)
def test_logits_and_gradients_equal_transformers(name, skewed, data):
    """Each sequence alone there, packed here; experts without a token, and all tokens on the same experts, among
    them."""
    check_parity(name, skewed, data)


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True], ids=["", "skewed"])
@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=250)
def test_logits_and_gradients_equal_transformers_at_length(name, skewed, data):
    check_parity(name, skewed, data)


def check_parity(name, skewed, data):
    hf, seqs = data.draw(M.configs(name)), data.draw(R.sequences())
    model = M.hf_model(hf, skewed=skewed)
    module, cfg = R.family(M.spelled_4(hf) if data.draw(st.booleans()) else hf)
    params = M.load(model, module, cfg)
    batch, where = R.packed(seqs)
    want_logits, want_grads = R.hf_logits_and_grads(model, seqs)
    want_grads = M.leaves(want_grads, module, cfg)

    with torch.no_grad():
        logits = module.forward(params, batch, cfg)
        _, routing = module.loss_and_routing(params, batch, cfg)
    if skewed:
        assert ((routing.counts_LPSE.sum((1, 2)) > 0).sum(-1) == cfg.router.top_k).all()
    _, grads = gradients(module, cfg, params, batch)
    want = M.by_expert(want_grads)
    off = {i: R.deviation(logits[row, at], want_logits[i]) for i, (row, at) in enumerate(where)}
    off |= {key: R.deviation(g, want[key]) for key, g in M.by_expert(grads).items()}
    off = {key: x for key, x in off.items() if x > BOUND}
    if off:  # where float32 cannot do it, ours errs no more than theirs, or than terms that cancel
        wide, logits_of = M.load(model, module, cfg,
                                 torch.float64), lambda x: {i: x[row, at] for i, (row, at) in enumerate(where)}
        exact = logits_of(module.forward(wide, batch, cfg)) | M.by_expert(gradients(module, cfg, wide, batch)[1])
        ours, moves = logits_of(logits) | M.by_expert(grads), M.rounding(model, seqs, module, cfg)
        cancelled = 4 * torch.finfo(torch.float32).eps * M.largest(want)
        want |= dict(enumerate(want_logits))
        for key in off:
            error = (ours[key] - exact[key]).abs().max()
            bound = max(BOUND, R.deviation(want[key], exact[key]), moves[key]) * exact[key].abs().max()
            assert error <= max(bound, cancelled), (key, error, bound, cancelled)


def drawn(data, name, dtype=torch.float64):
    """(module, cfg, params, batch, where, sequences) of a drawn model."""
    hf, seqs = data.draw(M.configs(name)), data.draw(R.sequences())
    module, cfg = R.family(hf)
    return module, cfg, M.load(M.hf_model(hf), module, cfg, dtype), *R.packed(seqs), seqs


def assert_same(grads, want, bound=EXACT):
    for key in want:
        assert R.deviation(grads[key], want[key], R.floor(want)) <= bound, key


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_four_ways_to_one_loss_agree(name, data):
    """And one gradient, in float64."""
    module, cfg, params, batch, _, _ = drawn(data, name)
    batch = replace(batch, loss_mask=batch.loss_mask * torch.linspace(0, 2, batch.loss_mask.shape[1]))
    want, want_grads = gradients(module, cfg, params, batch, "forward")
    for fn in ("loss", "loss_and_routing", "token_losses"):
        loss, grads = gradients(module, cfg, params, batch, fn)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, want, rtol=EXACT, atol=0)
        assert_same(grads, want_grads)
    hidden = module.hidden(params, batch, cfg)
    torch.testing.assert_close(module.forward(params, batch, cfg),
                               hidden @ params.get("head", params["embed"])["weight"].T, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_packing_is_invisible(name, data):
    """A document's losses and routes do not depend on its neighbours; gradients and counts are sums over documents
    alone (float64)."""
    module, cfg, params, batch, where, seqs = drawn(data, name)
    nll = module.token_losses(params, batch, cfg)
    _, routing = module.loss_and_routing(params, batch, cfg)
    _, grads = gradients(module, cfg, params, batch)
    total, counts = {key: torch.zeros_like(g) for key, g in grads.items()}, 0
    for seq, (row, at) in zip(seqs, where, strict=True):
        alone = tree.tree_map(lambda x: x[:1], R.packed([seq], padding=0)[0])
        torch.testing.assert_close(module.token_losses(params, alone, cfg)[0, :-1], nll[row, at][:-1], rtol=0,
                                   atol=EXACT)
        _, routed = module.loss_and_routing(params, alone, cfg)
        assert all(torch.equal(ours[row, at], theirs[0])
                   for ours, theirs in zip(routing.experts, routed.experts, strict=True))
        counts = counts + routed.counts_LPSE.sum((1, 2))
        for key, g in gradients(module, cfg, params, alone)[1].items():
            total[key] += g
    assert torch.equal(routing.counts_LPSE.sum((1, 2)), counts)
    assert_same(grads, total)


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_padding_is_routed_nowhere_and_counted_nowhere(name, data):
    """What stands in it changes nothing; no row of it reaches an expert."""
    module, cfg, params, batch, where, _ = drawn(data, name)
    rows = []

    def dispatch(x_TD, weights_TK, announced):
        rows.append(x_TD)
        return xtf.LOCAL.dispatch(x_TD, weights_TK, announced)

    real = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, at in where:
        real[row, at] = True
    loss, routing = module.loss_and_routing(params, batch, cfg, replace(xtf.LOCAL, dispatch=dispatch))
    assert len(rows) == len(routing.counts_LPSE) and torch.equal(routing.tokens_P, real.sum(1))
    for experts, counts_PSE in zip(routing.experts, routing.counts_LPSE, strict=True):
        assert (experts[~real] == -1).all() and (experts[real] >= 0).all() and experts.dtype == torch.int16
        chosen_E = torch.stack([(experts == e).sum() for e in range(cfg.router.num_experts)])
        assert torch.equal(counts_PSE.sum((0, 1)).long(), chosen_E) and chosen_E.sum() == cfg.router.top_k * real.sum()
    assert (routing.dropped_LP == 0).all()
    _, grads = gradients(module, cfg, params, batch)
    other = replace(batch, input_ids=torch.where(real, batch.input_ids, 5))
    again, others = gradients(module, cfg, params, other)
    torch.testing.assert_close(again, loss, rtol=EXACT, atol=0)
    assert_same(others, grads)


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_recorded_routes_are_replayed(name, data):
    """The same loss and gradients, the router's too, from the record; another choice where the record says so."""
    module, cfg, params, batch, _, _ = drawn(data, name)
    routing = module.loss_and_routing(params, batch, cfg)[1]
    with_routes = lambda routes: lambda p, b, ops: module.loss_and_routing(p, b, cfg, ops, routes)[0]
    want, want_grads = xtf.value_and_grad(with_routes(None))(params, batch)
    loss, grads = xtf.value_and_grad(with_routes(routing.experts))(params, batch)
    assert torch.equal(loss, want) and all(torch.equal(a, b)
                                           for a, b in zip(tree.leaves(grads), tree.leaves(want_grads), strict=True))
    with pytest.raises(ValueError, match=f"{len(routing.experts) + 1} recorded layers for the {len(routing.experts)}"):
        module.loss_and_routing(params, batch, cfg, routes=[*routing.experts, routing.experts[0]])


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_a_choice_from_outside_equals_transformers_told_to_make_it(name, data):
    """Other experts than the router's: loss and gradients, in which the router's weights still take part."""
    hf_dict, seqs = data.draw(M.configs(name)), data.draw(R.sequences())
    model = M.hf_model(hf_dict)
    module, cfg = R.family(hf_dict)
    params, (batch, where) = M.load(model, module, cfg), R.packed(seqs)
    chosen = module.loss_and_routing(params, batch, cfg)[1].experts
    turned = [torch.where(e < 0, e, (e + 1) % cfg.router.num_experts) for e in chosen]
    share = lambda p, b, ops: module.loss_and_routing(p, b, cfg, ops, turned)[0]
    loss, grads = xtf.value_and_grad(share)(params, batch)
    grads = dict(tree.flatten_with_path(grads))

    total, want = 0.0, {path: torch.zeros_like(g) for path, g in grads.items()}
    for seq, (row, at) in zip(seqs, where, strict=True):
        with M.told(model, [e[row, at].long() for e in turned], cfg):
            logits, alone = R.hf_logits_and_grads(model, [seq])
        total += F.cross_entropy(logits[0][:-1], torch.tensor(seq[1:], dtype=torch.int64), reduction="sum")
        want = {path: want[path] + g for path, g in M.leaves(alone, module, cfg).items()}
    torch.testing.assert_close(loss, total, rtol=BOUND, atol=0)
    for path, g in grads.items():  # some are 0 but for rounding: q's under a window of one token
        assert R.deviation(g, want[path], M.largest(want) / 10) <= BOUND, path


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_balancing_loss_is_transformers(name, data):
    """load_balancing_loss_func on whole sequences of one length, its value and its gradients."""
    hf, length, packs = data.draw(M.configs(name)), data.draw(st.integers(2, 12)), data.draw(st.integers(1, 3))
    model = M.hf_model(hf)
    module, cfg = R.family(hf)
    params, ids = M.load(model, module, cfg), torch.randint(R.VOCAB, (packs, length),
                                                            generator=torch.Generator().manual_seed(length))
    want = model(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss
    want.backward()
    want_grads = M.leaves({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()},
                          module, cfg)
    batch = stack([pack([Sample(row, [1] * length)], length, 1) for row in ids.tolist()])

    def share(params, batch, ops):
        _, routing = module.loss_and_routing(params, batch, cfg, ops)
        return moe.balance(routing, moe.num_tokens(batch, ops), ops, over="transformers")

    loss, grads = xtf.value_and_grad(share)(params, batch)
    torch.testing.assert_close(loss, want, rtol=BOUND, atol=0)
    grads = {path: torch.zeros_like(want_grads[path]) if g is None else g for path, g in tree.flatten_with_path(grads)}
    floor = max(R.floor(want_grads), 1e-2)  # the loss is about 1: below that its gradients are what is left
    for path, g in grads.items():                                        # of probabilities that sum to 1
        assert R.deviation(g, want_grads[path], floor) <= BOUND, path


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_flops(name, data):
    """`flops`, experts counted as often as they are chosen, is what torch counts, but for attention, where the mask
    counts the pairs."""
    module, cfg, params, _, _, seqs = drawn(data, name, torch.float32)
    batch = tree.tree_map(lambda x: x[:1], R.packed([seqs[-1]], padding=0)[0])
    T, ops = batch.input_ids.shape[1], replace(xtf.LOCAL, attend=reference_attend)
    with FlopCounterMode(display=False) as forward:
        module.forward(params, batch, cfg, ops)
    pair = 4 * cfg.num_attention_heads * cfg.head_dim
    dense = pair * T * T * cfg.num_hidden_layers
    seen = pair * sum(int(visible(batch.segments, T, w).sum()) for w in cfg.windows)
    assert forward.get_total_flops() - dense + seen == module.flops(cfg, [T])
    assert module.flops(cfg, [T, 5]) == module.flops(cfg, [T]) + module.flops(cfg, [5])
    with FlopCounterMode(display=False) as both:
        whole = replace(batch, loss_mask=torch.ones(1, T))
        xtf.value_and_grad(lambda p, b, o: module.loss(p, b, cfg, o))(params, whole, ops)
    assert both.get_total_flops() == 3 * forward.get_total_flops()


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=4)
def test_directories_of_transformers_in_and_out(name, data):
    """What it wrote is read to the same logits, and written again byte for byte."""
    hf_dict, seqs = data.draw(M.configs(name)), data.draw(R.sequences())
    model = M.hf_model(hf_dict)
    with TemporaryDirectory() as path, TemporaryDirectory() as out:
        model.to(torch.bfloat16).save_pretrained(path)
        module, cfg = models.from_hf(path)
        params = hf.load(path, module.specs(cfg), module.names(cfg))
        hf.save(f"{out}/model", params, module.names(cfg), like=path)
        files = {file.name: file.read_bytes() for file in Path(path).iterdir() if file.name != "generation_config.json"}
        assert files == {file.name: file.read_bytes() for file in Path(out, "model").iterdir()
                         if file.name != "generation_config.json"}
    batch, where = R.packed(seqs)
    want, _ = R.hf_logits_and_grads(model.float(), seqs)
    got = module.forward(params, batch, cfg)
    assert max(R.deviation(got[row, at], want[i]) for i, (row, at) in enumerate(where)) <= BOUND


# ---- config.json -----------------------------------------------------------------------------------------------------

CLASSES = {"qwen3_moe": Qwen3MoeConfig, "gpt_oss": GptOssConfig}
RENAMED = {"qwen3_moe": {"num_local_experts"}, "gpt_oss": set()}  # transformers 5's name for num_experts
OTHER = {
    "vocab_size": 11, "hidden_size": 256, "intermediate_size": 7, "num_hidden_layers": 3, "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 10, "max_position_embeddings": 5, "initializer_range": 0.5, "rms_norm_eps": 0.25,
    "tie_word_embeddings": True,
    "use_sliding_window": True, "decoder_sparse_step": 2, "mlp_only_layers": (1,), "moe_intermediate_size": 9,
    "num_experts": 40,
    "num_local_experts": 40, "num_experts_per_tok": 5, "norm_topk_prob": True, "router_aux_loss_coef": 0.5,
    "pad_token_id": 4, "swiglu_alpha": 1.0,
    "swiglu_limit": 2.0, "output_router_logits": True,
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
                            "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False}, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


@pytest.mark.parametrize("name", M.FAMILIES)
def test_defaults_and_fields_are_those_of_transformers(name):
    """Every key that the installed class writes is accounted for, and a missing field is its default."""
    module, theirs = models.FAMILIES[name], CLASSES[name]()
    honoured = {f.name for f in msgspec.structs.fields(module.Config)}
    assert set(theirs.to_dict()) <= honoured | NO_EFFECT | set(ONLY) | ROPE | RENAMED[name]
    cfg = module.config({})
    assert cfg == module.config(theirs.to_dict())
    for field in honoured - {"rope"}:
        want = getattr(theirs, field, cfg.hidden_size // cfg.num_attention_heads)  # Qwen3MoeConfig has no head_dim
        assert getattr(cfg, field) == (tuple(want) if isinstance(want, list) else want), field
    assert cfg.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert cfg.windows[0] == (None if name == "qwen3_moe" else 128)


@pytest.mark.parametrize("name", M.FAMILIES)
@given(data=st.data())
@settings(max_examples=30)
def test_spellings_decode_alike(name, data):
    """transformers 4's, transformers 5's, and what transformers 5 writes for either; a Config can be a dictionary's
    key."""
    drawn = data.draw(M.configs(name))
    module, cfg = R.family(drawn)
    assert module.config(M.spelled_4(drawn)) == cfg and hash(module.config(M.spelled_4(drawn))) == hash(cfg)
    for spelling in (drawn, M.spelled_4(drawn)):
        written = json.loads(AutoConfig.for_model(**{k: v for k, v in spelling.items()
                                                     if v is not None}).to_json_string(use_diff=False))
        assert module.config(written) == cfg


@pytest.mark.parametrize("name", M.FAMILIES)
def test_each_honoured_field_is_read(name):
    """Another value in the file is another value in the Config, or a refusal; what chooses experts is what the router
    gets."""
    module = models.FAMILIES[name]
    default, honoured = module.config({}), {f.name for f in msgspec.structs.fields(module.Config)}
    assert honoured - set(OTHER) == {"rope", "hidden_act", "attention_bias",
                                     "sliding_window"} | ({"layer_types"} if name == "gpt_oss" else set())
    for field in honoured & set(OTHER):
        assert getattr(module.config({field: OTHER[field]}), field) == OTHER[field] != getattr(default, field)
    assert module.config(({"use_sliding_window": True} if name == "qwen3_moe" else {})
                         | {"sliding_window": 3}).windows[0] == 3
    assert module.config({"attention_bias": not default.attention_bias}) != default
    assert module.config({"num_experts": 40, "num_experts_per_tok": 5}).router[:2] == (40, 5)
    assert module.config({"num_local_experts": 40}) == module.config({"num_experts": 40})
    for key, value in {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2},
                       "rope_parameters": {"rope_type": "default"}}.items():
        assert (module.config({key: value}).rope != default.rope) == (key != "rope_parameters" or name == "gpt_oss")


@pytest.mark.parametrize("name, hf_dict, message", [
    *((name, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config=.*gptq.*not supported")
      for name in M.FAMILIES),
    *((name, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*weight_block_size")
      for name in M.FAMILIES),
    *((name, {"num_experts": 8, "num_local_experts": 9},
       "num_experts=8.*num_local_experts=9|num_local_experts=9.*num_experts=8")
      for name in M.FAMILIES),
    *((name, {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3.*2") for name in M.FAMILIES),
    *((name, {"num_local_experts": 0}, "experts") for name in M.FAMILIES),
    *((name, {"shared_expert_intermediate_size": 8}, "unknown field shared_expert_intermediate_size")
      for name in M.FAMILIES),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 24}, "unknown field layer_types"),
    ("qwen3_moe", {"swiglu_limit": 7.0}, "unknown field swiglu_limit"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gpt_oss", {"norm_topk_prob": True}, "unknown field norm_topk_prob"),
    ("gpt_oss", {"experts_per_token": 2, "num_experts_per_tok": 4}, "experts_per_token=2"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=36"),
    ("gpt_oss", {"sliding_window": None}, "sliding_attention but there is no window"),
])
def test_refused_by_name(name, hf_dict, message):
    with pytest.raises(ValueError, match=message):
        models.FAMILIES[name].config(hf_dict)


def test_fields_without_effect_here():
    """A window's first layer, which transformers' Qwen3-MoE does not read, and what OpenAI adds for its own code."""
    assert models.qwen3_moe.config({"max_window_layers": 3}) == models.qwen3_moe.config({})
    assert models.gpt_oss.config({"initial_context_length": 8, "experts_per_token": 4}) == models.gpt_oss.config({})
    assert models.gpt_oss.config({"num_key_value_heads": None}).num_key_value_heads == 64
    assert models.gpt_oss.config({"head_dim": None, "hidden_size": 640}).head_dim == 10


@pytest.mark.parametrize("hf_dict, more, total, active", [
    (QWEN3_30B, {}, 30.53, 3.04),
    (QWEN3_30B, {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
                 "num_attention_heads": 64, "num_hidden_layers": 94}, 235.09, 21.57),
    (GPT_OSS_20B, {}, 20.91, 3.61),
    (GPT_OSS_20B, {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": None}, 116.83, 5.13),
], ids=["Qwen3-30B-A3B", "Qwen3-235B-A22B", "gpt-oss-20b", "gpt-oss-120b"])
def test_published_models_have_their_published_sizes(hf_dict, more, total, active):
    """Billions of parameters, in all and multiplying one token with its embedding not counted (arXiv 2508.10925, table
    1, counts so)."""
    module, cfg = R.family(hf_dict | more)
    assert round(num_params(module.specs(cfg)) / 1e9, 2) == total
    pairs = 4 * cfg.num_attention_heads * cfg.head_dim * cfg.num_hidden_layers
    assert abs((module.flops(cfg, [1]) - pairs) / 2e9 - active) < 0.02


def test_from_hf_leaves_out_what_the_files_lack(tmp_path, capsys):
    """MTP modules that config.json announces: kept where there are no files yet (a plan needs none), or where files
    have them."""
    Path(tmp_path, "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "num_hidden_layers": 4,
                                                         "num_nextn_predict_layers": 1}))
    assert models.from_hf(tmp_path)[1].num_nextn_predict_layers == 1
    for layer, kept in ((4, 1), (3, 0)):
        save_file({f"model.layers.{layer}.input_layernorm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
        assert models.from_hf(tmp_path)[1].num_nextn_predict_layers == kept
        assert ("num_nextn_predict_layers=1, but the directory has no tensors" in capsys.readouterr().out) == (not kept)
