"""Gradients are added up in one tree over micro-batches; what wraps `value_and_grad` or `collect` knows where it is."""
from dataclasses import replace

import pytest
import torch

import xtf
from tests import outsider
from xtf import models, plan
from xtf.layout import local
from xtf.ops import LOCAL
from xtf.testing import Layout, pool
from xtf.testing.laws import shared_mesh

PARAMS = {"w": torch.arange(3.0).requires_grad_(), "frozen": torch.ones(3),
          "unused": torch.ones(2, requires_grad=True)}
X = torch.arange(12.0).view(4, 3)


def share(p, x, ops):
    return ((p["w"] * p["frozen"] * x) ** 2).sum()


def by_hand(k=1):
    w = PARAMS["w"].detach().requires_grad_()
    return torch.autograd.grad(((w * X) ** 2).sum(), w)[0]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_sum_over_micro_batches_is_the_gradient(k):
    _, grads = xtf.microbatch(xtf.value_and_grad(share), k)(PARAMS, X)
    torch.testing.assert_close(grads["w"], by_hand())
    assert grads["frozen"] is None and grads["unused"].tolist() == [0, 0]
    assert all(x.grad is None for x in PARAMS.values())


def test_before_the_last_micro_batch_there_are_none():
    seen = []

    def vg(params, batch, ops=LOCAL):
        value, grads = xtf.value_and_grad(share)(params, batch, ops)
        seen.append((ops.into.last, grads is None))
        return value, grads
    _, grads = xtf.microbatch(vg, 4)(PARAMS, X)
    assert seen == [(False, True)] * 3 + [(True, False)]
    torch.testing.assert_close(grads["w"], by_hand())


def test_a_micro_batchs_ops_are_those_of_all():
    """`jit` finds a block's compiled form by the `ops` in it: one for all micro-batches and steps."""
    seen = set()
    xtf.microbatch(xtf.value_and_grad(lambda p, x, ops: seen.add(ops) or share(p, x, ops)), 4)(PARAMS, X)
    assert seen == {LOCAL}


def test_trees_that_a_function_returns_each_time_are_added():
    vg = lambda params, batch, ops=LOCAL: xtf.value_and_grad(share)(params, batch)           # it passes no ops on
    torch.testing.assert_close(xtf.microbatch(vg, 2)(PARAMS, X)[1]["w"], by_hand())
    inner = xtf.microbatch(xtf.value_and_grad(share), 2)
    torch.testing.assert_close(xtf.microbatch(inner, 2)(PARAMS, X)[1]["w"], by_hand())       # within another


def test_two_losses_have_a_tree_each():
    def both(params, batch, ops=LOCAL):
        value, a = xtf.value_and_grad(share)(params, batch, ops)
        _, b = xtf.value_and_grad(lambda p, x, ops: (p["w"] * x).sum())(params, batch, ops)
        return value, a if a is None else {k: a[k] if a[k] is None else a[k] - 0.5 * b[k] for k in a}
    _, grads = xtf.microbatch(both, 2)(PARAMS, X)
    torch.testing.assert_close(grads["w"], by_hand() - 0.5 * X.sum(0))


def test_parameters_that_are_made_anew_for_each_micro_batch():
    """As in fake quantisation: the gradients are added all the same."""
    vg = lambda params, batch, ops=LOCAL: xtf.value_and_grad(share)(
        {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in params.items()}, batch, ops)
    torch.testing.assert_close(xtf.microbatch(vg, 4)(PARAMS, X)[1]["w"], by_hand())


def test_a_gradient_that_two_leaves_share_is_not_added_to_twice():
    """Views of one gradient, which autograd gives to both leaves without a copy."""
    params = {k: torch.ones(2, 2, requires_grad=True) for k in "ab"}
    both = lambda p, x, ops: ((p["a"].view(4) + p["b"].view(4)) * x.sum(0)).sum()
    x = torch.arange(16.0).view(4, 4)
    for k in (1, 2, 4):
        _, grads = xtf.microbatch(xtf.value_and_grad(both), k)(params, x)
        assert grads["a"].flatten().tolist() == grads["b"].flatten().tolist() == x.sum(0).tolist()


def wrapped(before):
    """A transform whose `collect` doubles gradients, before or after the inner one."""
    def wrap(ops, env):
        double = lambda grads: [None if g is None else 2 * g for g in grads]
        if before:
            return replace(ops, collect=lambda grads, leaves: ops.collect(double(grads), leaves))
        return replace(ops, collect=lambda grads, leaves: double(ops.collect(grads, leaves)))
    return xtf.Transform("double", 90, wrap)


def on_ranks(layout, k, before=None):
    """This rank's parts of the gradients of outsider's loss, with or without such a transform."""
    from tests.dist.test_schedule import batch
    from xtf.data.batch import cut
    mesh = shared_mesh(layout.mesh)

    def step(params, batch, ops=LOCAL):
        loss = lambda p, b, ops: (outsider.nll(p, b, ops) * b.loss_mask).sum()
        return xtf.microbatch(xtf.value_and_grad(loss), k)(params, batch, ops)[1]
    more = () if before is None else (wrapped(before),)
    run = xtf.shard(step, *layout.transforms(), *more, mesh=mesh, specs=outsider.specs())
    grads = run(xtf.init(run.specs, 0, run.layout), cut(batch(4 * k), mesh))
    return [local(g).clone() for g in xtf.tree.leaves(grads)]


@pytest.mark.parametrize("layout", [Layout((("replicate", 2),)), Layout((("replicate", 2), ("dp", 2)), ("dp",))])
def test_a_wrapped_collect_sees_each_gradient_once(layout):
    ranks = pool(layout.num_ranks, late=True)
    plain, doubled = ranks.run(on_ranks, layout, 2), ranks.run(on_ranks, layout, 2, False)
    for a, b in zip(plain, doubled, strict=True):
        assert all(torch.equal(2 * x, y) for x, y in zip(a, b, strict=True))


def test_what_is_under_way_is_not_replaced_in_silence():
    with pytest.raises(RuntimeError, match=r"a transform's `collect` replaced the gradient of leaf \d+, .*; change"):
        pool(2, late=True).run(on_ranks, Layout((("replicate", 2),)), 2, True)


DENSE = {"model_type": "qwen3", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
         "tie_word_embeddings": False}


@pytest.mark.parametrize("sizes", [
    {"replicate": 4}, {"replicate": 2, "dp": 2}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({}, {"dp": 4}))],
                         ids=str)
def test_one_tree_of_gradients_at_any_number_of_micro_batches(sizes):
    """More micro-batches than one keep one copy of this rank's gradients while the buckets are in flight, which one
    micro-batch has only at its end; and no more than that at any number."""
    cfg = models.qwen3.config(DENSE)
    measured = {k: plan.measure(models.qwen3, cfg, sizes, seq_len=16, packs=k, dtype="fp32", remat_=True)
                for k in (1, 2, 5)}
    copy = measured[1].parameters * 4 // sizes.get("dp", 1)
    peaks = [measured[k].peak for k in (1, 2, 5)]
    assert abs(peaks[2] - peaks[1]) < 0.01 * copy and 0 <= peaks[1] - peaks[0] < 1.01 * copy
    if "dp" not in sizes:                                            # there whole gradients are what is summed
        assert peaks[2] - peaks[0] < 0.01 * copy
    reduced = {sum(m.bytes for m in measured[k].messages if m.kind == "all_reduce" and m.bytes > 1000)
               for k in (1, 2, 5)}
    assert len(reduced) == 1
