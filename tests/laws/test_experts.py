"""Models with experts are the same function on every layout; planted mistakes are caught."""
import re
from dataclasses import replace
from functools import partial

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xtf
from tests.laws import moe_model as M
from tests.laws.test_lora import learnt
from xtf import tree
from xtf.data import Batch
from xtf.data.batch import cut
from xtf.kernels import swiglu
from xtf.parallel import Overflow, ep, fsdp, settle, static
from xtf.parallel.collectives import record
from xtf.testing import Layout, layouts, pool, token_batches
from xtf.testing.laws import compare, shared_mesh, whole
from xtf.transforms import jit, overlap, remat

BOUND = 1e-11              # float64: 2^-53 × the drawn sums' few thousand terms, as a part of each leaf's largest value


def assert_same(name, layout, batch, k=1, over="document", same=False, adapters=False, mutant=""):
    """One process, the whole batch at once, against the layout with `k` micro-batches."""
    _, _, specs, extra = M.family(name)
    layout = replace(layout, extra=(*layout.extra, partial(learnt, 2))) if adapters else layout
    step = partial(M.step, name=name, over=over, same=same)
    e = compare(partial(step, k=k, mutant=mutant), layout, batch, specs=specs, opt=M.opt, reference=step, extra=extra)
    where = f"{name}, {k} micro-batches, balance over {over}, {same=}, {layout}"
    assert e.loss <= BOUND and e.grad <= BOUND and e.metric <= BOUND, f"{e} ({where})"
    assert e.param <= 1000 * BOUND, f"{e} ({where})"


def drawn(max_ranks):
    """A law over all that is drawn: family, mesh, storage, experts' axis and strategy, overlap, remat, micro-batches,
    adapters, balance, order."""
    @given(st.data())
    def law(data):
        name = data.draw(st.sampled_from(list(M.CONFIGS)), label="model")
        layout = data.draw(layouts(max_ranks, experts=M.family(name)[1].router.num_experts), label="layout")
        k = data.draw(st.sampled_from([1, 2]), label="micro-batches")
        batch = data.draw(token_batches(M.VOCAB, max_packs=1, multiple=k)(layout), label="batch")
        over = data.draw(st.sampled_from(["document", "batch"]), label="balance over")
        same = data.draw(st.sampled_from([False, False, True]), label="every token to the same experts")
        assert_same(name, layout, batch, k, over, same, adapters=data.draw(st.booleans(), label="lora"))
    return law


