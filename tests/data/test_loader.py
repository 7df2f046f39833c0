"""Order by seed alone: any mesh gets its part of the same global batches; epochs, cursors, evaluation and splits lose
nothing."""
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import xtf.data.loader
from xtf import init, models, moe, tree, value_and_grad
from xtf.data import Loader, Sample, Source, cut, eval_batches, mix, split_off
from xtf.data.batch import share

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
    rows = {}  # put together again by hand: rows dealt in order of (replicate, dp, ep), columns in order of sp
    for (r, d, e, _, t), part in sorted(by_place.items()):
        if t == 0:
            rows.setdefault((r, d, e), []).append(part)
    for leaf in ("input_ids", "positions", "segments"):
        assert all(torch.equal(getattr(p, leaf), getattr(parts_of[0], leaf)) for parts_of in rows.values()
                   for p in parts_of)
        assert torch.equal(dealt([getattr(p[0], leaf) for p in rows.values()]), getattr(whole, leaf))
    for leaf in ("labels", "loss_mask"):
        assert torch.equal(dealt([torch.cat([getattr(p, leaf) for p in parts_of], 1) for parts_of in rows.values()]),
                           getattr(whole, leaf))


def test_segments_have_room_for_the_documents_that_are_there_on_every_rank():
    """64k positions have room for 4096 documents by default; a step's packs have far fewer. A rank cannot see the
    other ranks' packs, and has their S and `longest` all the same; powers of two keep shapes few."""
    seq_len = 1 << 16
    lengths = [1500] * 43 + [300] * 200 + [40_000]
    loaders = [Loader(samples_of(lengths), seq_len, 4, seed) for seed in range(3)]
    shapes = set()
    for loader, i in itertools.product(loaders, range(3)):
        whole = loader.step(i)
        lengths_PS = whole.segments.diff(dim=1)
        documents, longest = int((lengths_PS > 0).sum(1).max()), int(lengths_PS.max())
        S = whole.segments.shape[1] - 1
        assert S in (16, 32, 64, 128, 256, 512) and max(16, documents) <= S < 2 * max(16, documents)
        assert longest <= whole.longest == whole.segments.longest < 2 * longest
        shapes.add((S, whole.longest))
        for mesh in ranks(dp=2, ep=2):
            mine = loader.step(i, mesh)
            assert (mine.segments.shape[1] - 1, mine.longest) == (S, whole.longest) and equal(mine, cut(whole, mesh))
    assert len(shapes) <= 4
    held_out = list(eval_batches(samples_of(lengths), seq_len, 2))
    assert all(max(b.segments.diff(dim=1).max(), 2) <= b.longest and b.segments.shape[1] <= 513 for b in held_out)
    assert sum(int((b.segments.diff(dim=1) > 0).sum()) for b in held_out) >= len(lengths)


def test_room_for_documents_that_are_not_there_changes_no_bit():
    """Losses and gradients, dense and with experts, at the S of before (all that may be) and now."""
    samples = samples_of([3, 9, 2, 14, 5, 5, 11, 7])
    batch = Loader(samples, 64, 2).step(0)
    assert batch.segments.shape[1] == 17
    more = replace(batch, segments=F.pad(batch.segments, (0, 47), value=64), longest=None)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    for name, hf in (("qwen3", sizes), ("qwen3_moe", sizes | experts)):
        model = models.FAMILIES[name]
        cfg = model.config(hf | {"model_type": name})
        params = init(model.specs(cfg), seed=0)

        def share(p, batch, ops, model=model, cfg=cfg, name=name):
            if name == "qwen3":
                return model.loss(p, batch, cfg, ops)
            nll, routing = model.loss_and_routing(p, batch, cfg, ops)
            return nll + moe.balance(routing, moe.num_tokens(batch, ops), ops)
        a, b = (value_and_grad(share)(params, given) for given in (batch, more))
        assert torch.equal(a[0], b[0])
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a[1]), tree.leaves(b[1]), strict=True))


