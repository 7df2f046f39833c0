"""Laws 1 and 10 of the optimizers on real ranks: every layout gives what one process gives, in placements that follow
the parameters'; Muon's matrices are each made orthogonal once, and move as many bytes as the formula says."""
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.flop_counter import FlopCounterMode

import xtf
from tests import outsider
from xtf import tree
from xtf.layout import like, local
from xtf.ops import local_matrices
from xtf.optim import (
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    ema,
    hidden_matrices,
    lion,
    moments,
    muon,
    partition,
    schedules,
    sgd,
)
from xtf.parallel import collectives, fsdp
from xtf.spec import Normal
from xtf.testing import assert_equivalent, layouts, pool
from xtf.testing.laws import shared_mesh
from xtf.transform import Transform

STEPS = 3
SHAPES = {  # uneven rows, stacked experts, wide and tall, a vector and a scalar
    "embed": (("vocab", 31), ("embed", 12)), "q": (("heads", 10), ("embed", 12)), "down": (("embed", 7), ("mlp", 5)),
    "experts": (("expert", 6), ("mlp", 9), ("embed", 12)), "few": (("expert", 2), ("embed", 5), ("mlp", 3)),
    "long": (("embed", 3), ("mlp", 700)), "vector": (("embed", 5),), "scalar": (), "frozen": (("embed", 4), ("mlp", 4))}