LAW = {"deadline": None, "derandomize": True, "database": None, "report_multiple_bugs": False,
       "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@pytest.mark.timeout(1200)
def test_any_layout_is_the_same_function():
    settings(max_examples=60, **LAW)(drawn(4))()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_any_layout_is_the_same_function_at_length():
    settings(max_examples=500, **LAW)(drawn(8))()


def a_batch(P=8, T=8):
    """Packs of a document of 3 tokens and one that crosses the middle, some ending in padding."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(M.VOCAB, (P, T), generator=g)
    lengths = torch.tensor([T, T - 1, T, 3, T, T, T, T] * 2)[:P]
    mask = (torch.arange(T) < lengths[:, None]).float()
    positions = torch.tensor([*range(3), *range(T - 3)]).expand(P, T)
    return Batch(ids, ids.roll(-1, 1), mask, positions, torch.tensor([[0, 3, T, T]] * P, dtype=torch.int32), lengths)


@pytest.mark.parametrize("layout", [
    Layout((("ep", 3),), ("ep",), experts="ep"), Layout((("dp", 3),), ("dp",), experts="dp", overlap=True),
    Layout((("dp", 2), ("ep", 3)), ("dp", "ep"), experts="ep", remat=()),
    Layout((("ep", 3), ("sp", 2)), ("sp",), experts="ep")])
@pytest.mark.parametrize("name", ["deepseek_v3 of six", "gpt_oss of six"])
def test_three_and_six_ranks(name, layout):
    assert_same(name, layout, a_batch(12), k=1 if layout.overlap else 2)


@pytest.mark.parametrize("experts", ["", "ep"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_compiled_blocks_are_the_same_function(name, experts):
    """One graph a block where experts are at home, pieces of one where tokens travel."""
    assert_same(name, Layout((("ep", 2),), ("ep",), experts=experts, compile=True, donate=True), a_batch(4))


# ---- planted mistakes ------------------------------------------------------------------------------------------------

def caught(name, layout, **kw):
    with pytest.raises(AssertionError) as failure:
        assert_same(name, layout, a_batch(), **kw)
    return str(failure.value)


EP2, SP2 = Layout((("ep", 2),), experts="ep"), Layout((("sp", 2),))


def divided_by_ep():
    """The gradients of experts as a mean over ep, as if they were data-parallel."""
    def wrap(ops, env):
        def collect(grads, leaves):
            expert = ["expert" in p.axes for p in tree.leaves(M.family("qwen3_moe")[2])]
            return [g / env.size("ep") if e and g is not None else g
                    for g, e in zip(ops.collect(grads, leaves), expert, strict=True)]
        return replace(ops, collect=collect)
    return xtf.Transform("divided", 98, wrap)


def test_expert_gradients_divided_by_ep_are_caught():
    assert "experts" in caught("qwen3_moe", replace(EP2, extra=(divided_by_ep,)))


def test_a_balance_of_local_means_is_caught():
    assert "router.weight" in caught("qwen3_moe", SP2, mutant="balance of local means")


def whole_sinks():
    """Every rank of sp uses the first heads' sinks."""
    def wrap(ops, env):
        if env.size("sp") == 1:                              # a mistake of layouts, not another function
            return ops
        first = lambda q, k, v, sinks=None, **kw: ops.attend(q, k, v, sinks=None if sinks is None
                                                             else torch.cat([sinks[:q.shape[2] // 2]] * 2), **kw)
        return replace(ops, attend=first)
    return xtf.Transform("whole sinks", 21, wrap)


def test_a_sink_not_split_under_sp_is_caught():
    assert "sinks" in caught("gpt_oss", replace(SP2, extra=(whole_sinks,)))


def padding_for_experts():
    """Padding is sent to an expert."""
    def wrap(ops, env):
        if env.size("ep") == 1:
            return ops
        return replace(ops, announce=lambda experts_TK, E: ops.announce(experts_TK.clamp(min=0), E))
    return xtf.Transform("padding", 26, wrap)


def test_padding_for_experts_changes_nothing_but_work():
    """Its weights are 0, so this is no mistake in a value; what must not happen is that it is counted
    (`router_violation` is a metric)."""
    assert_same("qwen3_moe", replace(EP2, extra=(padding_for_experts,)), a_batch())


# ---- bytes, bounds, order --------------------------------------------------------------------------------------------

def on_ranks(num_ranks, fn, *args):
    return pool(num_ranks).run(fn, *args)


def bytes_and_routes(batch, mesh_sizes):
    name = "qwen3_moe"
    module, cfg, specs, _ = M.family(name)

    def probe(params, batch, ops):
        kept = []

        def share(params, batch, ops):
            loss, routing = module.loss_and_routing(params, batch, cfg, ops)
            kept.extend(routing.experts)
            return loss
        with record() as sent:
            xtf.value_and_grad(share)(params, batch, ops)
        return [s.bytes for s in sent if s.kind == "all_to_all"], kept

    m = shared_mesh(mesh_sizes)
    run = xtf.shard(probe, ep("ep"), mesh=m, specs=specs)
    return run(xtf.init(run.specs, 0, run.layout), cut(batch, m))


def test_bytes_are_distinct_token_and_rank_pairs():
    """A row for each (token, other rank), not for each expert; its ids and weights with it; one row home; the same
    again in backward."""
    R, cfg = 4, M.family("qwen3_moe")[1]
    K, D, E, itemsize = cfg.num_experts_per_tok, cfg.hidden_size, M.EXPERTS, 8
    answers = on_ranks(R, bytes_and_routes, a_batch(), (("ep", R),))
    layers = len(answers[0][1])
    pairs = [[{(r, int(t), int(e) // (E // R)) for t, row in enumerate(experts[i].flatten(0, 1)) for e in row if e >= 0
               and int(e) // (E // R) != r}
              for r, (_, experts) in enumerate(answers)] for i in range(layers)]
    for r, (sent, _) in enumerate(answers):
        want = 0
        for layer in pairs:
            n, m = len(layer[r]), sum(to == r for there in layer for _, _, to in there)
            forward = n * D * itemsize + n * K * 4 + n * K * itemsize + m * D * itemsize + (R - 1) * (1 + E // R) * 8
            want += forward + m * D * itemsize + m * K * itemsize + n * D * itemsize
        assert sum(sent) == want
    assert sum(len(p) for layer in pairs for p in layer) > 0


def run_steps(name, layout, batch, bounds, donate):
    """One step that does not fit, then one with room, on the same state; returns the error, and whether every bit of
    the state stayed."""
    _, _, specs, extra = M.family(name)
    m = shared_mesh(layout)
    more = (jit(compile=False),) if donate else ()
    step = xtf.shard(partial(M.step, name=name), fsdp("ep"), ep("ep", static(*bounds)), *more, mesh=m, specs=specs)
    roomy = xtf.shard(partial(M.step, name=name), fsdp("ep"), ep("ep", static(500, 500)), mesh=m, specs=specs)
    params = xtf.init(step.specs, 0, step.layout)
    state = xtf.TrainState.create(params, M.opt.init(params), extra)
    before = [whole(x).clone() for x in tree.leaves(state) if isinstance(x, torch.Tensor)]
    state, _ = step(state, cut(batch, m))                            # says nothing yet: the host waits for nothing
    messages = []
    try:
        step(state, cut(batch, m))
    except Overflow as e:
        messages.append(str(e))
    state, _ = step(state, cut(batch, m))
    try:
        settle()
    except Overflow as e:
        messages.append(str(e))
    settle()                                                         # once is enough
    now = [whole(x) for x in tree.leaves(replace(state, step=state.step - 2)) if isinstance(x, torch.Tensor)]
    same = all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    _, metrics = roomy(state, cut(batch, m))
    return messages, same, metrics["dropped"].item()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("bounds", [(2, 500), (500, 9)])
def test_an_overflow_withholds_the_update_and_says_what_was_needed(bounds, donate):
    for messages, same, dropped in on_ranks(2, run_steps, "deepseek_v3", (("ep", 2),), a_batch(), bounds, donate):
        message, again = messages                                    # by the next step, and by `settle`
        needed = [int(n) for n in re.findall(r"(?:rows|pairs)=(\d+)", message)]
        assert same and dropped == 0 and message == again
        assert needed[2] > bounds[0] or needed[3] > bounds[1], message  # (the first two are the bounds themselves)


def events(batch, mesh_sizes, overlapped):
    """Starts and waits of one forward and backward of one layer, as this rank does them."""
    module, cfg, specs, _ = M.family("qwen3_moe")
    specs = {**specs, "layers": specs["layers"][:1]}
    cfg = msgspec.structs.replace(cfg, num_hidden_layers=1)
    log = []
    m = shared_mesh(mesh_sizes)

    def logged():
        def wrap(ops, env):
            named = lambda label, fn: lambda *args: (log.append(label), fn(*args))[1]
            return replace(ops, dispatch=named("start", ops.dispatch), arrive=named("wait", ops.arrive),
                           combine=named("start home", ops.combine), home=named("wait home", ops.home))
        return xtf.Transform("logged", 26, wrap)

    def probe(params, batch, ops):
        xtf.value_and_grad(lambda p, b, o: module.loss_and_routing(p, b, cfg, o)[0])(params, batch, ops)
    run = xtf.shard(probe, ep("ep"), logged(), *([overlap()] if overlapped else []), mesh=m, specs=specs)
    run(xtf.init(run.specs, 0, run.layout), cut(batch, m))
    return log


def test_halves_overlap():
    """While the rows of one half fly, the other half is at work."""
    assert on_ranks(2, events, a_batch(), (("ep", 2),), False)[0] == ["start", "wait", "start home", "wait home"]
    assert on_ranks(2, events, a_batch(), (("ep", 2),), True)[0] == ["start", "start", "wait", "start home", "wait",
                                                                     "start home", "wait home", "wait home"]


def test_odd_packs_cannot_overlap():
    with pytest.raises(ValueError, match="3 packs in a micro-batch are not two halves"):
        assert_same("qwen3_moe", Layout(overlap=True), tree.tree_map(lambda x: x[:3], a_batch()))


def test_experts_that_do_not_divide():
    with pytest.raises(ValueError, match=r"ep splits 'expert' of 4 over ep=3, which does not divide it"):
        on_ranks(3, bytes_and_routes, a_batch(6), (("ep", 3),))


def home_messages(batch, mesh_sizes, remat_too):
    """The all-to-alls of one `value_and_grad` of one layer."""
    module, cfg, specs, _ = M.family("qwen3_moe")
    specs, cfg = {**specs, "layers": specs["layers"][:1]}, msgspec.structs.replace(cfg, num_hidden_layers=1)

    def probe(params, batch, ops):
        with record() as sent:
            xtf.value_and_grad(lambda p, b, o: module.loss(p, b, cfg, o))(params, batch, ops)
        return sum(s.kind == "all_to_all" for s in sent)
    m = shared_mesh(mesh_sizes)
    run = xtf.shard(probe, ep("ep"), *([remat()] if remat_too else []), mesh=m, specs=specs)
    return run(xtf.init(run.specs, 0, run.layout), cut(batch, m))


def test_recomputation_sends_rows_again_but_neither_counts_nor_the_way_home():
    """Counts, ids, rows, weights, home; backward home, rows, weights. With remat: ids, rows and weights once more."""
    assert on_ranks(2, home_messages, a_batch(), (("ep", 2),), False) == [8, 8]
    assert on_ranks(2, home_messages, a_batch(), (("ep", 2),), True) == [11, 11]


def kept_for_backward(batch, mesh_sizes, routes_of):
    """Bytes that one layer's forward pass keeps on this rank, and the pairs it computed."""
    module, cfg, specs, _ = M.family("qwen3_moe")
    specs, cfg = {**specs, "layers": specs["layers"][:1]}, msgspec.structs.replace(cfg, num_hidden_layers=1)
    pairs = []

    def counted():
        def wrap(ops, env):
            def combine(y_ND, rows):
                pairs.append(len(y_ND))
                return ops.combine(y_ND, rows)
            return replace(ops, combine=combine)
        return xtf.Transform("counted", 26, wrap)

    def probe(params, batch, ops):
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def share(params, batch, ops):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                return module.loss_and_routing(params, batch, cfg, ops, [routes_of(batch.input_ids)])[0]
        was, swiglu.SMALL = swiglu.SMALL, 0  # so few numbers would go through torch's own backward, which keeps more
        loss, _ = xtf.value_and_grad(share)(params, batch, ops)
        swiglu.SMALL = was
        return sum(kept.values()), pairs[0], loss.item()
    m = shared_mesh(mesh_sizes)
    run = xtf.shard(probe, *([ep("ep")] if mesh_sizes else []), counted(), mesh=m, specs=specs)
    return run(xtf.init(run.specs, 0, run.layout), cut(batch, m))


def evenly(ids_PT):
    """Each token goes to one expert of either half."""
    at_PT = torch.arange(ids_PT.numel()).view(ids_PT.shape) % 2
    return torch.stack([at_PT, 2 + at_PT], -1)


def to_the_first_half(ids_PT):
    return torch.tensor([0, 1]).expand(*ids_PT.shape, 2)


def test_an_even_and_a_lopsided_step_keep_what_the_docs_say():
    """The fullest of R ranks computes R times its even share; a pair keeps D + 3F numbers and its weight; nothing is
    dropped, losses are equal."""
    cfg, batch = M.family("qwen3_moe")[1], a_batch()
    D, width, tokens = cfg.hidden_size, cfg.moe_intermediate_size, int(batch.lengths.sum())
    even = on_ranks(2, kept_for_backward, batch, (("ep", 2),), evenly)
    lopsided = on_ranks(2, kept_for_backward, batch, (("ep", 2),), to_the_first_half)
    assert [pairs for _, pairs, _ in even] == [tokens, tokens]
    assert [pairs for _, pairs, _ in lopsided] == [2 * tokens, 0]
    here = [int(batch.lengths[r::2].sum()) for r in range(2)]
    for (before, _, _), (after, _, _), more, tokens_here in zip(even, lopsided, (tokens, -tokens), here, strict=True):
        # less, for each row that is sent no longer, a byte for each of its 2 ids
        assert after - before == more * (D + 3 * width + 1) * 8 - tokens_here * 2
    for routes, ranks in ((evenly, even), (to_the_first_half, lopsided)):
        alone = kept_for_backward(batch, (), routes)
        assert [loss for *_, loss in ranks] == pytest.approx([alone[2]] * 2, rel=1e-13)


def test_kept_attention_in_two_halves():
    """What remat keeps by name it finds again by counting calls, and those of the first half's choice are not made
    twice."""
    for name in ("qwen3_moe", "deepseek_v3"):
        assert_same(name, Layout((("sp", 2),), ("sp",), overlap=True, remat=("attn_out",)), a_batch(4))