def dealt(parts):
    """Rows of several ranks in the order in which they were dealt: one to each, then the next."""
    return torch.stack(parts, 1).flatten(0, 1)


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
    # rank 5 is dp=1, ep=0, sp=1
    assert torch.equal(mine.input_ids, batch.input_ids[2:3]) and torch.equal(mine.labels, batch.labels[2:3, 8:])


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
    loader = Loader(samples_of(lengths), SEQ_LEN, 1, seed=3, window=window)
    packs, of_epoch = [], []
    while len(of_epoch) < 3 * len(lengths):
        packs.append(loader.step(len(packs)).input_ids)
        of_epoch += (packs[-1][packs[-1] > 0].unique() - 1).tolist()
        assert sorted(lengths[i] for i in (packs[-1][packs[-1] > 0].unique()
                                           - 1).tolist()) == sorted(loader.documents(len(packs) - 1))
    for e in range(3):
        assert sorted(of_epoch[e * len(lengths):(e + 1) * len(lengths)]) == list(range(len(lengths)))
    # the same packs, some at a time, the dearest first
    steps = Loader(samples_of(lengths), SEQ_LEN, packs_per_step, seed=3, window=window)
    for i in range(len(packs) // packs_per_step):
        step = steps.step(i)
        want = torch.cat(packs[i * packs_per_step:(i + 1) * packs_per_step])
        assert sorted(step.input_ids.tolist()) == sorted(want.tolist())
        costs = (step.segments.diff().long() ** 2).sum(1)
        assert costs.tolist() == sorted(costs.tolist(), reverse=True)


def test_epochs_and_seeds_differ():
    samples = samples_of([2 + i % 15 for i in range(200)])
    take = lambda loader, start: torch.cat([loader.step(start + i).input_ids for i in range(20)])
    loader = Loader(samples, SEQ_LEN, 1, 0)
    start = next(i for i in range(200) if loader.cursor(i)["epoch"] == 1)
    assert not torch.equal(take(loader, 0), take(Loader(samples, SEQ_LEN, 1, 1),
                                                 0)) and not torch.equal(take(loader, 0), take(loader, start))
    longest = [max(loader.documents(i)) for i in range(start)]
    assert longest != sorted(longest, reverse=True)  # not best-fit's order, longest first
    tokens = sum(sum(loader.documents(i)) for i in range(start))
    assert loader.efficiency() == tokens / (start * SEQ_LEN) > 0.95 and tokens == sum(len(s.ids) for s in samples)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(0, 25),
       st.integers(1, 20), st.booleans())
def test_steps_are_a_function_of_their_number(lengths, packs_per_step, order, resume, window, grouped):
    make = lambda: Loader(samples_of(lengths), SEQ_LEN, packs_per_step, window=window, group_by_length=grouped)
    ascending, jumping, resumed = make(), make(), make()
    wanted = [ascending.step(i) for i in range(26)]
    assert all(equal(jumping.step(i), wanted[i]) for i in order)
    cursor = json.loads(json.dumps(ascending.cursor(resume)))
    resumed.seek(cursor)
    assert all(equal(resumed.step(i), wanted[i]) for i in range(resume, 26))
    assert resumed.cursor(resume) == cursor
    assert all(equal(resumed.step(i), wanted[i]) for i in range(26))                        # and what was before


def test_a_resumed_loader_draws_nothing_of_what_came_before(monkeypatch):
    samples = samples_of([2 + i % 15 for i in range(500)])
    cursor = Loader(samples, SEQ_LEN, 4, window=50).cursor(1000)
    loader, drawn = Loader(samples, SEQ_LEN, 4, window=50), []
    loader.seek(cursor)
    monkeypatch.setattr(xtf.data.loader, "draw", lambda *args: drawn.append(args) or mix.draw(*args))
    for i in range(1000, 1010):
        loader.step(i)
    assert cursor["epoch"] > 10 and len(drawn) <= 3        # of 140 windows


