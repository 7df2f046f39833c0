"""Memory of collectives: what died or was overwritten before it was sent is named, in small and in a step of xtf's."""
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests import outsider
from tests.dist.test_schedule import batch
from tests.laws import moe_model
from xtf import device
from xtf.parallel import _fsdp
from xtf.parallel import collectives as C
from xtf.testing import Layout, pool
from xtf.testing.laws import run_layout

READ = [3.0, 4.0]
# torch 2.13 renamed both; 2.11 has the old names alone
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sound():
    """Every kind of collective, its memory kept until it is waited for."""
    rank, W = dist.get_rank(), dist.get_world_size()
    x, parts, flat = torch.tensor(READ), torch.empty(2 * W), torch.empty(2)
    dist.all_reduce(x)
    whole = torch.arange(2.0 * W)
    works = [gather(parts, torch.full((2,), float(rank)), async_op=False),
             scatter(flat, whole, async_op=True)]
    seen_early = flat.isnan().all().item()
    works[1].wait()
    ids = torch.tensor([rank * 10 + i for i in range(W)])
    came = torch.empty_like(ids)
    dist.all_to_all_single(came, ids)
    told = [None] * W
    dist.all_gather_object(told, {"rank": rank})
    return x.tolist(), parts.tolist(), seen_early, flat.tolist(), came.tolist(), [t["rank"] for t in told]


def test_collectives_are_what_they_are():
    for rank, (x, parts, early, flat, came, told) in enumerate(pool(3, late=True).run(sound)):
        assert x == [9.0, 12.0] and parts == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0] and early
        assert flat == [3.0 * (2 * rank), 3.0 * (2 * rank + 1)]
        assert came == [10 * i + rank for i in range(3)] and told == [0, 1, 2]


def dropped_input():
    out = torch.empty(2, dtype=torch.int64)
    work = dist.all_to_all_single(out, torch.tensor([1, 2]), async_op=True)
    work.wait()


def overwritten_input():
    x, out = torch.ones(4), torch.empty(8)
    work = gather(out, x, async_op=True)
    x.zero_()
    work.wait()


def output_in_use():
    x, out = torch.ones(4), torch.empty(2)
    work = scatter(out, x, async_op=True)
    out.add_(1).copy_(torch.zeros(2))
    work.wait()


def one_of_many_died():
    """As a bucket whose second part is a temporary."""
    outs = [torch.empty(4), torch.empty(6)]
    work = dist.group.WORLD.allgather_into_tensor_coalesced(outs, [torch.ones(2), torch.ones(3)])
    work.wait()


@pytest.mark.parametrize("fault, said", [
    (dropped_input,
     r"all_to_all over 2 ranks, started in dropped_input \(test_late.py:\d+\): its input int64 \[2\] died"),
    (overwritten_input, r"started in overwritten_input .*input float32 \[4\] was overwritten before it was sent"),
    (output_in_use, r"started in output_in_use .*its output float32 \[2\] was written to before it arrived"),
    (one_of_many_died, r"all_gather .*its input float32 \[2\] died.*its input float32 \[3\] died"),
])
def test_what_is_gone_is_named(fault, said):
    with pytest.raises(RuntimeError, match=said):
        pool(2, late=True).run(fault)


# ---- in a step -------------------------------------------------------------------------------------------------------

def forgets_counts(mp):
    """Counts whose input is let go of when the copying stream waits for them, not when the host does."""
    right = device.host_copy
    mp.setattr(device, "host_copy", lambda make, work, keep, where: right(make, work, None, where))


def forgets_parts(mp):
    """Gathers that do not hold what they read."""
    right = C.gather_start

    def gather_start(outs, parts, group):
        work = right(outs, parts, group)
        parts.clear()
        return work
    mp.setattr(C, "gather_start", gather_start)


def reuses_the_buffer(mp):
    """Gradients written over while their reduce-scatter is under way."""
    right = C.scatter_start

    def scatter_start(outs, wholes, group):
        work = right(outs, wholes, group)
        for whole in wholes:
            whole.zero_()
        return work
    mp.setattr(C, "scatter_start", scatter_start)


def does_not_wait(mp):
    """Weights that are used before they are there: memory is sound, the numbers are not."""
    mp.setattr(_fsdp.Bucket, "wait", lambda self: None)


def one_step(fault, step, specs, opt, layout, given, extra=None):
    mp = pytest.MonkeyPatch()
    if fault is not None:
        fault(mp)
    try:
        grads, metrics, _ = run_layout(step, specs, opt, layout, given, 0, 1, extra)
        return metrics["loss"].item(), all(bool(g.values.isfinite().all()) for g in grads)
    finally:
        mp.undo()


def dense(layout, fault=None):
    return pool(layout.num_ranks, late=True).run(one_step, fault, outsider.step, outsider.specs(), outsider.opt, layout,
                                                 batch())


def experts(layout, fault=None):
    _, _, specs, extra = moe_model.family("qwen3_moe")
    return pool(layout.num_ranks, late=True).run(one_step, fault, partial(moe_model.step, name="qwen3_moe"), specs,
                                                 moe_model.opt, layout, batch(), extra)


@pytest.mark.parametrize("run, layout, fault, said", [
    (dense, Layout((("dp", 2),), ("dp",)), forgets_parts, r"all_gather .*input float64 .*died before it was sent"),
    (dense, Layout((("dp", 2),), ("dp",)), reuses_the_buffer,
     r"reduce_scatter .*input float64.*overwritten before it was"),
    (experts, Layout((("ep", 2),), experts="ep"), forgets_counts, r"all_to_all .*_ep.py.*input int64 .*died before"),
])
def test_a_mistake_in_a_step_is_named(run, layout, fault, said):
    assert run(layout)[0][1]
    with pytest.raises(RuntimeError, match=said):
        run(layout, fault)


def test_what_is_not_waited_for_is_nan():
    assert not any(finite for _, finite in dense(Layout((("dp", 2),), ("dp",)), does_not_wait))
