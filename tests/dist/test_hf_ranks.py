"""Hugging Face directories on real ranks: each reads its own bytes and no others, together they write one set of files,
and fail together."""
import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.dist.reads import counting
from xtf import hf
from xtf.hf import directory
from xtf.hf import safetensors as files
from xtf.layout import Place
from xtf.spec import Param
from xtf.testing import _pool, pool

S, R = Shard, Replicate()
EMBED, HEAD, FREQ = "model.embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq"
STACK, TURNED, BOTH = "mlp.{e}.up.weight", hf.Transposed("turned"), hf.Transposed("x.{e}.t")
# name -> (shape, dtype in the files (of each expert in turn), placement over "store" alone, placements over ("store",
# "rest"))
LEAVES = {
    EMBED: ((13, 6), torch.bfloat16, S(0), (S(0), R)),                   # uneven
    "row": ((8, 6), torch.float32, S(0), (S(0), S(1))),
    "column": ((5, 9), torch.float32, S(1), (S(1), S(0))),               # uneven and strided
    "nested": ((11, 4), torch.float16, S(0), (S(0), S(0))),              # the chunk of a chunk
    "experts": ((3, 6, 8), torch.float32, S(2), (S(1), S(0))),
    "whole": ((7, 2), torch.float32, R, (R, R)),
    "rest": ((6, 4), torch.float32, R, (R, S(0))),  # copies along the first axis, cut along the second
    "tiny": ((1, 3), torch.float32, S(0), (S(0), S(1))),                 # fewer rows than ranks
    "scalar": ((), torch.float64, R, (R, R)),
    # each expert in a shard and dtype of its own
    STACK: ((5, 6, 4), (torch.bfloat16, torch.float32, torch.float16), S(0), (S(0), S(1))),
    "inner.{e}": ((3, 7, 9), torch.float16, S(1), (S(2), S(1))),
    "copied.{e}": ((3, 2, 5), torch.bfloat16, R, (R, S(2))),             # each rank writes experts of its own
    TURNED: ((3, 4, 9), torch.bfloat16, S(2), (S(0), S(2))),
    BOTH: ((2, 5, 6), (torch.float32, torch.bfloat16), S(1), (S(1), S(2))),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "in"
    path.mkdir()
    g = torch.Generator().manual_seed(0)
    x = {FREQ: torch.arange(3.0)}
    for name, (shape, dtype, *_) in LEAVES.items():
        leaf = torch.randn(shape, generator=g)
        leaf = leaf.transpose(-1, -2) if isinstance(name, hf.Transposed) else leaf
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        experts = {name.format(e=e): leaf[e] for e in range(shape[0])} if "{e}" in name else {str(name): leaf}
        x |= {n: v.to(dtypes[i % len(dtypes)]).contiguous() for i, (n, v) in enumerate(experts.items())}
    first = {n: x[n] for i, n in enumerate(x) if n in (EMBED, "column", "rest", FREQ) or i % 2}
    shards = [first | {HEAD: x[EMBED].clone()}, {n: v for n, v in x.items() if n not in first}]
    for i, shard in enumerate(shards):
        save_file(shard, path / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
    weight_map = {n: f"model-0000{i + 1}-of-00002.safetensors" for i, shard in enumerate(shards) for n in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text('{"model_type": "drawn"}')
    return path


def raw(path):
    return {(f.name, n): (x.dtype, tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes())
            for f in sorted(Path(path).glob("*.safetensors")) for n, x in load_file(f).items()}


def leaf_of(tensors, name):
    """A leaf from the files' tensors, and the bytes of each of its numbers there."""
    mine = [tensors[name.format(e=e)] for e in range(LEAVES[name][0][0])] if "{e}" in name else [tensors[name]]
    mine = [x.transpose(-1, -2) if isinstance(name, hf.Transposed) else x for x in mine]
    values, widths = [x.to(torch.float64) for x in mine], [torch.full(x.shape, x.itemsize) for x in mine]
    return (torch.stack(values), torch.stack(widths)) if "{e}" in name else (values[0], widths[0])


def tree_of(mesh_shape):
    mesh = DeviceMesh("cpu", torch.arange(math.prod(mesh_shape)).reshape(mesh_shape),
                      mesh_dim_names=("store", "rest")[:len(mesh_shape)])
    dtype = lambda shape: torch.float64 if shape == () else torch.float32    # each holds what the files do
    specs = {f"leaf{i}": Param(shape, dtype(shape), ("a",) * len(shape))
             for i, (shape, *_) in enumerate(LEAVES.values())}
    names = {f"leaf{i}": n for i, n in enumerate(LEAVES)}
    layout = {f"leaf{i}": Place(mesh, (one,) if len(mesh_shape) == 1 else two)
              for i, (_, _, one, two) in enumerate(LEAVES.values())}
    return specs, names, layout


def round_trip(source, out, mesh_shape):
    specs, names, layout = tree_of(mesh_shape)
    calls = []
    with pytest.MonkeyPatch.context() as mp:
        counting(calls, mp)
        params = hf.load(source, specs, names, layout)
    whole = {n: x for f in sorted(source.glob("*.safetensors")) for n, x in load_file(f).items()}
    share = 0
    for leaf, x in params.items():
        assert isinstance(x, DTensor) and x.placements == layout[leaf].placements and x.requires_grad
        values, widths = leaf_of(whole, names[leaf])
        assert torch.equal(x.full_tensor(), values.to(specs[leaf].dtype)), names[leaf]
        box = tuple(slice(o, o + n) for o, n in zip(*layout[leaf].box(specs[leaf].shape), strict=True))
        share += int(widths[box].sum()) * (2 if names[leaf] == EMBED else 1)   # and its twin
    written = []
    with pytest.MonkeyPatch.context() as mp:
        pwrite = os.pwrite
        mp.setattr(os, "pwrite", lambda fd, view, position: written.append(len(view)) or pwrite(fd, view, position))
        hf.save(out, params, names, like=source)
        hf.save(f"{out}-new", params, names, max_shard_bytes=400)
    return sum(calls), share, sum(written)


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2), (4, 1)])
def test_each_rank_reads_its_share_and_all_write_the_original(source, tmp_path, mesh_shape):
    results = pool(math.prod(mesh_shape)).run(round_trip, source, tmp_path / "out", mesh_shape)
    assert all(read == share for read, share, _ in results)
    assert raw(tmp_path / "out") == raw(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "drawn"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-new"]
    new = {n: x for f in (tmp_path / "out-new").glob("*.safetensors") for n, x in load_file(f).items()}
    assert new.keys() == {n for _, n in raw(source)} - {HEAD, FREQ}
    assert len(list((tmp_path / "out-new").glob("*.safetensors"))) > 2
    # each byte is written once, whoever holds copies: what all ranks wrote is what the two directories have
    everything = [f for d in ("out", "out-new") for f in (tmp_path / d).iterdir()]
    assert sum(w for *_, w in results) == sum(f.stat().st_size for f in everything)


def failing(source, out, culprit):
    """Rank `culprit` cannot write its part; what every rank raised."""
    specs, names, layout = tree_of((4,))
    params = hf.load(source, specs, names, layout)
    with pytest.MonkeyPatch.context() as mp:
        if dist.get_rank() == culprit:
            def full(fd, view, position):
                raise OSError(28, "No space left on device")
            mp.setattr(os, "pwrite", full)
        try:
            hf.save(out, params, names)
        except Exception as e:
            return type(e).__name__, str(e)


@pytest.mark.parametrize("culprit", [0, 2])
def test_one_rank_that_fails_fails_all_and_leaves_what_was_there(source, tmp_path, culprit):
    (tmp_path / "out").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "out" / "model.safetensors")
    before = raw(tmp_path / "out")
    errors = pool(4).run(failing, source, tmp_path / "out", culprit)
    assert [kind for kind, _ in errors] == ["OSError"] * 4
    assert all("No space left" in text and "out.partial/model.safetensors" in text for _, text in errors)
    assert all(f"rank {culprit}: " in text for r, (_, text) in enumerate(errors) if r != culprit)
    assert raw(tmp_path / "out") == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def halves(folder):
    """Each half of the ranks saves and loads a model of its own; rank 3 cannot write the second time."""
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("half", "store"))["store"]
    number, place, said = dist.get_rank() // 2, Place(mesh, (S(0),)), []
    specs = {"w": Param((6, 2), torch.float32, (None, None))}
    with pytest.MonkeyPatch.context() as mp:
        for value in (1.0, 2.0):
            try:
                hf.save(folder / f"half{number}", {"w": place.put(torch.full((6, 2), value + number))}, {"w": "w"})
                said.append(None)
            except Exception as e:
                said.append(f"{type(e).__name__}: {e}")
            if dist.get_rank() == 3:
                mp.setattr(os, "pwrite", lambda *args: 1 / 0)
    loaded = hf.load(folder / f"half{number}", specs, {"w": "w"}, {"w": place})["w"]
    return *said, loaded.full_tensor().unique().tolist()


