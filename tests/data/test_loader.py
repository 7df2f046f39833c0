"""Order by seed alone: any mesh gets its part of the same global batches; epochs, cursors, evaluation and splits lose nothing."""
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtf import tree
from xtf.data import Loader, Sample, cut, eval_batches, split_off

SEQ_LEN = 16


@dataclass
class FakeMesh:
    """One rank's view of a mesh, without processes."""
    mesh_dim_names: tuple[str, ...]
    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None

    def get_coordinate(self):
        return self.coordinate


def ranks(**sizes):
    return [FakeMesh(tuple(sizes), tuple(sizes.values()), c) for c in itertools.product(*map(range, sizes.values()))]


def samples_of(lengths):
    """Samples whose tokens say which sample they are from."""
    return [Sample(torch.full((n,), i + 1), torch.ones(n, dtype=torch.bool)) for i, n in enumerate(lengths)]


def equal(a, b):
    return all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


LENGTHS = st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=30)
MESHES = [{}, {"dp": 2}, {"dp": 4}, {"sp": 2}, {"dp": 2, "sp": 2}, {"replicate": 2, "dp": 2},
          {"ep": 2, "dp": 2, "sp": 4}, {"dp": 1, "ep": 4, "tp": 3}, {"sp": 2, "dp": 2, "replicate": 1}]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 9), st.integers(0, 12), st.sampled_from(MESHES))
def test_ranks_hold_the_parts_of_one_global_batch(lengths, seed, i, sizes):
    samples = samples_of(lengths)
    whole = Loader(samples, SEQ_LEN, 4, seed).step(i)
    parts = {m.coordinate: Loader(samples, SEQ_LEN, 4, seed).step(i, m) for m in ranks(**sizes)}
    for mesh in ranks(**sizes):
        assert equal(parts[mesh.coordinate], cut(whole, mesh))
    names = list(sizes)
    place = lambda c: {n: c[names.index(n)] if n in names else 0 for n in ("replicate", "dp", "ep", "sp", "tp")}
    by_place = {tuple(place(c).values()): part for c, part in parts.items()}
    rows = {}  # put together again by hand: rows in order of (replicate, dp, ep), columns in order of sp
    for (r, d, e, _, t), part in sorted(by_place.items()):
        if t == 0:
            rows.setdefault((r, d, e), []).append(part)
    for leaf in ("input_ids", "positions", "segments"):
        assert all(torch.equal(getattr(p, leaf), getattr(parts_of[0], leaf)) for parts_of in rows.values() for p in parts_of)
        assert torch.equal(torch.cat([getattr(p[0], leaf) for p in rows.values()]), getattr(whole, leaf))
    for leaf in ("labels", "loss_mask"):
        assert torch.equal(torch.cat([torch.cat([getattr(p, leaf) for p in parts_of], 1) for parts_of in rows.values()]), getattr(whole, leaf))


def test_a_real_mesh_cuts_alike():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    batch = Loader(samples_of([5, 9, 3, 16, 7]), SEQ_LEN, 4).step(0)
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    try:
        mine = cut(batch, init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "ep", "sp")))
    finally:
        dist.destroy_process_group()
    assert torch.equal(mine.input_ids, batch.input_ids[2:3]) and torch.equal(mine.labels, batch.labels[2:3, 8:])  # rank 5 is dp=1, ep=0, sp=1


def test_what_does_not_divide_is_named():
    loader = Loader(samples_of([4, 5]), SEQ_LEN, 6)
    for sizes, message in [({"replicate": 2, "dp": 2}, "6 packs do not divide over the 4 ranks of replicate=2, dp=2"),
                           ({"sp": 3}, "16 positions .* sp=3")]:
        for get in (lambda m: loader.step(0, m), lambda m: cut(loader.step(0), m)):
            with pytest.raises(ValueError, match=message):
                get(ranks(**sizes)[0])
    with pytest.raises(ValueError, match="not in the mesh"):
        loader.step(0, FakeMesh(("dp",), (2,), None))
    with pytest.raises(ValueError, match="no samples"):
        Loader([], SEQ_LEN, 6)
    with pytest.raises(ValueError, match="packs_per_step=0"):
        Loader(samples_of([4]), SEQ_LEN, 0)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 20))
