"""What routers do and are told to do: losses by formula in float64, corrections, statistics, remat."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xtf
from tests.laws import moe_model as M
from xtf import moe
from xtf.data.batch import Sample, pack_rows
from xtf.ops import LOCAL
from xtf.testing import Layout, token_batches
from xtf.transforms import overlap, remat


@st.composite
def routed(draw):
    """Drawn logits, choices and documents of a batch, and the layers' `Routing`."""
    E, L = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    router = moe.Router(E, draw(st.integers(1, E)), draw(st.sampled_from(["softmax", "sigmoid", "softmax_top_k"])),
                        normalise=draw(st.booleans()))
    batch = draw(token_batches(5)(Layout()))
    documents_Pt = moe.documents(batch, LOCAL)
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = [torch.randn(batch.input_ids.numel(), E, generator=g, dtype=torch.float64).requires_grad_()
              for _ in range(L)]
    ys = []
    for x_TE in logits:
        scores_TE = x_TE.sigmoid() if router.score == "sigmoid" else x_TE.softmax(-1)
        experts_TK = moe.choose(scores_TE.detach(), None, router).masked_fill((documents_Pt.flatten() < 0)[:, None], -1)
        ys.append(moe.statistics(x_TE, scores_TE, experts_TK, documents_Pt, batch.segments.shape[1] - 1,
                                 torch.zeros((), dtype=torch.int64)))
    return router, batch, documents_Pt, logits, moe.gather(ys)


@given(routed())
@settings(max_examples=25)
def test_balance_and_z_are_the_formulas(drawn):
    """DeepSeek V3's eq. 17 to 20 for each document, weighted by its tokens, written as loops; and gradients."""
    router, _, documents_Pt, logits, routing = drawn
    E, K, n = router.num_experts, router.top_k, (documents_Pt >= 0).sum().clamp(min=1)
    want, want_z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x_TE, experts_PtK in zip(logits, routing.experts, strict=True):
        s_PtE = (x_TE.sigmoid() if router.score == "sigmoid" else x_TE.softmax(-1)).view(*documents_Pt.shape, E)
        for p, row in enumerate(documents_Pt):
            for document in range(int(row.max()) + 1):
                mine = row == document
                f_E = torch.stack([(experts_PtK[p][mine] == e).sum()
                                   for e in range(E)]).double() * E / (K * mine.sum().double())
                p_E = (s_PtE[p][mine] / s_PtE[p][mine].sum(-1, keepdim=True)).mean(0)
                want = want + mine.sum().double() / n * (f_E * p_E).sum()
        want_z = want_z + (x_TE.view(*documents_Pt.shape, E)[documents_Pt >= 0].logsumexp(-1) ** 2).sum() / n
    for got, wanted in ((moe.balance(routing, n, LOCAL), want), (moe.z_loss(routing, n), want_z)):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        theirs = torch.autograd.grad(wanted, logits, retain_graph=True, allow_unused=True)
        for a, b in zip(torch.autograd.grad(got, logits, retain_graph=True), theirs, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-13)


@given(routed())
@settings(max_examples=25)
def test_statistics_are_counts(drawn):
    router, _, documents_Pt, _, routing = drawn
    sums, real = moe.sums(routing), int((documents_Pt >= 0).sum())
    assert sums["tokens"] == real and sums["dropped"] == 0
    for i, experts_PtK in enumerate(routing.experts):
        assert sums["counts"][i].tolist() == [(experts_PtK == e).sum().item() for e in range(router.num_experts)]
        assert (experts_PtK[documents_Pt < 0] == -1).all()
    assert sums["counts"].sum() == real * router.top_k * len(routing.experts)
    if real:
        said = moe.metrics(sums)
        most = max((c.max() / c.mean()).item() for c in sums["counts"])
        assert said["router_violation"].item() == pytest.approx(most - 1)
        assert 0 <= said["router_entropy"] <= torch.log(torch.tensor(float(router.num_experts))) + 1e-12


def test_balance_is_one_a_layer_where_experts_are_used_evenly():
    E, T = 4, 8
    documents_Pt = torch.zeros(1, T, dtype=torch.int64)
    even = moe.statistics(torch.zeros(T, E), torch.full((T, E), 1 / E), torch.arange(T)[:, None] % E, documents_Pt, 1,
                          torch.tensor(0))
    one = moe.statistics(torch.zeros(T, E), torch.eye(E)[[0] * T], torch.zeros(T, 1, dtype=torch.int64), documents_Pt,
                         1, torch.tensor(0))
    for over in ("document", "pack"):
        assert moe.balance(moe.gather([even, None, even]), torch.tensor(T), LOCAL, over).item() == pytest.approx(2)
        assert moe.balance(moe.gather([one]), torch.tensor(T), LOCAL, over).item() == pytest.approx(E)
    assert moe.balance(moe.gather([one]), torch.tensor(T), LOCAL, "batch", torch.zeros(1, E)).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="over='batch' needs previous_LE"):
        moe.balance(moe.gather([one]), torch.tensor(T), LOCAL, "batch")
    with pytest.raises(ValueError, match="over='documents' is none of"):
        moe.balance(moe.gather([one]), torch.tensor(T), LOCAL, "documents")
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        moe.gather([None])


