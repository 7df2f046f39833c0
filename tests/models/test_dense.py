"""The dense families against transformers, and against themselves in float64."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import xtf
from tests.models import reference as R
from xtf import models, tree
from xtf.kernels.attention import reference_attend, visible

FAMILIES = ["qwen3", "qwen2", "llama"]
BOUND = 1e-5  # fp32 against fp32: what the project promises, of each tensor's largest


def grads_by_name(module, cfg, params, batch, fn="loss"):
    def share(p, b, ops):
        if fn == "loss":
            return module.loss(p, b, cfg, ops)
        if fn == "token_losses":
            return (module.token_losses(p, b, cfg, ops) * b.loss_mask).sum()
        logits = module.forward(p, b, cfg, ops).transpose(1, 2)
        return (F.cross_entropy(logits, b.labels, reduction="none") * b.loss_mask).sum()
    loss, grads = xtf.value_and_grad(share)(params, batch)
    names = module.names(cfg)
    return loss, {names[path]: g for path, g in tree.flatten_with_path(grads)}


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=40)
def test_logits_and_gradients_equal_transformers(name, data):
    hf, seqs = data.draw(R.configs(name)), data.draw(R.sequences())
    model = R.hf_model(hf)
    module, cfg = R.family(R.spelled_4(hf) if data.draw(st.booleans()) else hf)
    params = R.load(model, module, cfg)
    batch, where = R.packed(seqs)
    want_logits, want_grads = R.hf_logits_and_grads(model, seqs)

    with torch.no_grad():
        logits = module.forward(params, batch, cfg)
    _, grads = grads_by_name(module, cfg, params, batch)
    assert grads.keys() == want_grads.keys()
    off = {i: R.deviation(logits[row, at], want_logits[i]) for i, (row, at) in enumerate(where)}
    off |= {key: R.deviation(grads[key], want) for key, want in want_grads.items()}
    if max(off.values()) > BOUND:                  # a few draws are so ill-conditioned that float32 cannot do it
        logits_move, grads_move = R.rounding(model, seqs)
        assert all(x <= max(BOUND, (dict(enumerate(logits_move)) | grads_move)[key]) for key, x in off.items()), off


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=10)
def test_loss_token_losses_and_forward_agree(name, data):
    """Three ways to one number and one gradient, in float64."""
    hf, seqs = data.draw(R.configs(name)), data.draw(R.sequences())
    module, cfg = R.family(hf)
    params, (batch, _) = R.load(R.hf_model(hf), module, cfg, torch.float64), R.packed(seqs)
    batch = replace(batch, loss_mask=batch.loss_mask * torch.linspace(0, 2, batch.loss_mask.shape[1]))
    want, want_grads = grads_by_name(module, cfg, params, batch, "forward")
    for fn in ("loss", "token_losses"):
        loss, grads = grads_by_name(module, cfg, params, batch, fn)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        for key in want_grads:
            assert R.deviation(grads[key], want_grads[key], R.floor(want_grads)) <= 1e-12, (fn, key)
    hidden = module.hidden(params, batch, cfg)
    torch.testing.assert_close(module.forward(params, batch, cfg),
                               hidden @ params.get("head", params["embed"])["weight"].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=15)
def test_packing_is_invisible(name, data):
    """A document's losses do not depend on its neighbours, and gradients are the sum over documents alone (float64)."""
    hf, seqs = data.draw(R.configs(name)), data.draw(R.sequences())
    module, cfg = R.family(hf)
    params, (batch, where) = R.load(R.hf_model(hf), module, cfg, torch.float64), R.packed(seqs)
    nll = module.token_losses(params, batch, cfg)
    _, grads = grads_by_name(module, cfg, params, batch)
    total = {key: torch.zeros_like(g) for key, g in grads.items()}
    for seq, (row, at) in zip(seqs, where, strict=True):
        alone, _ = R.packed([seq], padding=0)
        alone = tree.tree_map(lambda x: x[:1], alone)
        torch.testing.assert_close(module.token_losses(params, alone, cfg)[0, :-1], nll[row, at][:-1], rtol=0,
                                   atol=1e-12)
        for key, g in grads_by_name(module, cfg, params, alone)[1].items():
            total[key] += g
    for key in grads:
        assert R.deviation(grads[key], total[key], R.floor(total)) <= 1e-12, key


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=10)
def test_flops(name, data):
    """`flops` is what torch counts, but for attention, where the mask counts the pairs; forward and backward are
    exactly 3 times forward."""
    hf, seqs = data.draw(R.configs(name)), data.draw(R.sequences())
    module, cfg = R.family(hf)
    params = R.load(R.hf_model(hf), module, cfg)
    batch, _ = R.packed([seqs[-1]], padding=0)
    batch = tree.tree_map(lambda x: x[:1], batch)
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


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_has_the_same_functions(name):
    """Whether they are its own or shared."""
    module = models.FAMILIES[name]
    wanted = ["block", "config", "decoder", "flops", "forward", "hidden", "loss", "names", "specs", "token_losses"]
    wanted += ["loss_and_routing"] * hasattr(module.Config, "router")
    assert all(getattr(module, function).__doc__ for function in wanted)
    assert set(wanted) <= set(getattr(module, "__all__", wanted))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_transformers(name):
    hf = {"model_type": name, "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    for tied in (False, True):
        module, cfg = R.family(hf | {"tie_word_embeddings": tied})
        model = R.hf_model(hf | {"tie_word_embeddings": tied})
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        names = module.names(cfg)
        assert {names[path]: p.shape for path, p in tree.flatten_with_path(module.specs(cfg))} == shapes
        assert len(set(names.values())) == len(names)


def test_init_follows_the_config():
    """Norms are ones, biases zeros, weights normal with `initializer_range`."""
    module, cfg = R.family({"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                            "num_hidden_layers": 1, "num_attention_heads": 4, "initializer_range": 0.1,
                            "attention_bias": True})
    params = xtf.init(module.specs(cfg, torch.bfloat16), seed=1)
    assert {p.dtype for p in tree.leaves(params)} == {torch.bfloat16}
    layer = params["layers"][0]
    assert layer["attn_norm"]["weight"].eq(1).all() and layer["q"]["bias"].eq(0).all()
    assert abs(params["embed"]["weight"].float().std().item() - 0.1) < 5 * 0.1 / (2 * 64 * 32) ** 0.5


def test_changing_one_layer_of_the_specs_changes_that_layer_alone():
    module, cfg = R.family({"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 8})
    specs = module.specs(cfg)
    specs["layers"][0]["q"]["weight"] = None
    assert specs["layers"][1]["q"]["weight"] is not None and specs["head"] is not specs["embed"]