def test_each_epoch_takes_each_sample_once_and_goes_on(lengths, packs_per_step, window):
    loader = Loader(samples_of(lengths), SEQ_LEN, packs_per_step, seed=3, window=window)
    steps, i = [], 0
    while loader.cursor(i)["epoch"] < 3:
        steps.append(loader.step(i).input_ids)
        i += 1
    packs = torch.cat(steps).tolist()
    sizes = [len(loader._packs(e)) for e in range(3)]
    for e in range(3):
        tokens = sorted(t for p in packs[sum(sizes[:e]):sum(sizes[:e + 1])] for t in p if t)
        assert tokens == [i + 1 for i, n in enumerate(lengths) for _ in range(n)]


def test_epochs_and_seeds_differ():
    samples = samples_of([2 + i % 15 for i in range(200)])
    first, second = (torch.cat([Loader(samples, SEQ_LEN, 1, seed).step(i).input_ids for i in range(20)]) for seed in (0, 1))
    loader = Loader(samples, SEQ_LEN, 1, 0)
    start = len(loader._packs(0))
    again = torch.cat([loader.step(start + i).input_ids for i in range(20)])
    assert not torch.equal(first, second) and not torch.equal(first, again)
    assert loader.efficiency() > 0.95
    longest = [max(loader.lengths[i] for i in p) for p in loader._packs(0)]
    assert longest != sorted(longest, reverse=True)  # not best-fit's order, longest first


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(0, 25))
def test_steps_are_a_function_of_their_number(lengths, packs_per_step, order, resume):
    samples = samples_of(lengths)
    ascending = Loader(samples, SEQ_LEN, packs_per_step)
    wanted = [ascending.step(i) for i in range(26)]
    jumping = Loader(samples, SEQ_LEN, packs_per_step)
    assert all(equal(jumping.step(i), wanted[i]) for i in order)
    cursor = ascending.cursor(resume)
    assert all(type(v) is int for v in cursor.values())
    resumed = Loader(samples, SEQ_LEN, packs_per_step)
    resumed.seek(cursor)
    assert all(equal(resumed.step(i), wanted[i]) for i in range(resume, 26))
    assert resumed.cursor(resume) == cursor


def test_a_cursor_of_other_data_is_refused():
    loader = Loader(samples_of([4, 5, 16]), SEQ_LEN, 1)
    with pytest.raises(ValueError, match=r"past epoch 2's \d packs"):
        loader.seek({"step": 9, "epoch": 2, "position": 5})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, SEQ_LEN), max_size=30), st.sampled_from(MESHES))
def test_evaluation_sees_each_sample_once_on_any_mesh(lengths, sizes):
    samples = samples_of(lengths)
    count = torch.zeros(len(lengths) + 1)
    for mesh in ranks(**sizes):
        if mesh.coordinate == () or "tp" not in sizes or mesh.coordinate[list(sizes).index("tp")] == 0:
            for batch in eval_batches(samples, SEQ_LEN, 4, mesh):
                assert batch.loss_mask.shape[1] * dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)).get("sp", 1) == SEQ_LEN
                count.index_add_(0, batch.labels.flatten(), batch.loss_mask.flatten())
    assert count.tolist() == [0, *(n - 1 for n in lengths)]
    assert {b.input_ids.shape for b in eval_batches(samples, SEQ_LEN, 4)} <= {(4, SEQ_LEN)}


def test_split_off_keeps_conversations_together():
    samples = [Sample([i, i], [0, 1], source=i // 3) for i in range(60)]
    rest, held = split_off(samples, 0.25, seed=1)
    assert sorted(s.ids[0] for s in rest + held) == list(range(60)) and len(held) == 15
    assert not {s.source for s in rest} & {s.source for s in held}
    assert split_off(samples, 0.25, seed=1) == (rest, held) != split_off(samples, 0.25, seed=2)
    assert split_off(samples, 0) == (samples, [])
    for fraction, message in [(1.0, "not in"), (-0.1, "not in"), (0.99, "leaves none")]:
        with pytest.raises(ValueError, match=message):
            split_off(samples, fraction)