def test_corrections_move_towards_balance():
    """+ rate where an expert had less than the mean, - where more (arXiv 2408.15664); nothing where the step is not
    taken."""
    params = {"layers": [{"q": {"weight": torch.ones(1)}}, {"correction": {"bias": torch.zeros(3)}},
                         {"correction": {"bias": torch.ones(3)}}]}
    updates = xtf.tree.tree_map(lambda p: None, params)
    counts = torch.tensor([[4.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    new = moe.correct(updates, params, counts, 0.1)
    assert new["layers"][0]["q"]["weight"] is None
    assert torch.equal(new["layers"][1]["correction"]["bias"], torch.tensor([-0.1, 0.0, 0.1]))
    assert torch.equal(new["layers"][2]["correction"]["bias"], torch.tensor([0.1, 0.1, -0.1]))
    held = moe.correct(updates, params, counts, 0.1, ok=torch.tensor(False))
    assert not held["layers"][1]["correction"]["bias"].any()
    with pytest.raises(ValueError, match="counts of 1 layers for 2 layers"):
        moe.correct(updates, params, counts[:1], 0.1)


def test_choice_within_groups_by_hand():
    """Two of four groups by the sum of each group's best two; the bias steers the choice and not the weight."""
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.5, 0.8, 0.0, 0.3, 0.3]])
    router = moe.Router(8, 2, "sigmoid", groups=4, top_groups=2)
    assert sorted(moe.choose(scores, None, router)[0].tolist()) in ([0, 2], [0, 3])
    chosen = moe.choose(scores, torch.tensor([0, 0, 0, 0, 0, 0.9, 0, 0.0]), router)
    assert sorted(chosen[0].tolist()) == [4, 5]  # 0.8 + 0.9 beats 1.0, and 0.9 beats 0.9's group mates
    assert moe.weigh(scores.logit(), scores, chosen, router).sort().values[0].tolist() == pytest.approx([0.0, 0.8])


def test_remat_keeps_the_choice():
    """The choice and its announcement are made once a layer and step; recomputation takes the same, of a router that
    would choose otherwise."""
    name = "qwen3_moe"
    module, cfg, specs, _ = M.family(name)
    ids = torch.randint(M.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = xtf.data.Batch(ids, ids.roll(-1, 1), torch.ones(2, 6), torch.arange(6).expand(2, 6),
                           torch.tensor([[0, 6]] * 2, dtype=torch.int32))
    announced = []

    def counted():
        def wrap(ops, env):
            def announce(experts_TK, E):
                announced.append(experts_TK)
                return ops.announce((experts_TK + len(announced)) % E, E)                   # another choice each time
            return replace(ops, announce=announce)
        return xtf.Transform("counted", 27, wrap)

    def grads(*transforms):
        announced.clear()
        share = xtf.value_and_grad(lambda p, b, ops: module.loss(p, b, cfg, ops))
        run = xtf.shard(lambda p, b, ops: share(p, b, ops), counted(), *transforms, specs=specs)
        return run(xtf.init(run.specs), batch)[1], len(announced)

    want, once = grads()
    for keep in ((), ("attn_out",)):
        got, times = grads(remat(*keep))
        assert times == once == cfg.num_hidden_layers
        for a, b in zip(xtf.tree.leaves(want), xtf.tree.leaves(got), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_stages_interleave():
    def stages(name, log, n):
        for i in range(n):
            log.append(f"{name}{i}")
            yield
        yield name
    log = []
    assert moe.interleave(stages("a", log, 3), stages("b", log, 1)) == ["a", "b"]
    assert log == ["a0", "b0", "a1", "a2"]
    assert moe.staged(partial(stages, "c", [], 2))() == "c"


@pytest.mark.parametrize("compiled", [False, True])
def test_halves_that_overlap_are_told_how_long_documents_are(compiled):
    """Also under torch.compile, in which no tensor can be told."""
    @moe.staged
    def block(params, x, segments, cos):
        yield
        yield x * segments.longest + cos, None

    def scan(block, *args, **kwargs):
        if compiled:
            block = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
        return LOCAL.scan(block, *args, **kwargs)
    ops = overlap().wrap(replace(LOCAL, scan=scan), None)
    for n, longest in ((3, 4), (6, 6), (3, 4)):
        segments = pack_rows([[Sample([1] * n, [1] * n)]] * 2, 6, 4).segments
        x, _ = ops.scan(block, [{}], torch.ones(2), segments, torch.zeros(2))
        assert x.tolist() == [longest, longest]