mixed = lambda specs: lambda path, p: "muon" if hidden_matrices(specs())(path, p) else "adamw"
exact = partial(muon, dtype=None)
OPTIMIZERS = {
    "adamw": chain(clip_by_global_norm(0.5), adamw(schedules.cosine(1e-2, 9, 0.3))),
    "bf16": adamw(1e-2, moments="bf16"),
    "int8": adamw(1e-2, moments="int8"),
    "sgd": sgd(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "lion": lion(schedules.wsd(1e-3, 9)),
    "muon": chain(clip_by_global_norm(0.5),
                  partition({"muon": exact(1e-2), "adamw": adamw(1e-3)}, mixed(lambda: specs()))),
}


def specs(dtype=torch.float64):
    return {k: xtf.Param(tuple(n for _, n in axes), dtype, tuple(a for a, _ in axes), Normal(0.3),
                         trainable=k != "frozen")
            for k, axes in SHAPES.items()}


def experts_over(axis):
    """As expert parallelism places them: a stack's first dim over an axis."""
    return Transform("experts", 30, claim=lambda p: {axis: 0} if p.axes[:1] == ("expert",) else {})


def columns_over(axis):
    """As row-parallel products place them: the last dim, where even."""
    return Transform("columns", 30, claim=lambda p: {axis: len(p.shape) - 1} if p.axes[-1:] == ("mlp",)
                     and p.shape[-1] % 2 == 0 else {})


LAYOUTS = {
    "dp=4": ((("dp", 4),), lambda: (fsdp("dp"),)),
    "dp=2": ((("dp", 2),), lambda: (fsdp("dp"),)),
    "copies": ((("dp", 4),), lambda: ()),
    "hybrid": ((("replicate", 2), ("dp", 2)), lambda: (fsdp("dp"),)),
    "experts": ((("dp", 2), ("ep", 2)), lambda: (fsdp("dp", "ep"), experts_over("ep"))),
    "experts alone": ((("dp", 2), ("ep", 2)), lambda: (experts_over("ep"),)),
    "columns": ((("dp", 2), ("tp", 2)), lambda: (fsdp("dp"), columns_over("tp"))),
}


def sharded(name, dtype=torch.float64):
    sizes, transforms = LAYOUTS[name]
    step = xtf.shard(lambda state, batch, ops=xtf.LOCAL: (state, {}), *transforms(), mesh=shared_mesh(sizes),
                     specs=specs(dtype))
    return step, xtf.init(step.specs, 0, step.layout)


def grads_at(i, layout, dtype=torch.float64):
    g = torch.Generator().manual_seed(i)
    whole = {k: None if k == "frozen" else torch.randn([n for _, n in axes], generator=g, dtype=dtype)
             for k, axes in SHAPES.items()}
    return whole if layout is None else tree.tree_map(lambda x, place: x if x is None else place.put(x), whole, layout)


def parts_apart(fn, leaves):
    """A planted mistake: every rank makes its own parts orthogonal."""
    return [like(y, x) for y, x in zip(local_matrices(fn, [local(x) for x in leaves]), leaves, strict=True)]


def run(tx, name, dtype=torch.float64, **mistake):
    """Three steps on this rank: whole parameters, whole state and their average; placements of the latter are looked
    at."""
    moments.LEAST, moments.BLOCK = 32, 64  # so that small leaves have several blocks, which ranks cut in two
    if name is None:
        ops, layout, params = xtf.LOCAL, None, xtf.init(specs(dtype), 0)
    else:
        step, params = sharded(name, dtype)
        ops, layout = replace(step.ops, **mistake), step.layout
    state, average = tx.init(params), ema(0.9).init(params)
    for i in range(STEPS):
        updates, state = tx.update(grads_at(i, layout, dtype), state, params, ops)
        assert all(u is None or placed(u) == placed(p)
                   for u, p in zip(tree.leaves(updates), tree.leaves(params), strict=True))
        params = apply_updates(params, updates)
        average = ema(0.9).update(average, params, ops)
    if name is not None:
        for path, x in tree.flatten_with_path((state, average)):
            key = next((k for k in SHAPES if k in path.split(".")), None)
            if key and x is not None:
                want = [Replicate() if path.endswith("scales") and p == Shard(len(SHAPES[key]) - 1) else p
                        for p in params[key].placements]
                assert isinstance(x, DTensor) and list(x.placements) == want, path
                assert x.device_mesh == params[key].device_mesh, path
    whole = lambda x: x.detach().full_tensor() if isinstance(x, DTensor) else x
    return tree.tree_map(whole, (params, state, average))


def placed(x):
    return (x.device_mesh, x.placements, x.shape, x.dtype) if isinstance(x, DTensor) else (x.shape, x.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tx", OPTIMIZERS)
def test_any_layout_is_one_process(tx, layout):
    size = math.prod(n for _, n in LAYOUTS[layout][0])
    alone = pool(1).run(run, OPTIMIZERS[tx], None)[0]
    for ours in pool(size).run(run, OPTIMIZERS[tx], layout):
        for (path, a), b in zip(tree.flatten_with_path(ours), tree.leaves(alone), strict=True):
            if a is not None and not path.endswith("codes"):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}")
            elif a is not None:
                assert torch.equal(a, b), path


def test_parts_made_orthogonal_apart_are_caught():
    alone = pool(1).run(run, OPTIMIZERS["muon"], None)[0][0]
    ours = pool(2).run(partial(run, matrices=parts_apart), OPTIMIZERS["muon"], "dp=2")[0][0]
    assert torch.equal(ours["frozen"], alone["frozen"]) and (ours["q"] - alone["q"]).abs().max() > 1e-3


EVEN = {"q": (("heads", 8), ("embed", 12)), "tall": (("mlp", 16), ("embed", 4)),
        "experts": (("expert", 6), ("mlp", 8), ("embed", 4))}


def cost(name):
    """One update of Muon on this rank: (what was sent, FLOPs)."""
    leaves = {k: xtf.Param(tuple(n for _, n in axes), torch.float64, tuple(a for a, _ in axes), Normal(1.0))
              for k, axes in EVEN.items()}
    sizes, transforms = LAYOUTS[name] if name else ((), tuple)
    step = xtf.shard(lambda state, batch, ops=xtf.LOCAL: (state, {}), *transforms(),
                     mesh=shared_mesh(sizes) if name else None, specs=leaves)
    params = xtf.init(leaves, 0, step.layout)
    tx = muon(1e-2, dtype=None)
    with collectives.record() as sent, FlopCounterMode(display=False) as counter:
        tx.update(tree.tree_map(torch.clone, params), tx.init(params), params, step.ops)
    return sent, counter.get_total_flops()


# for each leaf: into how many parts a matrix is cut, and how often it is stored
CUTS = {"dp=4": ((4, 1), (4, 1), (4, 1)), "dp=2": ((2, 1), (2, 1), None), "copies": ((1, 4), (1, 4), (1, 4)),
        "hybrid": ((2, 2), (2, 2), (1, 2)), "experts": ((4, 1), (4, 1), (2, 1)),
        "experts alone": ((1, 4), (1, 4), (1, 2))}


@pytest.mark.parametrize("layout", CUTS)
def test_each_matrix_is_done_once_and_moves_the_bytes_of_the_formula(layout):
    ranks = pool(math.prod(n for _, n in LAYOUTS[layout][0])).run(cost, layout)
    want = sum(math.prod(n for _, n in axes) * 8 * ((W - 1) + (R * W - 1)) // W
               for axes, (W, R) in ((axes, cut) for axes, cut in zip(EVEN.values(), CUTS[layout], strict=True) if cut))
    got = Counter()
    for sent, _ in ranks:
        for s in sent:
            got[s.kind] += s.bytes
    assert got == {"all_to_all": want}
    flops = [flops for _, flops in ranks]
    assert sum(flops) == cost(None)[1] > 0
    assert max(flops) < 0.8 * sum(flops)                                 # nobody does it all


MUON = chain(clip_by_global_norm(0.5),
             partition({"muon": exact(1e-2), "adamw": adamw(1e-3)}, mixed(lambda: outsider.specs())))


def step(state, batch, ops=xtf.LOCAL):
    """The outsider's step with Muon, and the extras that recipes pass."""
    num_tokens = batch.loss_tokens(ops)

    def share(params, batch, ops):
        return (outsider.nll(params, batch, ops) * batch.loss_mask).sum() / num_tokens
    loss, grads = xtf.value_and_grad(share)(state.params, batch, ops)
    norm = ops.norm(grads)
    updates, opt = MUON.update(grads, state.opt, state.params, ops, norm=norm, ok=norm.isfinite())
    return state.apply(updates, opt), {"loss": loss}


def test_a_step_with_muon_on_any_layout():
    """float64's 1e-16 over some hundred terms, and the quintic's slope of 3.4445^5 at most."""
    assert_equivalent(step, layouts(4), examples=15, tolerance=1e-16 * 200 * 485, specs=outsider.specs(),
                      opt=MUON, vocab_size=outsider.V)
