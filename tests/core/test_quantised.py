"""Block FP8 and MXFP4: values against transformers' own dequantisation bit for bit, directories out and in again, what
misses is named."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import FineGrainedFP8Config

from xtf import hf, tree
from xtf.hf import quantised
from xtf.hf import safetensors as files
from xtf.hf.quantised import DEEPSEEK
from xtf.spec import Param

FP8, DTYPES = torch.float8_e4m3fn, [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(x):
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def fp8_config(block=(128, 128), **more):
    return {"model_type": "drawn", "quantization_config": DEEPSEEK | {"weight_block_size": list(block)} | more}


def write(path, config, *shards):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
             for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / name, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {n: f for f, tensors in zip(names, shards, strict=True) for n in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def raw(path):
    return {(f.name, n): (x.dtype, tuple(x.shape), bits(x.reshape(-1)).numpy().tobytes())
            for f in sorted(path.glob("*.safetensors")) for n, x in load_file(f).items()}


def drawn_fp8(shape, block, g, scale_dtype=torch.float32):
    """Any bytes that are numbers, and scales."""
    q = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    q[(q & 127) == 127] = 1
    scales = torch.rand(quantised.grid(shape, block), generator=g) * 1e-2 + 1e-4
    if scale_dtype == torch.float8_e8m0fnu:
        scales = torch.exp2(scales.log2().round())
    return q.view(FP8), scales.to(scale_dtype)


def boxes_of(draw, shape):
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))


def read(found, name, offset, size, dtype):
    out = torch.empty(size, dtype=dtype)
    quantised.read_into(found[name], offset, out)
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_block_fp8_is_that_of_transformers(tmp_path_factory, data):
    draw = data.draw
    block = draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=1)), draw(st.integers(1, 3)) * block[0],
             draw(st.integers(1, 3)) * block[1])
    scale_dtype, dtype = draw(st.sampled_from([torch.float32, torch.bfloat16,
                                               torch.float8_e8m0fnu])), draw(st.sampled_from(DTYPES))
    q, scales = drawn_fp8(shape, block, torch.Generator().manual_seed(draw(st.integers(0, 1 << 20))), scale_dtype)
    path = write(tmp_path_factory.mktemp("fp8") / "d", fp8_config(block), {"x.weight": q, "x.weight_scale_inv": scales})
    found = quantised.fold(path, files.directory(path), quantised.config(path))
    offset, size = boxes_of(draw, shape)
    expected = Fp8Dequantize(None)._dequantize_one(q, scales, output_dtype=dtype)
    box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    assert list(found) == ["x.weight"] and torch.equal(bits(read(found, "x.weight", offset, size, dtype)),
                                                       bits(expected[box]))


def test_blocks_that_do_not_fill_the_tensor(tmp_path):
    """transformers' loader refuses these; the formula of its backward pass does not, and DeepSeek's kv_a_proj_with_mqa
    has 576 rows."""
    q, scales = drawn_fp8((9, 13), (4, 5), torch.Generator().manual_seed(0))
    path = write(tmp_path / "d", fp8_config((4, 5)), {"x": q, "x_scale_inv": scales})
    specs = {"x": Param((9, 13), torch.float32, ("a", "b"))}
    expected = _dequantize_fp8_weight(q, scales, [4, 5], torch.float32)
    assert torch.equal(hf.load(path, specs, {"x": "x"})["x"], expected)
    found = quantised.fold(path, files.directory(path), quantised.config(path))
    every = lambda n: [(low, high) for low in range(n + 1) for high in range(low, n + 1)]          # empty ones too
    for (a, b), (c, d) in [*((rows, (3, 11)) for rows in every(9)), *(((2, 9), columns) for columns in every(13))]:
        assert torch.equal(read(found, "x", (a, c), (b - a, d - c), torch.float32), expected[a:b, c:d])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_box_of_mxfp4_is_that_of_transformers(tmp_path_factory, data, dtype):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    shape = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    blocks = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(0, 255, shape, generator=g, dtype=torch.uint8)
    path = write(tmp_path_factory.mktemp("mxfp4") / "d", {"quantization_config": {"quant_method": "mxfp4"}},
                 {"x_blocks": blocks, "x_scales": scales})
    found = quantised.fold(path, files.directory(path), quantised.config(path))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found["x"].shape == tuple(expected.shape) == (shape[0], 32 * shape[2], shape[1])
    offset, size = boxes_of(data.draw, expected.shape)
    box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    assert torch.equal(bits(read(found, "x", offset, size, dtype)), bits(expected[box]))


# ---- directories -----------------------------------------------------------------------------------------------------

BLOCK = (4, 8)
UP = "model.layers.0.mlp.experts.{e}.up_proj.weight"
NAMES = {"up": UP, "q": "model.layers.0.self_attn.q_proj.weight", "router": "model.layers.0.mlp.gate.weight",
         "norm": "model.norm.weight"}


def specs(dtype):
    shapes = {"up": (5, 10, 12), "q": (8, 21), "router": (5, 12), "norm": (12,)}
    return {k: Param(shape, dtype, ("a",) * len(shape)) for k, shape in shapes.items()}


def deepseek(path, **more):
    """A stacked leaf over two shards, its expert 3 not quantised; a matrix of uneven blocks; a router and a norm that
    are not."""
    g = torch.Generator().manual_seed(0)
    shards = {}, {}
    for i, name in enumerate([*(UP.format(e=e) for e in range(5)), NAMES["q"]]):
        shape = (8, 21) if name == NAMES["q"] else (10, 12)
        if i == 3:
            shards[1][name] = torch.randn(shape, generator=g).bfloat16()
        else:
            shards[i % 2][name], shards[(i + 1) % 2][name + "_scale_inv"] = drawn_fp8(shape, BLOCK, g)
    shards[0][NAMES["router"]] = torch.randn(5, 12, generator=g).bfloat16().float()
    shards[1][NAMES["norm"]] = torch.randn(12, generator=g).bfloat16()
    return write(path, fp8_config(BLOCK, **more), *shards)


def dequantised(path):
    found = {n: x for f in path.glob("*.safetensors") for n, x in load_file(f).items()}
    return {n: _dequantize_fp8_weight(x, found[n + "_scale_inv"], list(BLOCK), torch.float32)
            if n + "_scale_inv" in found else x.float()
            for n, x in found.items() if not n.endswith("_scale_inv")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_in_and_out_is_the_directory(tmp_path, dtype):
    """Law 9 in every dtype: a block whose values the old scale says exactly keeps it, bf16 parameters or not."""
    path = deepseek(tmp_path / "in")
    params = hf.load(path, specs(dtype), NAMES)
    expected = dequantised(path)
    for leaf, x in params.items():
        for name, part in hf.file_tensors(NAMES, leaf, x.detach()).items():
            assert torch.equal(part, expected[name].to(dtype)), name
    hf.save(tmp_path / "out", params, NAMES, like=path, quantise="fp8")
    assert raw(tmp_path / "out") == raw(path)
    assert (tmp_path / "out" / "config.json").read_bytes() == (path / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_directory_out(tmp_path, dtype):
    path = deepseek(tmp_path / "in")
    params = hf.load(path, specs(dtype), NAMES)
    hf.save(tmp_path / "out", params, NAMES, like=path, max_shard_bytes=800)
    found = hf.tensors(tmp_path / "out")
    assert found.keys() == dequantised(path).keys() and len({f for f, *_ in found.values()}) > 2
    assert {n: d for n, (_, d, _) in found.items() if d != torch.bfloat16} == {NAMES["router"]: torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "drawn"}
    again = hf.load(tmp_path / "out", specs(dtype), NAMES)
    for k, x in params.items():  # bit for bit in bf16; what bf16 holds of float32
        assert torch.equal(again[k], x.bfloat16().to(dtype)), k
    hf.save(tmp_path / "twice", again, NAMES, like=tmp_path / "out")
    assert raw(tmp_path / "twice") == raw(tmp_path / "out")


@pytest.mark.parametrize("more", [{}, {"scale_fmt": "ue8m0"}])
def test_only_blocks_that_changed_get_new_scales(tmp_path, more):
    """Expert 2's first block and all of q change. Each number is within half a spacing of e4m3 of its own (2^-4 of it,
    or of the smallest normal number); scales are DeepSeek's, and transformers' but for rounding."""
    path = deepseek(tmp_path / "in", **more)
    params = hf.load(path, specs(torch.float32), NAMES)
    with torch.no_grad():
        params["up"][2, :4, :8] *= 1.7
        params["q"] *= 1.3
    hf.save(tmp_path / "out", params, NAMES, like=path, quantise="fp8")
    before, after = raw(path), raw(tmp_path / "out")
    changed = {n for (_, n), x in after.items() if x != before[_, n]}
    assert changed == {n + end for n in (UP.format(e=2), NAMES["q"]) for end in ("", "_scale_inv")}
    found = {n: x for f in (tmp_path / "out").glob("*.safetensors") for n, x in load_file(f).items()}
    old = {n: x for f in path.glob("*.safetensors") for n, x in load_file(f).items()}
    scale, name = "_scale_inv", UP.format(e=2)
    assert (found[name + scale] != old[name + scale]).nonzero().tolist() == [[0, 0]]
    assert torch.equal(bits(found[name])[:, 8:], bits(old[name])[:, 8:])
    assert torch.equal(bits(found[name])[4:], bits(old[name])[4:])
    for name, x in ((UP.format(e=2), params["up"][2]), (NAMES["q"], params["q"])):
        s = found[name + scale].double().repeat_interleave(4, 0)[:len(x)].repeat_interleave(8, 1)[:, :x.shape[1]]
        error = (found[name].double() * s - x.double()).abs()
        assert (error <= torch.maximum(x.double().abs(), s * 2**-6) * 2**-4 * (1 + 1e-6)).all()
    q, s = params["q"].detach()[:, :16], found[NAMES["q"] + scale][:, :2]
    settings = FineGrainedFP8Config(weight_block_size=BLOCK, scale_fmt=more.get("scale_fmt", "float"))
    quantiser = type("Quantiser", (), {"quantization_config": settings})
    theirs = Fp8Quantize(quantiser())._quantize_one("q.weight", q)["q.weight_scale_inv"].float()
    torch.testing.assert_close(s, theirs, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    if more:
        assert (torch.frexp(s)[0] == 0.5).all()


def as_params(model, names_of=lambda n: n):
    """A flat tree of the tensors that transformers saves."""
    return ({n.replace(".", "-"): Param(tuple(x.shape), torch.float32, ("a",) * x.ndim) for n, x in model.items()},
            {n.replace(".", "-"): names_of(n) for n in model})


TINY = {"vocab_size": 32, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64}


def test_transformers_loads_the_fp8_directory_that_was_made_of_bf16(tmp_path):
    """The choice of matrices, names, dtypes, shapes and config: what transformers dequantises is what we load."""
    config = DeepseekV3Config(**TINY, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                              topk_group=1, moe_intermediate_size=128, intermediate_size=384, first_k_dense_replace=1,
                              q_lora_rank=32, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    flat, names = as_params(load_file(tmp_path / "in" / "model.safetensors"))
    params = hf.load(tmp_path / "in", flat, names)
    zero = "model.layers.0.self_attn.o_proj.weight"
    with torch.no_grad():
        params[zero.replace(".", "-")].zero_()
    hf.save(tmp_path / "out", params, names, like=tmp_path / "in", quantise="fp8")
    found = hf.tensors(tmp_path / "out")
    assert (load_file(tmp_path / "out" / "model.safetensors")[zero + "_scale_inv"] == 1).all()
    quantised_ = {n for n, (_, dtype, _) in found.items() if dtype == FP8}
    products = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj"
    assert {n.rsplit(".", 2)[1] for n in quantised_} == set(products.split())
    assert found.keys() == set(names.values()) | {n + "_scale_inv" for n in quantised_}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == DEEPSEEK
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    state = model.state_dict()
    ours = {names[k]: x for k, x in hf.load(tmp_path / "out", flat, names).items()}
    experts = [n for n in ours if ".experts." in n]
    assert len(experts) == 12
    for n, x in ours.items():
        if n in experts:
            layer, _, rest = n.partition(".experts.")
            e, which, _ = rest.split(".")
            stacked = state[f"{layer}.experts.{'down_proj' if which == 'down_proj' else 'gate_up_proj'}"][int(e)]
            theirs = stacked if which == "down_proj" else stacked.chunk(2)[which == "up_proj"]
        else:
            theirs = state[n]
        assert torch.equal(x, theirs), n


def test_a_gpt_oss_directory_of_mxfp4_is_what_transformers_loads(tmp_path):
    config = GptOssConfig(**TINY | {"hidden_size": 64}, num_key_value_heads=2, head_dim=16, intermediate_size=32,
                          num_local_experts=3, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    bf16_names = list(tensors)
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj") or n.endswith("experts.down_proj")]:
        E, inside, out = tensors.pop(name).shape
        tensors[name + "_blocks"] = torch.randint(0, 256, (E, out, inside // 32, 16), dtype=torch.uint8)
        tensors[name + "_scales"] = torch.randint(110, 126, (E, out, inside // 32), dtype=torch.uint8)
    settings = json.loads((tmp_path / "bf16" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    path = write(tmp_path / "in", settings, tensors)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    named = lambda n: hf.Transposed(n) if n.endswith(("experts.gate_up_proj", "experts.down_proj")) else n
    ours, names = as_params({n: model[n].mT if isinstance(named(n), hf.Transposed) else model[n] for n in bf16_names},
                            named)
    params = hf.load(path, ours, names)
    for leaf, x in params.items():
        (n, x), = hf.file_tensors(names, leaf, x.detach()).items()
        assert torch.equal(x, model[n].float()), n
    hf.save(tmp_path / "out", params, names, like=path)
    assert hf.tensors(tmp_path / "out").keys() == hf.tensors(tmp_path / "bf16").keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(again[n], x) for n, x in model.items())
    assert all(torch.equal(a, b)
               for a, b in zip(hf.load(tmp_path / "out", ours, names).values(), params.values(), strict=True))
    with pytest.raises(ValueError, match=r"experts\..*_proj holds all experts.*write bf16"):
        hf.save(tmp_path / "no", params, names, like=path, quantise="fp8")


def test_ignored_tensors_are_written_in_the_same_way(tmp_path):
    path = deepseek(tmp_path / "in")
    few, names = ({k: v for k, v in x.items() if k != "q"} for x in (specs(torch.bfloat16), NAMES))
    params = hf.load(path, few, names, ignore=["q_proj.weight"])
    hf.save(tmp_path / "fp8", params, names, like=path, quantise="fp8", ignore=["q_proj.weight"])
    assert raw(tmp_path / "fp8") == raw(path)
    hf.save(tmp_path / "bf16", params, names, like=path, ignore=["q_proj.weight"])
    assert torch.equal(load_file(tmp_path / "bf16" / "model.safetensors")[NAMES["q"]],
                       dequantised(path)[NAMES["q"]].bfloat16())


# ---- errors ----------------------------------------------------------------------------------------------------------

def broken(path, change):
    """The directory with its tensors changed, in one file."""
    tensors = {n: x for f in path.glob("*.safetensors") for n, x in load_file(f).items()}
    config = json.loads((path / "config.json").read_text())
    change(tensors, config)
    return write(path.with_name("broken"), config, tensors)


def put(name, x):
    return lambda tensors, config: tensors.update({name: x})


E2, S2 = UP.format(e=2), UP.format(e=2) + "_scale_inv"


@pytest.mark.parametrize("change, message", [
    (lambda t, c: t.pop(S2), rf"{E2} \(model.safetensors\) without {S2}"),
    (lambda t, c: t.pop(E2), rf"{S2} \(model.safetensors\) without {E2}"),
    (lambda t, c: [t.pop(E2), t.pop(S2)], rf"missing: {E2}$"),
    (put(S2, torch.ones(3, 3)),
     rf"{E2} .*{S2} .*\[10, 12\] and torch.float32 \[3, 3\], expected .* 4 × 8, floating scales \[3, 2\]"),
    (put(S2, torch.ones(3, 2, dtype=torch.uint8)), r"torch.uint8 \[3, 2\], expected"),
    (put(E2, torch.ones(10, 12)), rf"{E2} .*hold torch.float32 \[10, 12\].*expected torch.float8_e4m3fn"),
    (put(S2, torch.tensor([[1, 1], [1, torch.inf], [1, 1]])),
     rf"model.safetensors: {E2} has scales that are not finite"),
    (put(UP.format(e=5), torch.ones(10, 12)), rf"extra: {UP.format(e=5)} \(model.safetensors\)"),
    (lambda t, c: t.update({E2: torch.ones(12, 10).to(FP8), S2: torch.ones(3, 2)}),
     rf"{E2} .* has shape \[12, 10\], expected \[10, 12\]"),
    (lambda t, c: c.pop("quantization_config"), rf"extra: .*{S2}"),
    (lambda t, c: c["quantization_config"].update(quant_method="gptq"),
     r"config.json: quantization_config.quant_method='gptq' is not"),
    (lambda t, c: c["quantization_config"].update(fmt="e5m2"), r"quantization_config.fmt='e5m2'"),
    (lambda t, c: c["quantization_config"].update(weight_block_size=None), r"weight_block_size=None"),
])
def test_what_misses_or_does_not_fit_is_named(tmp_path, change, message):
    path = broken(deepseek(tmp_path / "in"), change)
    with pytest.raises(ValueError, match=message) as e:
        hf.load(path, specs(torch.float32), NAMES)
    assert str(path) in str(e.value)


MX = {"w": hf.Transposed("w")}


@pytest.mark.parametrize("change, message", [
    (lambda t, c: t.pop("w_scales"), r"w_blocks \(model.safetensors\) without w_scales"),
    (lambda t, c: t.pop("w_blocks"), r"w_scales \(model.safetensors\) without w_blocks"),
    (put("w_scales", torch.ones(2, 6, 3, dtype=torch.uint8)),
     r"w_blocks .*, w_scales .* hold .* \[2, 6, 2, 16\] and torch.uint8 \[2, 6, 3\]"),
    (put("w_scales", torch.ones(2, 6, 2)), r"torch.float32 \[2, 6, 2\], expected uint8"),
    (put("w_blocks", torch.ones(2, 6, 2, 8, dtype=torch.uint8)), r"torch.uint8 \[2, 6, 2, 8\]"),
    (put("w", torch.ones(2, 64, 6)), r"w_blocks .* and w \(model.safetensors\) too"),
    (put("w_scales", torch.full((2, 6, 2), 255, dtype=torch.uint8)),
     r"model.safetensors: w has scales that are not finite"),
    (lambda t, c: c.pop("quantization_config"), r"missing: w; extra: w_blocks .*w_scales"),
    (lambda t, c: t.update({n: t[n][:1].clone() for n in ("w_blocks", "w_scales")}),
     r"w \(model.*\) has shape \[1, 64, 6\], expected \[2, 64, 6\]"),
])
def test_what_misses_of_mxfp4_is_named(tmp_path, change, message):
    whole = write(tmp_path / "in", {"quantization_config": {"quant_method": "mxfp4"}}, {
        "w_blocks": torch.ones(2, 6, 2, 16, dtype=torch.uint8), "w_scales": torch.ones(2, 6, 2, dtype=torch.uint8)})
    spec = {"w": Param((2, 6, 64), torch.bfloat16, ("expert", "mlp", "embed"))}
    assert hf.load(whole, spec, MX)["w"].shape == (2, 6, 64)
    with pytest.raises(ValueError, match=message):
        hf.load(broken(whole, change), spec, MX)


def test_what_cannot_be_quantised_is_named(tmp_path):
    path = deepseek(tmp_path / "in")
    params = hf.load(path, specs(torch.float32), NAMES)
    with torch.no_grad():
        params["up"][4, 9, 11] = torch.nan
    with pytest.raises(ValueError, match=rf"{UP.format(e=4)} has values that are not finite"):
        hf.save(tmp_path / "out", params, NAMES, like=path, quantise="fp8")
    with pytest.raises(ValueError, match="quantise='int4'"):
        hf.save(tmp_path / "out", params, NAMES, like=path, quantise="int4")
    with pytest.raises(ValueError, match=r"quantise='fp8' with like=None.*config.json that can say so"):
        hf.save(tmp_path / "out", params, NAMES, quantise="fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_new_model_of_a_quantised_config_is_not_quantised(tmp_path):
    """A directory with a config alone, for training from scratch."""
    path = tmp_path / "new"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fp8_config()))
    params = tree.map_with_path(lambda leaf, p: torch.ones(p.shape, dtype=p.dtype), specs(torch.float32))
    hf.save(tmp_path / "out", params, NAMES, like=path)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "drawn"}
    assert torch.equal(hf.load(tmp_path / "out", specs(torch.float32), NAMES)["up"], params["up"])