def test_ranks_of_a_part_of_the_world_fail_alone(tmp_path):
    good, also_good, other, culprit = pool(4).run(halves, tmp_path)
    assert good == also_good == (None, None, [2.0])
    assert other == (None, "RuntimeError: hf.save: write: rank 3: division by zero", [2.0])
    assert culprit[0] is None and culprit[1].startswith("ZeroDivisionError") and culprit[2] == [2.0]


def dies(rank, size, source, folder, culprit, moment):
    """One rank is killed while it saves; what the others hear goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    specs, names, layout = tree_of((size,))
    params = hf.load(source, specs, names, layout)
    hf.save(folder / "out" / "model", params, names)
    if rank == culprit:
        where = {"outline": (files, "lay_out"), "write": (os, "pwrite"), "finish": (directory, "_copy_others")}[moment]
        setattr(*where, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    start, said = time.monotonic(), "nothing"
    try:
        hf.save(folder / "out" / "model", {k: x + 1 for k, x in params.items()}, names)
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    (folder / f"rank{rank}.json").write_text(json.dumps([said, time.monotonic() - start]))
    os._exit(0)


@pytest.mark.parametrize("culprit, moment", [(1, "outline"), (2, "write"), (0, "outline"), (0, "finish")])
def test_a_rank_that_dies_while_saving_is_named_soon(source, tmp_path, culprit, moment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_pool.PRELOAD)
    ranks = [context.Process(target=dies, args=(rank, 3, source, tmp_path, culprit, moment)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    assert [p.exitcode for p in ranks] == [-signal.SIGKILL if r == culprit else 0 for r in range(3)]
    for rank in {0, 1, 2} - {culprit}:
        said, seconds = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert said.startswith(f"ConnectionError: hf.save: {moment}: rank {culprit}: is gone") and seconds < 15, said
    whole = {n: x for f in source.glob("*.safetensors") for n, x in load_file(f).items()}
    got = load_file(tmp_path / "out" / "model" / files.SINGLE)
    assert torch.equal(got["whole"], whole["whole"]) and (culprit == 0 or os.listdir(tmp_path / "out") == ["model"])


def mismatched(source):
    specs, names, layout = tree_of((4,))
    try:
        hf.load(source, specs, names, layout)
    except Exception as e:
        return type(e).__name__, str(e)


def test_a_twin_that_differs_in_one_ranks_rows_fails_all(source, tmp_path):
    bad = {n: x for f in sorted(source.glob("*.safetensors")) for n, x in load_file(f).items()}
    bad[HEAD] = bad[EMBED].clone()
    bad[HEAD][-1] += 1
    save_file(bad, tmp_path / "model.safetensors")
    errors = pool(4).run(mismatched, tmp_path)
    assert [kind for kind, _ in errors] == ["ValueError"] * 4
    assert all(HEAD in text and EMBED in text and ("hf.load: rank 3: " in text) == (r < 3)
               for r, (_, text) in enumerate(errors))


def plain_and_odd(out):
    """A plain leaf beside DTensors is written once; a leaf that is a partial sum is refused."""
    mesh = DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("store",))
    a = Place(mesh, (S(0),)).put(torch.arange(6.0).reshape(3, 2))
    hf.save(out, {"a": a, "b": torch.arange(5)}, {"a": "a", "b": "b"})
    odd = DTensor.from_local(torch.ones(3), mesh, [torch.distributed.tensor.Partial()])
    try:
        hf.save(out, {"a": a, "odd": odd}, {"a": "a", "odd": "odd"})
    except ValueError as e:
        return str(e)


def test_plain_leaves_and_partial_sums(tmp_path):
    for text in pool(2).run(plain_and_odd, tmp_path / "out"):
        assert "odd of shape [3]" in text and "redistribute" in text
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["a"], torch.arange(6.0).reshape(3, 2)) and torch.equal(got["b"], torch.arange(5))
