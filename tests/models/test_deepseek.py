"""DeepSeek V3 and Kimi K2 against transformers, MTP against the paper written out, and both against themselves in
float64."""
import json
from dataclasses import replace
from functools import partial

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

import xtf
from tests.models import mtp_reference
from tests.models import reference as R
from xtf import hf as files
from xtf import models, nn, tree
from xtf.data.batch import Sample, pack, stack
from xtf.kernels.attention import reference_attend
from xtf.models import deepseek_v3, mla
from xtf.optim import adamw
from xtf.testing import Layout
from xtf.testing.laws import compare

BOUND = 1e-5  # fp32 against fp32: what the project promises, of each tensor's largest
EXACT = 1e-12                                      # float64

SMALL = {
    "model_type": "deepseek_v3", "vocab_size": R.VOCAB, "hidden_size": 8, "intermediate_size": 12,
    "moe_intermediate_size": 6, "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4,
    "kv_lora_rank": 4, "q_lora_rank": 6,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 3, "v_head_dim": 5, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "tie_word_embeddings": False,
}


@st.composite
def configs(draw, mtp: int = 0) -> dict:
    """A config.json in transformers 5's spelling, of either model_type, with at most `mtp` MTP modules."""
    half, heads, layers = draw(st.sampled_from([2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, top_groups * size))
    return {
        "model_type": draw(st.sampled_from(["deepseek_v3", "kimi_k2"])), "vocab_size": R.VOCAB,
        "hidden_size": draw(st.sampled_from([8, 16])),
        "intermediate_size": 12, "moe_intermediate_size": draw(st.sampled_from([4, 6])), "num_hidden_layers": layers,
        "num_nextn_predict_layers": draw(st.integers(0, mtp)), "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_shared_experts": draw(st.integers(1, 2)), "n_routed_experts": groups * size,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "kv_lora_rank": draw(st.sampled_from([4, 8])), "q_lora_rank": draw(st.sampled_from([None, 6])),
        "qk_rope_head_dim": 2 * half,
        "qk_nope_head_dim": draw(st.sampled_from([3, 8])), "v_head_dim": draw(st.sampled_from([2, 5, 16])),
        "n_group": groups,
        "topk_group": top_groups, "num_experts_per_tok": top_k,
        "first_k_dense_replace": draw(st.integers(0, layers - 1)),
        "norm_topk_prob": top_k > 1 and draw(st.booleans()),  # of one, the normalised weight is 1 and has no gradient
        "hidden_act": draw(st.sampled_from(["silu", "silu", "gelu"])),
        "max_position_embeddings": draw(st.sampled_from([8, 16, 64])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])), "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(R.ropes(half)), "rope_interleave": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([None, 3])),
    }


def family(hf: dict):
    return deepseek_v3, deepseek_v3.config(hf)


