"""Quantised directories on real ranks, cut along every dim, within blocks too: read as one process reads them, written
as it writes them."""
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.dist.reads import counting
from xtf import hf
from xtf.hf import quantised
from xtf.hf import safetensors as files
from xtf.hf.names import cut
from xtf.hf.quantised import DEEPSEEK
from xtf.layout import Place
from xtf.spec import Param
from xtf.testing import pool

S, R = Shard, Replicate()
BLOCK = (4, 8)
EXPERTS, MATRIX, NORM = "layers.0.mlp.experts.{e}.up_proj.weight", "layers.0.self_attn.q_proj.weight", "norm.weight"
MX = hf.Transposed("experts.down_proj")
SHAPES = {EXPERTS: (5, 10, 12), MATRIX: (9, 21), NORM: (6,), MX: (3, 10, 96)}
# one dim a case; the second axis of a mesh cuts another, or the same again, or holds copies
CASES = [((2,), {EXPERTS: (S(0),), MATRIX: (S(0),), MX: (S(0),)}),
         ((4,), {EXPERTS: (S(1),), MATRIX: (S(1),), MX: (S(1),)}),
         ((4,), {EXPERTS: (S(2),), MATRIX: (R,), MX: (S(2),)}),
         ((2, 2), {EXPERTS: (S(0), S(2)), MATRIX: (S(1), S(0)), MX: (S(2), S(1))}),
         ((2, 2), {EXPERTS: (S(1), S(1)), MATRIX: (R, S(1)), MX: (S(0), S(2))})]


