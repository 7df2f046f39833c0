"""Hugging Face directories: round trips against the safetensors package and transformers, and an error for each thing
that can be wrong."""
import json
import math
import resource
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from xtf import hf
from xtf.hf import safetensors as files
from xtf.spec import Param

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8,
          torch.bool]


def specs_for(path, dtype=None):
    """A flat tree of Params as the files are, and its names."""
    found = hf.tensors(path)
    leaf = {n: f"leaf{i}" for i, n in enumerate(found)}
    return ({leaf[n]: Param(shape, dtype if dtype and d.is_floating_point else d, ("a",) * len(shape))
             for n, (_, d, shape) in found.items()},
            {leaf[n]: n for n in found})


def raw(path):
    """Each tensor's file, dtype, shape and bytes, as the safetensors package reads them."""
    out = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                x = f.get_tensor(name)
                out[name] = (file.name, x.dtype, tuple(x.shape),
                             x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return out


def write(path, *shards):
    """A directory of one file, or of shards with an index."""
    path.mkdir(parents=True, exist_ok=True)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
                                                            for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / name, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {n: f for f, tensors in zip(names, shards, strict=True) for n in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def load(path, **kwargs):
    specs, names = specs_for(path)
    return hf.load(path, specs, names, **kwargs)


@st.composite
def drawn(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(b & 1 for b in data)
    return torch.frombuffer(bytearray(data),
                            dtype=torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(shards=st.lists(st.lists(drawn(), min_size=1, max_size=4), min_size=1, max_size=3))
def test_save_of_load_is_the_directory(tmp_path_factory, shards):
    """Law 9, any bytes at all: NaNs with payloads, scalars and empty tensors among them."""
    root = tmp_path_factory.mktemp("hf")
    source = write(root / "in", *({f"t{i}.{j}": x for j, x in enumerate(xs)} for i, xs in enumerate(shards)))
    specs, names = specs_for(source)
    hf.save(root / "out", hf.load(source, specs, names), names, like=source)
    assert raw(root / "out") == raw(source)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_box_read_or_written_is_a_slice(tmp_path_factory, data, shape):
    offset = tuple(data.draw(st.integers(0, n)) for n in shape)
    size = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
    box = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
    x = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    path = write(tmp_path_factory.mktemp("box"), {"pad": torch.zeros(3, dtype=torch.uint8), "x": x})
    entry = files.directory(path)["x"]
    assert torch.equal(files.read(entry, offset, size), x[box])
    for out in (torch.empty(size), torch.empty(size[::-1], dtype=torch.int16).permute(*range(len(size))[::-1])):
        files.read_into(entry, offset, out)                              # converted; in another order of dims
        assert torch.equal(out, x[box].to(out.dtype))
    with files.writing(entry.file) as fd:
        files.write(fd, entry, offset, -x[box])
    expected = x.clone()
    expected[box] *= -1
    assert torch.equal(load_file(entry.file)["x"], expected)


@pytest.mark.parametrize("code", files.DTYPES)
def test_boxes_of_every_dtype(tmp_path, code):
    """As the library's slices, where the tensor begins at an odd byte too."""
    dtype, rows = files.DTYPES[code], 40
    data = torch.randint(256 if code != "BOOL" else 2, (3 + rows * 6 * dtype.itemsize,), dtype=torch.uint8)
    craft(tmp_path / "model.safetensors", {"a": field(0, 3, (3,), "U8"), "x": field(3, len(data), (rows, 6), code)},
          data.numpy().tobytes())
    entry = files.directory(tmp_path)["x"]
    with safe_open(entry.file, "pt") as f, ThreadPoolExecutor(4) as pool:
        boxes = [((i % 30, i % 3), (i % 10, i % 4)) for i in range(60)] + [((7, 0), (9, 6)), ((0, 0), (rows, 6))]
        for (at, size), got in zip(boxes, pool.map(lambda b: files.read(entry, *b), boxes), strict=True):
            expected = f.get_slice("x")[at[0]:at[0] + size[0], at[1]:at[1] + size[1]].contiguous()
            assert got.dtype == expected.dtype and got.shape == size
            assert (files.as_bytes(got) == files.as_bytes(expected)).all()


@pytest.fixture
def llama(tmp_path):
    """A directory that transformers wrote: bf16, three shards and their index."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=32)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llama", max_shard_size="5KB")
    return tmp_path / "llama", model


def test_round_trip_of_a_transformers_directory(llama, tmp_path):
    path, model = llama
    (path / "tokenizer.json").write_text("{}")
    (path / "old.bin").write_text("pickle")
    (path / "original").mkdir()
    assert len(set(f for f, _, _ in hf.tensors(path).values())) > 1
    specs, names = specs_for(path, torch.float32)
    params = hf.load(path, specs, names)
    state = model.state_dict()
    assert all(x.dtype == torch.float32 and x.requires_grad and torch.equal(x, state[names[k]].float())
               for k, x in params.items())
    hf.save(tmp_path / "out", params, names, like=path)
    assert raw(tmp_path / "out") == raw(path)
    copied = {f.name for f in path.iterdir()} - {"old.bin", "original"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == copied
    assert all((tmp_path / "out" / f).read_bytes() == (path / f).read_bytes() for f in copied
               if not f.endswith(".index.json"))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[k], v) for k, v in state.items())


def test_stacked_experts_of_a_transformers_directory(tmp_path):
    """transformers stacks what its directories have one by one, and so do we; one expert is of another dtype."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32, num_experts=5,
                            num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    path = tmp_path / "in"
    model.save_pretrained(path, max_shard_size="1KB")
    experts = "model.layers.0.mlp.experts."
    third = path / hf.tensors(path)[f"{experts}3.up_proj.weight"][0]
    save_file({n: x.float() if n == f"{experts}3.up_proj.weight" else x for n, x in load_file(third).items()}, third,
              {"format": "pt"})
    assert len({hf.tensors(path)[f"{experts}{e}.{which}_proj.weight"][0] for e in range(5)
                for which in ("gate", "down")}) > 1
    specs, names = specs_for(path, torch.bfloat16)
    plain = {k for k, n in names.items() if experts not in n}
    specs, names = {k: specs[k] for k in plain}, {k: names[k] for k in plain}
    for which, shape in {"gate": (5, 8, 16), "up": (5, 8, 16), "down": (5, 16, 8)}.items():
        specs[which], names[which] = Param(shape, torch.bfloat16,
                                           ("expert", "a", "b")), experts + "{e}." + which + "_proj.weight"
    params = hf.load(path, specs, names)
    state = model.state_dict()
    assert torch.equal(torch.cat([params["gate"], params["up"]], 1), state[experts + "gate_up_proj"])
    assert torch.equal(params["down"], state[experts + "down_proj"])
    hf.save(tmp_path / "out", params, names, like=path)
    assert raw(tmp_path / "out") == raw(path)
    hf.save(tmp_path / "new", params, names)                             # without `like`: all bf16
    assert {n: x[1:] for n, x in raw(tmp_path / "new").items()
            if "3.up" not in n} == {n: x[1:] for n, x in raw(path).items() if "3.up" not in n}
    with pytest.raises(ValueError, match=r"leaves up and down have the same name in the files, .*experts\.0\.up"):
        hf.load(path, specs, names | {"down": names["up"]})
    with pytest.raises(ValueError, match=r"missing: .*experts\.5\.gate.*experts\.5\.up"):
        hf.load(path, specs | {k: Param((6, 8, 16), torch.bfloat16, ("expert", "a", "b")) for k in ("gate", "up")},
                names)
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj.weight \(.*has shape \[8, 16\], expected \[16, 8\]"):
        hf.load(path, specs, names | {"up": hf.Transposed(names["up"])})


def test_without_like_the_file_is_that_of_the_safetensors_package(tmp_path):
    params = {"a": torch.randn(3, 5), "b": torch.tensor(2.0), "c": torch.randn(4, dtype=torch.float64),
              "é": torch.randn(2).bfloat16()}
    names = {k: f"model.{k}" for k in params}
    hf.save(tmp_path / "new" / "out", params, names)
    save_file({names[k]: x for k, x in params.items()}, tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / "new" / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_shards_by_size(tmp_path):
    params = {k: torch.full((n,), float(n)) for k, n in {"a": 10, "b": 10, "c": 50, "d": 3}.items()}
    hf.save(tmp_path / "out", params, {k: k for k in params}, max_shard_bytes=80)
    assert [(n, f[:11]) for n, (f, _, _) in hf.tensors(tmp_path / "out").items()] == [
        ("a", "model-00001"), ("b", "model-00001"), ("c", "model-00002"), ("d", "model-00003")]
    assert all(torch.equal(x, params[k]) for k, x in zip(params, load(tmp_path / "out").values(), strict=True))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 73


def test_dtype_and_trainable(tmp_path):
    path = write(tmp_path / "in", {"w": torch.randn(4).half(), "n": torch.arange(3)})
    specs = {"w": Param((4,), torch.float32, ("a",), trainable=False), "n": Param((3,), torch.int32, ("a",))}
    params = hf.load(path, specs, {"w": "w", "n": "n"}, dtype=torch.bfloat16)
    assert (params["w"].dtype, params["n"].dtype, params["w"].requires_grad,
            params["n"].requires_grad) == (torch.bfloat16, torch.int32, False, False)


# ---- twins and ignored tensors ---------------------------------------------------------------------------------------

EMBED, HEAD, FREQ = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def tied(tmp_path):
    x = torch.randn(4, 3)
    specs = {"embed": {"weight": Param((4, 3), torch.float32, ("vocab", "embed"))}}
    return write(tmp_path / "tied",
                 {EMBED: x, HEAD: x.clone(), FREQ: torch.randn(2).double()}), specs, {"embed.weight": EMBED}, x


def test_twins_and_ignored_tensors_are_written_again(tied, tmp_path):
    path, specs, names, x = tied
    params = hf.load(path, specs, names)
    hf.save(tmp_path / "same", params, names, like=path)
    assert raw(tmp_path / "same") == raw(path)
    hf.save(tmp_path / "twice", {"embed": {"weight": 2 * x}}, names, like=path)
    after = load_file(tmp_path / "twice" / "model.safetensors")
    assert torch.equal(after[HEAD], 2 * x) and torch.equal(after[EMBED], 2 * x)
    assert torch.equal(after[FREQ], load_file(path / "model.safetensors")[FREQ])


def test_twins_must_be_equal(tied, tmp_path):
    path, specs, names, x = tied
    other = x.clone()
    other[-1, -1] = 7
    write(path, {EMBED: x, HEAD: other})
    with pytest.raises(ValueError, match=f"{HEAD}.*{EMBED}.*values differ"):
        hf.load(path, specs, names)
    write(path, {EMBED: x, HEAD: x.half()})
    with pytest.raises(ValueError, match=f"{HEAD}.*tied to {EMBED} but differs in dtype or shape"):
        hf.load(path, specs, names)
    with pytest.raises(ValueError, match=rf"extra: {HEAD} \(model.safetensors\)"):
        hf.load(path, specs, names, tied={})
    write(path, {EMBED: x, FREQ: torch.zeros(2)})
    with pytest.raises(ValueError, match=f"extra: {FREQ}"):
        hf.load(path, specs, names, ignore=())


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_all_that_does_not_fit_is_listed(tmp_path):
    path = write(tmp_path / "in", {"w": torch.ones(2, 3), "x": torch.ones(2), "n": torch.ones(2, dtype=torch.int8)})
    spec = lambda *shape: Param(shape, torch.float32, ("a",) * len(shape))
    specs = {"w": spec(3, 2), "n": spec(2), "m1": spec(1), "m2": spec(1)}
    names = {k: k for k in specs}
    with pytest.raises(ValueError) as e:
        hf.load(path, specs, names)
    for part in (str(path), "missing: m1, m2", "extra: x (model.safetensors)",
                 "w (model.safetensors) has shape [2, 3], expected [3, 2]",
                 "n (model.safetensors) holds torch.int8, expected torch.float32"):
        assert part in str(e.value)
    params = {k: torch.ones(p.shape) for k, p in specs.items()}
    with pytest.raises(ValueError, match="missing: m1, m2"):
        hf.save(tmp_path / "out", params, names, like=path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"specs without a name: \['m2', 'w'\]; names without specs: \['z'\]"):
        hf.load(path, specs, {"n": "n", "m1": "m1", "z": "z"})
    with pytest.raises(ValueError, match="leaves w and n have the same name in the files, w"):
        hf.load(path, specs, names | {"n": "w"})


def craft(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def field(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


FIELD = json.dumps(field(0, 8))


@pytest.mark.parametrize(("header", "data", "length", "message"), [
    (b"", b"", None, "corrupt or truncated header"),
    (b"{not json", b"", None, "corrupt or truncated header"),
    (b"\xff\xfe{}", b"", None, "corrupt or truncated header"),
    (b"[]", b"", None, "corrupt or truncated header .not an object"),
    (b"[" * 100_000, b"", None, "corrupt or truncated header .*recursion"),
    (b'{"w": 1, "w": 2}', b"", None, "'w' occurs twice"),
    (f'{{"w": {FIELD}, "w": {FIELD}}}'.encode(), bytes(8), None, "'w' occurs twice"),
    ({}, b"", 1 << 40, "header too large"),
    ({}, bytes(8), None, "file not fully covered"),
    ({"w": field(0, 8)}, bytes(4), None, "truncated.*tensor w ends at"),
    ({"w": field(0, 8)}, bytes(12), None, "file not fully covered"),
    ({"w": field(0, 8), "v": field(4, 12)}, bytes(12), None, "invalid offset for tensor `v`"),
    ({"w": field(0, 8), "v": field(0, 8)}, bytes(8), None, "invalid offset for tensor `[vw]`"),
    ({"w": field(0, 8), "v": field(12, 20)}, bytes(20), None, "invalid offset for tensor `v`"),
    ({"w": field(0, 12)}, bytes(12), None, "tensor w: .*needs 8 bytes"),
    ({"w": field(8, 0)}, bytes(8), None, "tensor w: .*needs 8 bytes"),
    ({"w": field(-8, 0)}, bytes(8), None, "tensor w: .*not negative"),
    ({"w": field(0, 8, shape=(-1, -2))}, bytes(8), None, "tensor w: .*not negative"),
    ({"w": field(0, 8, shape=(2.0,))}, bytes(8), None, "tensor w: .*whole numbers"),
    ({"w": field(0, 0, shape=(1 << 62,) * 1000)}, b"", None, "tensor w: "),
    ({"w": field(0, 0, shape=(1 << 62, 1 << 62, 0))}, b"", None, "overflow"),
    ({"w": {"dtype": "F32"}}, b"", None, "tensor w: KeyError"),
    ({"w": ["F32", [2], [0, 8]]}, bytes(8), None, "tensor w: TypeError"),
    ({"w": field(0, 8, dtype="F4")}, bytes(8), None, "tensor w: .*unsupported dtype F4"),
    ({"w": field(0, 8, shape=(1,), dtype="C64")}, bytes(8), None, "tensor w: .*unsupported dtype C64"),
    ({"w": field(0, 8, dtype=["F32"])}, bytes(8), None, "tensor w: TypeError"),
    ({"w": field(0, 8), "__metadata__": {"step": 1}}, bytes(8), None, "expected a string"),
])
def test_corrupt_headers(tmp_path, header, data, length, message):
    craft(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message) as e:
        hf.tensors(tmp_path)
    assert "model.safetensors" in str(e.value) and "\n" not in str(e.value)


def test_a_flipped_bit_of_the_header_is_refused_or_read_as_the_library_does(tmp_path):
    path = write(tmp_path / "in", {"w": torch.arange(4.0), "v": torch.arange(6).view(2, 3)})
    file = path / "model.safetensors"
    whole, read = file.read_bytes(), 0
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for bit in range(0, 8 * end, 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found = {n: (e.file.name, e.dtype, e.shape, files.as_bytes(files.read(e, (0,) * len(e.shape), e.shape)))
                     for n, e in files.directory(path).items()}
        except ValueError as e:
            assert "model.safetensors" in str(e) and "again" in str(e)
            continue
        assert {n: (*x, b.tobytes()) for n, (*x, b) in found.items()} == raw(path)
        read += 1
    assert read                                                          # names, and dtypes as wide


def test_any_truncation_is_found(tmp_path):
    path = write(tmp_path / "in", {"w": torch.ones(4), "v": torch.ones(2, 2)})
    specs, names = specs_for(path)
    whole = (path / "model.safetensors").read_bytes()
    for n in range(len(whole)):
        (path / "model.safetensors").write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"model\.safetensors.*fetch it again"):
            hf.load(path, specs, names)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "in", {"w": torch.ones(4096, 4)})
    entry = files.directory(path)["w"]
    with open(entry.file, "r+b") as f:
        f.truncate(40_000)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated while it was read"):
        files.read(entry, (2000, 0), (2096, 4))


def test_boxes_of_a_file_larger_than_memory(tmp_path):
    """Nothing but the box is read or kept: the file could not be mapped as the library does for torch."""
    rows = int(Path("/proc/meminfo").read_text().split()[1]) + (4 << 20)  # KB of memory, and 4 GB
    end = 4096 + 1024 * rows
    craft(tmp_path / "model.safetensors",
          {"w": field(0, 4096, (32, 32)), "large": field(4096, end, (rows, 1024), "U8")}, bytes(range(256)) * 16)
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(f.seek(0, 2) + end - 4096)                            # sparse: no byte of it is on disk
    entries = files.directory(tmp_path)
    assert not files.read(entries["large"], (rows - 9, 0), (9, 1024)).any()
    w = torch.frombuffer(bytearray(range(256)) * 16, dtype=torch.float32).view(32, 32)
    part = files.read(entries["w"], (3, 5), (8, 7))
    assert files.as_bytes(part).tobytes() == files.as_bytes(w[3:11, 5:12].contiguous()).tobytes()


def test_indexes_that_are_wrong(tmp_path):
    path = write(tmp_path / "in", {"a": torch.ones(2)}, {"b": torch.ones(2)})
    one, two, index = (path / f for f in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                                          "model.safetensors.index.json"))
    weight_map = {"a": one.name, "b": two.name}

    def fails(error, message, **changed):
        index.write_text(json.dumps({"weight_map": weight_map | changed}))
        with pytest.raises(error, match=message):
            hf.tensors(path)

    fails(FileNotFoundError, "names files that are not there: gone.safetensors", c="gone.safetensors")
    fails(ValueError, r"disagree on tensors: c \(not in model-00001", c=one.name)
    fails(ValueError, r"disagree on tensors: b \(not in model-00001", b=one.name, c=two.name)
    fails(ValueError, "a file name for each tensor", c="../x.safetensors")
    save_file({"b": torch.ones(2), "x": torch.ones(1)}, two)
    fails(ValueError, r"x \(in model-00002.*, not in the index\)")
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, two)
    fails(ValueError, "tensor a is in two shards, model-00001.* and model-00002")
    twice = f'{{"weight_map": {{"a": "{one.name}", "a": "{two.name}", "b": "{two.name}"}}}}'
    for text in ("{", "[]", "{}", '{"weight_map": 3}', twice, "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match="not an index of safetensors"):
            hf.tensors(path)
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    with pytest.raises(ValueError, match="has both"):
        hf.tensors(path)


def test_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone is not a directory"):
        hf.tensors(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no safetensors at all"):
        hf.tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pickled weights only.*convert them"):
        hf.tensors(tmp_path)
    (tmp_path / "part.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"neither .* \(found: part.safetensors\)"):
        hf.tensors(tmp_path)


# ---- what was there stays --------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "out", {"w": torch.ones(2)})
    before = raw(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # the nearest thing to a full disk that a test may make
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"while writing.*out.partial.model\.safetensors"):
            hf.save(path, {"w": torch.ones(4096)}, {"w": "w"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raw(path) == before and list(tmp_path.iterdir()) == [path]
    hf.save(path, {"w": torch.ones(4096)}, {"w": "w"})
    assert torch.equal(load(path)["leaf0"], torch.ones(4096)) and list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_written_is_named():
    with pytest.raises(OSError, match=r"/proc/\.out\.partial"):
        hf.save("/proc/out", {"w": torch.ones(1)}, {"w": "w"})


def test_the_swap_is_undone_if_it_fails(tmp_path, monkeypatch):
    path = write(tmp_path / "out", {"w": torch.ones(2)})
    before, rename = raw(path), Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(1, "not now", str(self))
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="not now"):
        hf.save(path, {"w": torch.zeros(2)}, {"w": "w"})
    assert raw(path) == before and list(tmp_path.iterdir()) == [path]


def test_saving_in_place_and_through_a_link(llama, tmp_path):
    path, _ = llama
    before = raw(path)
    (tmp_path / "link").symlink_to(path)
    specs, names = specs_for(path)
    hf.save(tmp_path / "link", hf.load(path, specs, names), names, like=path)
    assert raw(path) == before and (tmp_path / "link").is_symlink() and (path / "config.json").exists()


def test_other_peoples_files_are_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nested" / "sub").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(FileExistsError, match=str(path)):
            hf.save(path, {"w": torch.ones(1)}, {"w": "w"})
        assert path.exists() and not files.partial(path).exists()


def test_dtypes_that_safetensors_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"w has dtype torch.complex64.*convert"):
        hf.save(tmp_path / "out", {"w": torch.ones(1, dtype=torch.complex64)}, {"w": "w"})
    assert list(tmp_path.iterdir()) == []