def hf_model(hf: dict, seed: int = 0, skewed: bool = False) -> torch.nn.Module:
    """transformers' model in float32, every parameter and correction drawn so that it matters; `skewed`: all tokens
    choose the same experts."""
    cfg = DeepseekV3Config(**{k: v for k, v in hf.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager", dtype=torch.float32)
    model.set_experts_implementation("eager")
    return drawn(model.eval(), hf, seed, skewed)


def drawn(model: torch.nn.Module, hf: dict, seed: int = 0, skewed: bool = False) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction" in n)]:
            noise = torch.randn(p.shape, generator=generator)
            scale = 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5
            if "embed" in name and not hf["tie_word_embeddings"]:
                scale = 1.0
            p.copy_(noise * scale + ("norm" in name))
            if "correction" in name and skewed:
                p[:hf["num_experts_per_tok"]] += 10
    return model


def leaves(tensors: dict[str, torch.Tensor], cfg) -> dict[str, torch.Tensor]:
    """transformers' tensors (parameters or gradients) as ours, by path; none may be left over."""
    tensors, out = dict(tensors), {}
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
        gate, up = tensors.pop(name).chunk(2, 1)
        stem = name.removesuffix("gate_up_proj")
        tensors |= {stem + "{e}.gate_proj.weight": gate, stem + "{e}.up_proj.weight": up,
                    stem + "{e}.down_proj.weight": tensors.pop(stem + "down_proj")}
    for path, name in deepseek_v3.names(cfg).items():
        if not path.startswith("mtp."):
            out[path] = tensors.pop(name)
    assert not tensors
    return out


def load(model: torch.nn.Module, cfg, dtype: torch.dtype = torch.float32):
    """transformers' weights as our parameter tree, MTP modules drawn."""
    buffers = {n: b for n, b in model.named_buffers() if "correction" in n}
    values, generator = leaves(dict(model.named_parameters()) | buffers, cfg), torch.Generator().manual_seed(1)

    def leaf(path: str, p: xtf.Param) -> torch.Tensor:
        if path not in values:
            noise = torch.randn(p.shape, generator=generator)
            scale = p.shape[-1] ** -0.5 if len(p.shape) > 1 else 0.3
            values[path] = 1 + 0.3 * noise if "norm" in path else scale * noise
        return values[path].detach().to(dtype).clone().requires_grad_(p.trainable)
    return tree.map_with_path(leaf, deepseek_v3.specs(cfg))


def gradients(cfg, params, batch, fn="loss", ops=xtf.LOCAL):
    """The summed loss by one of four ways, and its gradients by path, stacked experts one by one."""
    def share(p, b, ops):
        if fn == "token_losses":
            return (deepseek_v3.token_losses(p, b, cfg, ops) * b.loss_mask).sum()
        if fn == "forward":
            nll = F.cross_entropy(deepseek_v3.forward(p, b, cfg, ops).transpose(1, 2), b.labels, reduction="none")
            return (nll * b.loss_mask).sum()
        out = getattr(deepseek_v3, fn)(p, b, cfg, ops)
        return out[0] if fn == "loss_and_routing" else out
    loss, grads = xtf.value_and_grad(share)(params, batch, ops)
    return loss, by_expert(dict(tree.flatten_with_path(grads)))


def by_expert(grads: dict) -> dict:
    return {f"{path}[{e}]": x for path, g in grads.items() if g is not None
            for e, x in (enumerate(g) if ".experts." in path else [("", g)])}


def theirs(model: torch.nn.Module, seqs: list, cfg) -> dict:
    """transformers' logits by sequence and gradients by our paths, of the summed next-token loss."""
    logits, grads = R.hf_logits_and_grads(model, seqs)
    corrections = {n: torch.zeros(0) for n, _ in model.named_buffers() if "correction" in n}
    grads = {path: g for path, g in leaves(grads | corrections, cfg).items() if "correction" not in path}
    return dict(enumerate(logits)) | by_expert(grads)


def rounding(model: torch.nn.Module, seqs: list, cfg) -> dict:
    """`theirs` where every weight has moved by about 4 roundings of float32: no float32 computation can be held to
    less."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 4 * torch.finfo(p.dtype).eps * torch.randn(p.shape, generator=generator))
    return theirs(model, seqs, cfg)


@pytest.mark.parametrize("skewed", [False, True])
@given(data=st.data())
@settings(max_examples=25)
def test_logits_and_gradients_equal_transformers(skewed, data):
    """Each sequence alone there, packed here; experts without a token, and all tokens on the same experts, among
    them."""
    hf, seqs = data.draw(configs()), data.draw(R.sequences())
    model = hf_model(hf, skewed=skewed)
    cfg = deepseek_v3.config(R.spelled_4(hf) if data.draw(st.booleans()) else hf)
    params, (batch, where) = load(model, cfg), R.packed(seqs)
    want = theirs(model, seqs, cfg)
    with torch.no_grad():
        logits = deepseek_v3.forward(params, batch, cfg)
        routing = deepseek_v3.loss_and_routing(params, batch, cfg)[1]
    assert routing.counts_LPSE.sum() == sum(map(len, seqs)) * cfg.num_experts_per_tok * sum(cfg.sparse)
    if skewed:
        assert (routing.counts_LPSE.sum((1, 2)) > 0).sum() == cfg.num_experts_per_tok * sum(cfg.sparse)
    got = {i: logits[row, at] for i, (row, at) in enumerate(where)} | gradients(cfg, params, batch)[1]
    assert got.keys() == want.keys()
    off = {key: R.deviation(got[key], x) for key, x in want.items()}
    if max(off.values()) > BOUND:                  # a few draws are so ill-conditioned that float32 cannot do it
        allowed = {key: R.deviation(x, want[key]) for key, x in rounding(model, seqs, cfg).items()}
        beyond = {k: (x, allowed[k]) for k, x in off.items() if x > BOUND}
        assert all(x <= max(BOUND, allowed[key]) for key, x in off.items()), beyond


def test_the_latents_norms_keep_their_own_epsilon():
    """1e-6 whatever rms_norm_eps says, in the published code and in transformers (drawn above too)."""
    hf = SMALL | {"rms_norm_eps": 0.1}
    model, (batch, _) = hf_model(hf), R.packed([list(range(9))], padding=0)
    cfg = deepseek_v3.config(hf)
    want = model(input_ids=batch.input_ids[:1]).logits
    torch.testing.assert_close(deepseek_v3.forward(load(model, cfg), tree.tree_map(lambda x: x[:1], batch), cfg), want,
                               rtol=0, atol=1e-5)


def test_a_dense_layer_now_and_then():
    """moe_layer_freq, which transformers does not know: its model with the dense layers put in by hand."""
    hf = SMALL | {"num_hidden_layers": 5, "first_k_dense_replace": 1, "moe_layer_freq": 2}
    cfg = deepseek_v3.config(hf)
    assert cfg.sparse == (False, False, True, False, True)
    model = hf_model(hf)
    torch.manual_seed(0)                                             # the new layers' weights
    for i in (1, 3):
        model.model.layers[i].mlp = DeepseekV3MLP(model.config).eval()
    seqs = [list(range(3, 20)), [5, 9]]
    batch, _ = R.packed(seqs)
    got = gradients(cfg, load(model, cfg), batch)[1]
    for key, want in theirs(model, seqs, cfg).items():
        assert not isinstance(key, str) or R.deviation(got[key], want) <= BOUND, key


def test_without_shared_experts():
    """None (the published code's) and 0 are the model whose shared experts give nothing."""
    with_shared, (batch, _) = deepseek_v3.config(SMALL), R.packed([list(range(9))])
    params = xtf.init(deepseek_v3.specs(with_shared), seed=0)
    for layer in params["layers"][1:]:
        layer["shared"]["down"]["weight"].data.zero_()
    want = deepseek_v3.forward(params, batch, with_shared)
    for layer in params["layers"][1:]:
        del layer["shared"]
    for number in (None, 0):
        cfg = deepseek_v3.config(SMALL | {"n_shared_experts": number})
        shapes = lambda t: tree.tree_map(lambda p: tuple(p.shape), t)
        assert shapes(deepseek_v3.specs(cfg)) == shapes(params)
        torch.testing.assert_close(deepseek_v3.forward(params, batch, cfg), want, rtol=0, atol=0)


@given(data=st.data())
@settings(max_examples=10)
def test_loss_token_losses_and_forward_agree(data):
    """Four ways to one number and one gradient, in float64."""
    hf, seqs = data.draw(configs()), data.draw(R.sequences())
    cfg, (batch, _) = deepseek_v3.config(hf), R.packed(seqs)
    params = load(hf_model(hf), cfg, torch.float64)
    batch = replace(batch, loss_mask=batch.loss_mask * torch.linspace(0, 2, batch.loss_mask.shape[1]))
    want, want_grads = gradients(cfg, params, batch, "forward")
    for fn in ("loss", "token_losses", "loss_and_routing"):
        loss, grads = gradients(cfg, params, batch, fn)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, want, rtol=EXACT, atol=0)
        for key in want_grads:
            assert R.deviation(grads[key], want_grads[key], R.floor(want_grads)) <= EXACT, (fn, key)


@given(data=st.data())
@settings(max_examples=10)
def test_packing_is_invisible(data):
    """A document's losses (MTP among them), choices and gradients do not depend on its neighbours (float64)."""
    hf, seqs = data.draw(configs(mtp=2)), data.draw(R.sequences())
    cfg, (batch, where) = deepseek_v3.config(hf), R.packed(seqs)
    params = load(hf_model(hf), cfg, torch.float64)
    loss, grads = gradients(cfg, params, batch, "loss_and_routing")
    _, routing = deepseek_v3.loss_and_routing(params, batch, cfg)
    alone_loss, alone_grads = torch.zeros_like(loss), {key: torch.zeros_like(g) for key, g in grads.items()}
    for seq, (row, at) in zip(seqs, where, strict=True):
        alone = tree.tree_map(lambda x: x[:1], R.packed([seq], padding=0)[0])
        for mine, together in zip(deepseek_v3.loss_and_routing(params, alone, cfg)[1].experts, routing.experts,
                                  strict=True):
            assert (mine[0] == together[row, at]).all()
        one, one_grads = gradients(cfg, params, alone, "loss_and_routing")
        alone_loss = alone_loss + one
        alone_grads = {key: g + one_grads[key] for key, g in alone_grads.items()}
    torch.testing.assert_close(loss, alone_loss, rtol=EXACT, atol=EXACT)
    for key, g in grads.items():
        assert R.deviation(g, alone_grads[key], R.floor(alone_grads)) <= EXACT, key


@given(data=st.data())
@settings(max_examples=10)
def test_replayed_choices_are_the_same_step(data):
    """Recorded on one pass and replayed on another, where the corrections (which steer the choice alone) are others:
    nothing changes."""
    hf, seqs = data.draw(configs(mtp=1)), data.draw(R.sequences())
    cfg, (batch, _) = deepseek_v3.config(hf), R.packed(seqs)
    params = load(hf_model(hf), cfg, torch.float64)
    loss, routing = deepseek_v3.loss_and_routing(params, batch, cfg)
    elsewhere = tree.map_with_path(lambda path, x: torch.randn_like(x) if path.endswith("correction.bias") else x,
                                   params)
    replayed, again = deepseek_v3.loss_and_routing(elsewhere, batch, cfg, routes=routing.experts)
    assert replayed == loss and all((a == b).all() for a, b in zip(again.experts, routing.experts, strict=True))


@given(data=st.data())
@settings(max_examples=10)
def test_flops(data):
    """`flops` is what torch counts; forward and backward are exactly 3 times forward."""
    hf, lengths = data.draw(configs(mtp=2)), data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    cfg = deepseek_v3.config(hf)
    params, (batch, _) = load(hf_model(hf), cfg), R.packed([[1] * n for n in lengths[:1]], padding=0)
    batch = replace(tree.tree_map(lambda x: x[:1], batch), loss_mask=torch.ones(1, lengths[0]))
    with FlopCounterMode(display=False) as forward:
        deepseek_v3.forward(params, batch, cfg)
    assert forward.get_total_flops() == deepseek_v3.flops(msgspec.structs.replace(cfg, num_nextn_predict_layers=0),
                                                          lengths[:1])
    with FlopCounterMode(display=False) as both:  # the reference attention computes the pairs that are masked as well
        gradients(cfg, params, batch, "loss_and_routing", replace(xtf.LOCAL, attend=reference_attend))
    layers, T = cfg.num_hidden_layers + cfg.num_nextn_predict_layers, lengths[0]
    masked = 2 * cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
                                            + cfg.v_head_dim) * (T * T - T * (T + 1) // 2)
    assert both.get_total_flops() == 3 * (deepseek_v3.flops(cfg, lengths[:1]) + layers * masked)
    assert deepseek_v3.flops(cfg, lengths) == sum(deepseek_v3.flops(cfg, [n]) for n in lengths)


# ---- MTP -------------------------------------------------------------------------------------------------------------

@given(data=st.data())
@settings(max_examples=15)
def test_mtp_is_the_paper_written_out(data):
    """Loss and every gradient of up to two modules, documents packed, the mask of the token that is predicted;
    float64."""
    hf, seqs = data.draw(configs(mtp=2).filter(lambda hf: hf["num_nextn_predict_layers"])), data.draw(R.sequences())
    hf |= {"hidden_act": "silu"}
    cfg, (batch, where) = deepseek_v3.config(hf), R.packed(seqs)
    batch = replace(batch, loss_mask=batch.loss_mask * torch.linspace(0, 2, batch.loss_mask.shape[1]))
    params = load(hf_model(hf), cfg, torch.float64)
    loss, grads = gradients(cfg, params, batch, "loss_and_routing")

    names, leaves_ = deepseek_v3.names(cfg), dict(tree.flatten_with_path(params))
    named = {name: x for path, leaf in leaves_.items() for name, x in files.file_tensors(names, path, leaf).items()}
    hidden = deepseek_v3.hidden(params, batch, cfg)
    cos, sin = nn.rope(cfg.rope, cfg.qk_rope_head_dim, batch.positions, batch.segments, torch.float64)
    want = deepseek_v3.loss(params, batch, cfg)
    for seq, (row, at) in zip(seqs, where, strict=True):
        ids, mask = torch.tensor(seq), batch.loss_mask[row, at].double()
        depths = mtp_reference.logits(named, hf, hidden[row, at], ids, cos[row, at], sin[row, at], mla.scale(cfg))
        for k, logits in enumerate(depths, 1):
            if len(ids) > k + 1:                                # the last of them has nothing to predict
                nll = F.cross_entropy(logits[:-1], ids[k + 1:], reduction="none")
                want = want + 0.3 / len(depths) * (nll * mask[k:-1]).sum()
    torch.testing.assert_close(loss, want, rtol=EXACT, atol=EXACT)
    trainable = {path: leaf for path, leaf in leaves_.items() if leaf.requires_grad}
    want_grads = by_expert(dict(zip(trainable, torch.autograd.grad(want, list(trainable.values())), strict=True)))
    assert want_grads.keys() == grads.keys()
    for key, g in want_grads.items():
        assert R.deviation(grads[key], g, R.floor(want_grads)) <= EXACT, key


@given(data=st.data())
@settings(max_examples=10)
def test_the_reference_is_transformers_drafting_module(data):
    """transformers drafts with these modules (it does not train them): its logits at every position are the
    reference's."""
    hf, seqs = data.draw(configs(mtp=2).filter(lambda hf: hf["num_nextn_predict_layers"])), data.draw(R.sequences())
    hf |= {"hidden_act": "silu"}
    model, ids, depths = hf_model(hf), torch.tensor(seqs[-1]), hf["num_nextn_predict_layers"]
    drafting = drawn(MtpModel(model, depths).eval(), hf)
    named, N = {n: p for n, p in model.named_parameters()}, hf["num_hidden_layers"]
    for name, x in [*drafting.layers.named_parameters(), *drafting.layers.named_buffers()]:
        k, _, rest = name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm").partition(".")
        if rest.endswith("gate_up_proj"):
            parts = {f"{e}.{part}_proj": y for e, gate_up in enumerate(x)
                     for part, y in zip(("gate", "up"), gate_up.chunk(2), strict=True)}
        else:
            parts = {f"{e}.down_proj": y for e, y in enumerate(x)} if rest.endswith("experts.down_proj") else {}
        stem = f"model.layers.{N + int(k)}." + (rest.rpartition(".")[0] + "." if parts else rest)
        named |= {f"{stem}{part}.weight": y for part, y in parts.items()} or {stem: x}
    with torch.no_grad():
        hidden = state = model.model(ids[None], use_cache=False).last_hidden_state
        at = torch.arange(len(ids))[None]
        cos, sin = model.model.rotary_emb(hidden, at)
        want = mtp_reference.logits(named, hf, hidden[0], ids, cos[0], sin[0], mla.scale(deepseek_v3.config(hf)))
        for k in range(depths):
            state = drafting.forward_layer(k, state, at, None, input_ids=ids.roll(-k - 1)[None])
            got = (state @ drafting.shared_head.weight.T)[0, :len(want[k])]
            if len(got):
                assert R.deviation(got, want[k]) <= BOUND


AHEAD = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4, "num_nextn_predict_layers": 2,
                 "initializer_range": 0.3}


def mtp_step(state, batch, ops=xtf.LOCAL, own_mask=False):
    cfg, total = deepseek_v3.config(AHEAD), ops.total(batch.loss_mask.sum())

    def share(params, batch, ops):
        ops = replace(ops, same_packs=xtf.LOCAL.same_packs) if own_mask else ops
        return deepseek_v3.loss_and_routing(params, batch, cfg, ops)[0] / total
    loss, grads = xtf.value_and_grad(share)(state.params, batch, ops)
    updates, opt = adamw(1e-2).update(grads, state.opt, state.params, ops)
    return state.apply(updates, opt), {"loss": loss}


def test_mtp_where_positions_are_divided():
    """The mask of tokens that other ranks hold: two positions a rank and two modules ahead; a rank that looks at its
    own alone is caught."""
    lengths, masks = [[1, 5, 2], [3, 4]], torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    batch = stack([pack([Sample(torch.arange(3, 3 + n).tolist(), [1] * n) for n in some], 8, 4) for some in lengths])
    batch = replace(batch, loss_mask=batch.loss_mask * masks)
    same = partial(compare, batch=batch, specs=deepseek_v3.specs(deepseek_v3.config(AHEAD), torch.float64),
                   opt=adamw(1e-2))
    for layout in (Layout((("sp", 4),), ("sp",)), Layout((("dp", 2), ("sp", 2)), ("dp", "sp"), experts="sp", remat=())):
        e = same(mtp_step, layout)
        assert max(e.loss, e.grad) <= EXACT and e.param <= 1000 * EXACT, (layout, e)
    e = same(partial(mtp_step, own_mask=True), Layout((("sp", 4),)), reference=mtp_step)
    assert e.loss > 1e-3 and e.grad > 1e-3


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_names_and_shapes_are_those_of_the_files(tied, q_lora_rank, tmp_path):
    """What transformers writes is what we read; it knows no MTP modules, which are the layers after the last."""
    hf = SMALL | {"tie_word_embeddings": tied, "q_lora_rank": q_lora_rank, "attention_bias": True}
    hf_model(hf).save_pretrained(tmp_path)
    cfg = deepseek_v3.config(hf | {"num_nextn_predict_layers": 2})
    named = {name: tuple(x.shape) for path, p in tree.flatten_with_path(deepseek_v3.specs(cfg))
             for name, x in files.file_tensors(deepseek_v3.names(cfg), path,
                                               torch.empty(p.shape, device="meta")).items()}
    written = {name: shape for name, (_, _, shape) in files.tensors(tmp_path).items()}
    assert {name: shape for name, shape in named.items()
            if not name.startswith(("model.layers.2.", "model.layers.3."))} == written
    sparse = {name.partition("layers.1.")[2]: shape for name, shape in written.items() if "layers.1." in name}
    for layer in (2, 3):
        extra = {"enorm.weight": (8,), "hnorm.weight": (8,), "eh_proj.weight": (8, 16), "shared_head.norm.weight": (8,)}
        prefix = f"model.layers.{layer}."
        assert {name.removeprefix(prefix): shape for name, shape in named.items()
                if name.startswith(prefix)} == sparse | extra


def test_directories_with_and_without_mtp(tmp_path, capsys):
    """Modules that are there come with copies of the embedding and the head, and survive the round trip; announced ones
    that are not are left out."""
    without, with_them, out = tmp_path / "without", tmp_path / "with", tmp_path / "out"
    hf_model(SMALL | {"num_nextn_predict_layers": 1}).save_pretrained(without)
    assert json.loads((without / "config.json").read_text())["num_nextn_predict_layers"] == 1
    cfg = deepseek_v3.config(json.loads((without / "config.json").read_text()))
    fitted = deepseek_v3.fit(cfg, files.tensors(without))
    assert fitted == msgspec.structs.replace(cfg, num_nextn_predict_layers=0) and "mtp" not in deepseek_v3.specs(fitted)
    assert models.from_hf(without) == (deepseek_v3,
                                       fitted) and "announces num_nextn_predict_layers=1" in capsys.readouterr().out
    loaded = files.load(without, deepseek_v3.specs(fitted), deepseek_v3.names(fitted))
    files.save(out, loaded, deepseek_v3.names(fitted), like=without)
    assert same_files(without, out)

    params, names = load(hf_model(SMALL), cfg), deepseek_v3.names(cfg)
    tensors = {n: x.detach().contiguous() for path, leaf in tree.flatten_with_path(params)
               for n, x in files.file_tensors(names, path, leaf).items()}
    copies = {"model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
              "model.layers.2.shared_head.head.weight": "lm_head.weight"}
    with_them.mkdir()
    save_file(tensors | {copy: tensors[name].clone() for copy, name in copies.items()}, with_them / "model.safetensors")
    assert deepseek_v3.fit(cfg, files.tensors(with_them)) == cfg
    loaded = files.load(with_them, deepseek_v3.specs(cfg), names)
    files.save(tmp_path / "again", loaded, names, like=with_them)
    assert same_files(with_them, tmp_path / "again")
    loaded["head"]["weight"].data.add_(1)                       # trained: the copies follow
    files.save(tmp_path / "trained", loaded, names, like=with_them)
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert all((trained[copy] == trained[name]).all() for copy, name in copies.items())
    assert (trained["lm_head.weight"] == tensors["lm_head.weight"] + 1).all()


def same_files(a, b) -> bool:
    """Every tensor: file, name, dtype, shape and bytes."""
    contents = [{(file.name, name, x.dtype, x.shape, x.flatten().view(torch.uint8).numpy().tobytes())
                 for file in folder.glob("*.safetensors") for name, x in load_file(file).items()} for folder in (a, b)]
    return len(contents[0]) > 0 and contents[0] == contents[1]
