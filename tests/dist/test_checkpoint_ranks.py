"""Checkpoints of several ranks: law 6 from any layout to any layout, and what the others do when one fails or dies."""
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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import xtf
from xtf import checkpoint, hf, tree
from xtf.checkpoint import Checkpoints, Exporter, restore_params
from xtf.checkpoint import tensorstore as arrays
from xtf.layout import Place, local
from xtf.testing import _pool, pool

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.bool)
MESHES = ((1,), (2,), (4,), (2, 2), (1, 2))


def bits(shape, dtype, seed):
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))
    return (raw[..., 0] > 127) if dtype is torch.bool else raw.view(dtype).reshape(shape)


def mesh_of(sizes):
    return DeviceMesh("cpu", torch.arange(dist.get_world_size()).reshape(sizes), mesh_dim_names=("a", "b")[:len(sizes)])


def placed(leaves, sizes, which, seed):
    """The drawn leaves as a TrainState: even ones are parameters, odd ones moments; a leaf placed None is a plain
    tensor."""
    mesh = mesh_of(sizes)

    def leaf(i, shape, dtype, placements):
        whole, cut = bits(shape, dtype, seed + i), placements[which]
        if cut is None:
            return whole
        return Place(mesh, tuple(Shard(d % len(shape)) if shape and d >= 0 else Replicate()
                                 for d in cut[:len(sizes)])).put(whole)
    made = [leaf(i, *drawn) for i, drawn in enumerate(leaves)]
    state = xtf.TrainState.create({"w": made[::2], "frozen": None}, opt=(None, {"mu": made[1::2]}, ()), seed=seed)
    return xtf.TrainState(state.step + seed % 100, state.params, state.opt, state.extra, state.key, donated=True)


def same_here(a, b):
    raw = lambda x: local(x).contiguous().reshape(-1).view(torch.uint8)
    return all(y is None if x is None else torch.equal(raw(x), raw(y)) for x, y in tree.zip_leaves(a, b))


def save_it(folder, leaves, sizes, seed, chunk, background):
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(arrays, "CHUNK_BYTES", chunk)
        with Checkpoints(folder, background=background) as checkpoints:
            state = placed(leaves, sizes, 0, seed)
            checkpoints.save(3, state, {"seed": seed})
            for x in tree.leaves(state) if background else ():
                if x is not None:
                    local(x).zero_()                                     # trained on in place


def restore_it(folder, leaves, sizes, seed):
    want, state = placed(leaves, sizes, 1, seed), placed(leaves, sizes, 1, seed + 1000)
    memory = [local(x).data_ptr() for x in tree.leaves(state) if x is not None]
    with Checkpoints(folder) as checkpoints:
        got, data = checkpoints.restore(state)
    params = restore_params(folder, placed(leaves, sizes, 1, seed + 2000).params)
    return (same_here(got, want) and same_here(params, want.params) and data == {"seed": seed} and got.donated
            and memory == [local(x).data_ptr() for x in tree.leaves(got) if x is not None])


placements = st.one_of(st.none(), st.tuples(st.integers(-1, 2), st.integers(-1, 2)))
leaf = st.tuples(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 10, 16, 33]), max_size=3).map(tuple),
                 st.sampled_from(DTYPES), st.tuples(placements, placements))


@given(leaves=st.lists(leaf, min_size=1, max_size=7), source=st.sampled_from(MESHES), target=st.sampled_from(MESHES),
       seed=st.integers(0, 999), chunk=st.sampled_from([1, 40, 200, 1 << 24]), background=st.booleans())
@settings(max_examples=20)
def test_law_6_from_any_layout_to_any_layout(tmp_path_factory, leaves, source, target, seed, chunk, background):
    folder = tmp_path_factory.mktemp("law")
    ranks = lambda sizes: torch.Size(sizes).numel()
    pool(ranks(source)).run(save_it, folder, leaves, source, seed, chunk, background)
    assert all(pool(ranks(target)).run(restore_it, folder, leaves, target, seed))