@pytest.mark.parametrize(("change", "named"), [
    (dict(seq_len=32), r"seq_len \(16 then, 32 now\)"), (dict(packs_per_step=2), "packs_per_step"),
    (dict(seed=1), "seed"),
    (dict(max_documents=7), "max_documents"), (dict(window=9), "window"),
    (dict(group_by_length=True), "group_by_length"),
    (dict(samples=samples_of([4, 5, 15])), "data"),
    (dict(samples=[*samples_of([4, 5]), Sample([3] * 16, [1] * 15 + [0])]), "data"),
    (dict(samples=[Source("a", samples_of([4, 5, 16]), 1.0), Source("b", samples_of([3]), 2.0)]), "weight of b")])
def test_a_cursor_of_another_order_is_refused(change, named):
    make = lambda **kw: Loader(**{**dict(samples=samples_of([4, 5, 16]), seq_len=SEQ_LEN, packs_per_step=1), **kw})
    cursor = make().cursor(9)
    make().seek(cursor)
    with pytest.raises(ValueError, match=f"changed .*{named}"):
        make(**change).seek(cursor)


@pytest.mark.parametrize("packs_per_step", [2, 3, 8])
def test_grouping_by_length_puts_packs_of_like_cost_in_one_step(packs_per_step):
    generator = torch.Generator().manual_seed(0)
    samples = samples_of(torch.randint(2, 33, (400,), generator=generator).tolist())
    num_packs = next(i for i in range(1000) if Loader(samples, 64, 1).cursor(i)["epoch"] == 1)
    num_steps = -(-num_packs // packs_per_step)
    plain, grouped = ([Loader(samples, 64, packs_per_step, group_by_length=g).step(i) for i in range(num_steps)]
                      for g in (False, True))
    costs = lambda steps: [(b.segments.diff().long() ** 2).sum(1) for b in steps]
    spread = lambda steps: sum(int(c.max() - c.min()) for c in costs(steps)[:num_steps - 2])
    assert spread(grouped) < spread(plain) / 4
    means = [c.double().mean().item() for c in costs(grouped)]
    assert means != sorted(means) and means != sorted(means, reverse=True)  # but cheap and dear steps come mixed
    for steps in (plain, grouped):  # and each sample once, as ever
        seen = Counter(torch.cat([b.input_ids for b in steps]).flatten().tolist())
        assert all(seen[i + 1] >= len(s.ids) for i, s in enumerate(samples))
    plain, grouped = (Loader(samples, 64, packs_per_step, group_by_length=group) for group in (False, True))
    assert grouped.efficiency() == plain.efficiency()


@pytest.mark.parametrize("ranks_", [2, 4, 8])
def test_ranks_finish_micro_batches_together(ranks_):
    """Dealt in turn from packs sorted by cost, the ranks' j-th packs differ less than when each rank takes a stretch as
    it comes."""
    samples = samples_of([min(256, int(x)) + 2
                          for x in torch.empty(2000).log_normal_(3, 1.2, generator=torch.Generator().manual_seed(1))])
    loader = Loader(samples, 260, 4 * ranks_)
    waits, unsorted = 0, 0
    for i in range(10):
        cost = (loader.step(i).segments.diff().long() ** 2).sum(1)
        by_rank = torch.stack([cost[share(len(cost), 260, m)[0]] for m in ranks(dp=ranks_)])
        shuffled = cost[torch.randperm(len(cost), generator=torch.Generator().manual_seed(i))].view(ranks_, -1)
        waits += int((by_rank.max(0).values - by_rank.min(0).values).sum())
        unsorted += int((shuffled.max(0).values - shuffled.min(0).values).sum())
    assert waits < 0.4 * unsorted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, SEQ_LEN), max_size=30), st.sampled_from(MESHES))
def test_evaluation_sees_each_sample_once_on_any_mesh(lengths, sizes):
    samples = samples_of(lengths)
    count = torch.zeros(len(lengths) + 1)
    for mesh in ranks(**sizes):
        if mesh.coordinate == () or "tp" not in sizes or mesh.coordinate[list(sizes).index("tp")] == 0:
            for batch in eval_batches(samples, SEQ_LEN, 4, mesh):
                assert batch.loss_mask.shape[1] * dict(zip(mesh.mesh_dim_names, mesh.shape,
                                                           strict=True)).get("sp", 1) == SEQ_LEN
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