def write(path, config, *shards):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for i, shard in enumerate(shards):
        save_file(shard, path / f"model-0000{i + 1}-of-0000{len(shards)}.safetensors", {"format": "pt"})
    weight_map = {n: f"model-0000{i + 1}-of-0000{len(shards)}.safetensors" for i, shard in enumerate(shards)
                  for n in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """Experts over two shards, scales in the other one; expert 3 in bf16."""
    g = torch.Generator().manual_seed(0)
    shards = {}, {}
    for i, name in enumerate([*(EXPERTS.format(e=e) for e in range(5)), MATRIX]):
        shape = SHAPES[MATRIX] if name == MATRIX else SHAPES[EXPERTS][1:]
        if i == 3:
            shards[0][name] = torch.randn(shape, generator=g).bfloat16()
            continue
        q = torch.randint(0, 127, shape, generator=g, dtype=torch.uint8)
        q |= torch.randint(0, 2, shape, generator=g, dtype=torch.uint8) << 7
        shards[i % 2][name] = q.view(torch.float8_e4m3fn)
        shards[(i + 1) % 2][name + "_scale_inv"] = torch.rand(quantised.grid(shape, BLOCK), generator=g) * 1e-2 + 1e-4
    shards[0][NORM] = torch.randn(SHAPES[NORM], generator=g).bfloat16()
    return write(tmp_path_factory.mktemp("fp8") / "in",
                 {"quantization_config": DEEPSEEK | {"weight_block_size": BLOCK}}, *shards)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    E, rows, columns = SHAPES[MX]
    blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (E, rows, columns // 32), generator=g, dtype=torch.uint8)
    return write(tmp_path_factory.mktemp("mxfp4") / "in", {"quantization_config": {"quant_method": "mxfp4"}},
                 {MX + "_blocks": blocks, NORM: torch.randn(SHAPES[NORM], generator=g).bfloat16()},
                 {MX + "_scales": scales})


def tree_of(which, mesh_shape=None, placements=None):
    """Specs (the matrix and the norm in bf16, the others in float32), names and layout."""
    names = {f"leaf{i}": n for i, n in enumerate(which)}
    specs = {k: Param(SHAPES[n], torch.bfloat16 if n in (MATRIX, NORM) else torch.float32, ("a",) * len(SHAPES[n]))
             for k, n in names.items()}
    if mesh_shape is None:
        return specs, names, None
    mesh = DeviceMesh("cpu", torch.arange(math.prod(mesh_shape)).reshape(mesh_shape),
                      mesh_dim_names=("store", "rest")[:len(mesh_shape)])
    return specs, names, {k: Place(mesh, placements.get(n, (R,) * len(mesh_shape))) for k, n in names.items()}


def raw(path):
    return {(f.name, n): (x.dtype, tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes())
            for f in sorted(Path(path).glob("*.safetensors")) for n, x in load_file(f).items()}


def to_read(found, name, place, shape):
    """The bytes of a leaf's box: its values, and the scales (and, of MXFP4, the groups) that it touches."""
    total = 0
    offset, size = place.box(shape)
    for n, at, x in cut(name, offset, torch.empty(size, device="meta")):
        touched = lambda i, b, at=at, x=x: len({k // b for k in range(at[i], at[i] + x.shape[i])})
        if n + "_scale_inv" in found:
            total += x.numel() + 4 * touched(-2, BLOCK[0]) * touched(-1, BLOCK[1]) * (x.numel() > 0)
        elif n + "_blocks" in found:
            total += len(x) * x.shape[2] * touched(1, 32) * 17
        else:
            total += x.numel() * 2
    return total


def round_trip(source, which, out, mesh_shape, placements, scale):
    specs, names, layout = tree_of(which, mesh_shape, placements)
    calls = []
    with pytest.MonkeyPatch.context() as mp:
        counting(calls, mp)
        params = hf.load(source, specs, names, layout)
    expected = sum(to_read(hf.tensors(source), names[k], layout[k], specs[k].shape) for k in names)
    whole = hf.load(source, specs, names)
    for k, x in params.items():
        assert isinstance(x, DTensor) and torch.equal(x.full_tensor(), whole[k]), names[k]
    written = []
    with pytest.MonkeyPatch.context() as mp, torch.no_grad():
        pwrite = os.pwrite
        mp.setattr(os, "pwrite", lambda fd, view, position: written.append(len(view)) or pwrite(fd, view, position))
        for x in params.values():
            x.to_local().mul_(scale)
        hf.save(f"{out}/bf16", params, names, like=source, max_shard_bytes=1000)
        if EXPERTS in which:
            hf.save(f"{out}/fp8", params, names, like=source, quantise="fp8")
    return sum(calls), expected, sum(written)


def check(source, which, tmp_path, mesh_shape, placements, scale):
    results = pool(math.prod(mesh_shape)).run(round_trip, source, which, tmp_path, mesh_shape, placements, scale)
    assert all(read == expected for read, expected, _ in results)
    assert sum(w for *_, w in results) == sum(f.stat().st_size for d in tmp_path.iterdir() for f in d.iterdir())
    specs, names, _ = tree_of(which)
    params = {k: x.detach() * scale for k, x in hf.load(source, specs, names).items()}
    hf.save(tmp_path / "one", params, names, like=source, max_shard_bytes=1000)
    assert raw(tmp_path / "one") == raw(tmp_path / "bf16") and len({f for f, _ in raw(tmp_path / "one")}) > 1
    return params, names


@pytest.mark.parametrize("mesh_shape, placements", CASES)
@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_fp8_cut_along_every_dim(fp8, tmp_path, mesh_shape, placements, scale):
    """Untouched, ranks write the original's bytes; changed, those of one process, whose blocks are not divided."""
    params, names = check(fp8, (EXPERTS, MATRIX, NORM), tmp_path, mesh_shape, placements, scale)
    hf.save(tmp_path / "one8", params, names, like=fp8, quantise="fp8")
    assert raw(tmp_path / "fp8") == raw(tmp_path / "one8")
    assert (raw(tmp_path / "fp8") == raw(fp8)) == (scale == 1)
    assert (tmp_path / "fp8" / "config.json").read_bytes() == (fp8 / "config.json").read_bytes()


@pytest.mark.parametrize("mesh_shape, placements", CASES)
def test_mxfp4_cut_along_every_dim(mxfp4, tmp_path, mesh_shape, placements):
    check(mxfp4, (MX, NORM), tmp_path, mesh_shape, placements, 1.0)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == {}


def failing(source, out, poison):
    specs, names, layout = tree_of((EXPERTS, MATRIX, NORM), (4,), {EXPERTS: (S(0),), MATRIX: (S(1),)})
    try:
        params = hf.load(source, specs, names, layout)
        if poison:
            with torch.no_grad():
                params["leaf1"].to_local()[:, -1] = torch.nan if params["leaf1"].device_mesh.get_rank() == 2 else 1
        hf.save(out, params, names, like=source, quantise="fp8")
    except Exception as e:
        return type(e).__name__, str(e)


def test_what_one_rank_finds_fails_all(fp8, tmp_path):
    """A value that FP8 cannot hold, before the maxima are exchanged; a corrupt scale in one rank's expert."""
    for text in (text for _, text in pool(4).run(failing, fp8, tmp_path / "out", True)):
        assert f"{MATRIX} has values that are not finite" in text
    shards = [load_file(f) for f in sorted(fp8.glob("*.safetensors"))]
    for shard in shards:
        if (name := EXPERTS.format(e=4) + "_scale_inv") in shard:
            shard[name][0, 0] = torch.inf
    broken = write(tmp_path / "broken", json.loads((fp8 / "config.json").read_text()), *shards)
    errors = pool(4).run(failing, broken, tmp_path / "out", False)
    assert [kind for kind, _ in errors] == ["ValueError"] * 4
    assert all(f"{EXPERTS.format(e=4)} has scales that are not finite" in text for _, text in errors)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