def boxes(shape, sizes, dims):
    """Every rank's box, by torch's own rule, without processes."""
    out = [[(0, n) for n in shape]]
    for size, dim in zip(sizes, dims, strict=True):
        out = [[*box[:dim], (box[dim][0] + i * rows, max(0, min(rows, box[dim][1] - i * rows))), *box[dim + 1:]]
               for box in out for rows in [-(-box[dim][1] // size) if box[dim][1] else 1] for i in range(size)]
    return out


@given(shape=st.lists(st.integers(1, 5000), min_size=2, max_size=2),
       sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), data=st.data())
@settings(max_examples=300)
def test_no_chunk_has_two_writers(shape, sizes, data):
    """The merge of two writers' stores keeps one version of a chunk, silently."""
    dims = data.draw(st.lists(st.integers(0, 1), min_size=len(sizes), max_size=len(sizes)))
    limit = data.draw(st.sampled_from([64, 4096, 1 << 20]))
    cuts = [[n for n, d in zip(sizes, dims, strict=True) if d == dim] for dim in range(2)]
    grid = tuple(math.gcd(*arrays._boundaries(n, c)) or n for n, c in zip(shape, cuts, strict=True))
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(arrays, "CHUNK_BYTES", limit)
        chunk = arrays._chunk(grid, torch.empty(shape, device="meta"))
    writers = {}
    for rank, box in enumerate(boxes(shape, sizes, dims)):
        if all(size for _, size in box):
            for i in range(2):
                assert box[i][0] % chunk[i] == 0                         # a box begins where a chunk does
            key = tuple(low // c for (low, _), c in zip(box, chunk, strict=True))
            assert writers.setdefault(key, rank) == rank
    whole = torch.Size(chunk).numel() * 4
    assert whole <= max(limit, torch.Size(grid).numel() * 4)


def test_large_dims_without_divisors_are_not_cut_into_rows():
    for shape in ((50257, 768), (151_933, 1024), (7, 49_999_991)):
        chunk = arrays._chunk(shape, torch.empty(shape, device="meta"))
        assert 1 << 21 <= torch.Size(chunk).numel() * 4 <= 1 << 24, chunk


def replicated(folder):
    mesh = mesh_of((2, 2))
    state = {"a": Place(mesh, (Replicate(), Shard(0))).put(torch.rand(40_000)),
             "b": Place(mesh, (Replicate(), Replicate())).put(torch.rand(40_000)), "c": torch.rand(40_000),
             "d": torch.rand(40_000)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, {})


def test_copies_are_written_once_and_dealt_out(tmp_path):
    pool(4).run(replicated, tmp_path)
    sizes = [sum(p.stat().st_size for p in (tmp_path / "1" / "state" / f"ocdbt.process_{r}").rglob("*") if p.is_file())
             for r in range(4)]
    # four leaves of 160 kB; nobody writes two of the whole ones
    assert 640_000 < sum(sizes) < 660_000 and max(sizes) < 300_000, sizes


def one_fails(folder, culprit, where):
    """Save 1, fail save 2 on one rank, save 3; what every rank saw."""
    mesh = mesh_of((dist.get_world_size(),))
    state = {"w": Place(mesh, (Shard(0),)).put(torch.arange(10.0)), "b": torch.ones(3)}
    with Checkpoints(folder) as checkpoints, pytest.MonkeyPatch.context() as mp:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        if dist.get_rank() == culprit:
            def full(*args, **kwargs):
                raise OSError(28, "No space left on device", f"{folder}/x")
            mp.setattr(*{"write": (arrays, "write"), "commit": (os, "rename"), "copy": (arrays, "parts")}[where], full)
        seen, start = None, time.monotonic()
        try:
            checkpoints.save(2, state, {})
            checkpoints.wait()
        except Exception as e:
            seen = type(e).__name__, str(e)
        mp.undo()
        there = checkpoints.steps(), sorted(os.listdir(folder))
        checkpoints.save(3, state, {})
        checkpoints.wait()
        return seen, time.monotonic() - start, there, checkpoints.steps()


@pytest.mark.parametrize("culprit, where", [(0, "write"), (2, "write"), (0, "copy"), (3, "copy"), (0, "commit")])
def test_one_rank_that_fails_fails_all_and_the_run_can_go_on(tmp_path, culprit, where):
    for rank, (seen, seconds, (steps, names), after) in enumerate(pool(4).run(one_fails, tmp_path, culprit, where)):
        assert seen is not None and seen[0] == "OSError" and "No space left on device" in seen[1] and seconds < 20, seen
        assert rank == culprit or f"rank {culprit}: " in seen[1]
        assert steps == [1] and names == [".lock", "1"] and after == [1, 3]


def damaged(folder):
    state = {"w": Place(mesh_of((2,)), (Shard(0),)).put(torch.zeros(2000))}
    with Checkpoints(folder) as checkpoints:
        if not checkpoints.steps():
            checkpoints.save(1, {"w": Place(mesh_of((2,)), (Shard(0),)).put(torch.rand(2000))}, {})
            return None
        try:
            checkpoints.restore(state)
        except Exception as e:
            return type(e).__name__, str(e)


def test_damage_that_one_rank_finds_fails_all(tmp_path):
    pool(2).run(damaged, tmp_path)
    file = max((tmp_path / "1" / "state" / "ocdbt.process_1").rglob("*"),
               key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    (kind0, text0), (kind1, text1) = pool(2).run(damaged, tmp_path)
    assert kind0 == kind1 == "OSError" and text0.startswith("restore 1: rank 1: ")
    assert "the values of w are damaged" in text1


def refused(folder):
    """A partial sum; ranks that make different calls."""
    state = {"odd": DTensor.from_local(torch.ones(3), mesh_of((2,)), [Partial()])}
    texts = []
    with Checkpoints(folder) as checkpoints:
        for step, tree_ in ((1, state), (5 + dist.get_rank(), {"w": torch.ones(2)})):
            try:
                checkpoints.save(step, tree_, {})
                checkpoints.wait()
            except Exception as e:
                texts.append((type(e).__name__, str(e)))
        checkpoints.save(9, {"w": torch.ones(2)}, {})
    return texts


def test_what_is_refused_on_all_ranks(tmp_path):
    for first, second in pool(2).run(refused, tmp_path):
        assert first[0] == "ValueError" and "odd of shape [3]" in first[1] and "redistribute" in first[1]
        assert second[0] == "RuntimeError" and "did not make the same calls" in second[1] and "save 6" in second[1]
    assert checkpoint.steps(tmp_path) == [9]


def dies(rank, size, folder, culprit, moment):
    """One rank is killed in its second save; what the others hear goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    state = {"w": Place(mesh_of((size,)), (Shard(0),)).put(torch.arange(64.0)), "step": torch.tensor(1)}
    checkpoints = Checkpoints(folder / "out", timeout=60)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    if rank == culprit:
        kill = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        {"write": lambda: setattr(arrays, "write", kill), "copy": lambda: setattr(arrays, "parts", kill),
         "rename": lambda: setattr(os, "rename", kill), "fsync": lambda: setattr(os, "fsync", kill)}[moment]()
    start = time.monotonic()
    try:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        said = "nothing"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    (folder / f"rank{rank}.json").write_text(json.dumps([said, time.monotonic() - start]))
    os._exit(0)


@pytest.mark.parametrize("culprit, moment", [(1, "write"), (0, "write"), (2, "copy"), (0, "fsync"), (0, "rename")])
def test_one_rank_that_dies_is_named_soon(tmp_path, culprit, moment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_pool.PRELOAD)
    ranks = [context.Process(target=dies, args=(rank, 4, tmp_path, culprit, moment)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    assert [p.exitcode for p in ranks] == [-signal.SIGKILL if r == culprit else 0 for r in range(4)]
    for rank in {0, 1, 2, 3} - {culprit}:
        said, seconds = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert said.startswith("ConnectionError: save 2: ") and f"rank {culprit}: is gone" in said, said
        assert seconds < 15
    with Checkpoints(tmp_path / "out") as again:
        got, _ = again.restore({"w": torch.zeros(64), "step": torch.tensor(0)})
        assert torch.equal(got["w"], torch.arange(64.0))
        assert set(os.listdir(tmp_path / "out")) - {str(s) for s in again.steps()} == {".lock"}
        again.save(3, got, {})


def exported(folder, like):
    """Exports in the background, while the parameters are trained in place and the mesh's own groups are busy."""
    flat, square = mesh_of((4,)), mesh_of((2, 2))
    made = lambda seed: {"a": Place(flat, (Shard(0),)).put(bits((10, 6), torch.float32, seed)),
                         "b": Place(square, (Replicate(), Shard(1))).put(
        bits((3, 8), torch.bfloat16, seed + 1)), "c": bits((5,), torch.float32, seed + 2)}
    names = {"a": "model.a", "b": "model.b", "c": "model.c"}
    params = made(0)
    hf.save(f"{folder}/now0", params, names)
    hf.save(f"{folder}/now1", made(1), names)
    with Exporter() as exporter:
        for seed in (0, 1):
            for name, x in made(seed).items():
                local(params[name]).copy_(local(x))
            exporter.save(f"{folder}/later{seed}", params, names)
            for name in params:
                local(params[name]).zero_()
            for _ in range(20):
                dist.all_reduce(torch.ones(3))
                dist.all_reduce(torch.ones(3), group=square.get_group(1))
        exporter.wait()
        try:
            exporter.save(f"{folder}/never", params, {"a": "x", "b": "y"})
            exporter.wait()
        except Exception as e:
            return f"{type(e).__name__}: {e}"


def test_exports_in_the_background_are_what_hf_save_writes(tmp_path):
    for text in pool(4).run(exported, tmp_path, None):
        assert "params without a name: ['c']" in text
    files = lambda name: {p.name: p.read_bytes() for p in Path(tmp_path, name).iterdir()}
    assert files("now0") == files("later0") != files("now1") == files("later1")
