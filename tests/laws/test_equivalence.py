"""Laws 1 to 5 on a user's model and step: any layout is the same function; planted mistakes are caught, shrunk and
named."""
import re
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import find
from hypothesis.errors import NoSuchExample
from torch.distributed.tensor import DTensor, Partial, Replicate

import xtf
from tests import outsider
from xtf import tree
from xtf.data.batch import Batch
from xtf.layout import local
from xtf.parallel import ep, fsdp, ulysses
from xtf.testing import Layout, assert_equivalent, layouts, token_batches
from xtf.transforms import bf16, fp64, jit, lora, overlap, remat

USER = {"specs": outsider.specs(), "opt": outsider.opt, "vocab_size": outsider.V}


def test_any_layout_is_the_same_function():
    assert_equivalent(outsider.step, layouts(4), examples=60, tolerance=1e-12, **USER)


@pytest.mark.slow
def test_any_layout_is_the_same_function_at_length():
    assert_equivalent(outsider.step, layouts(8), examples=500, tolerance=1e-12, **USER)


def test_microbatches_are_the_whole_batch():
    """Law 4, with two and more packs a rank."""
    packs = lambda layout: token_batches(outsider.V)(replace(layout, mesh=(*layout.mesh, ("dp", 2))
                                                             if "dp" not in layout.sizes else layout.mesh))
    even = lambda layout: packs(layout).filter(lambda b: b.input_ids.shape[0] % (2 * layout.pack_ranks) == 0)
    assert_equivalent(partial(outsider.step, k=2), layouts(4), reference=outsider.step, batches=even, examples=15,
                      tolerance=1e-12, specs=USER["specs"], opt=USER["opt"])


@pytest.mark.parametrize("store", [(), ("dp",)])
def test_compiled_blocks_are_the_same_function(store):
    """Law 5 under fullgraph compilation, with saved views and with the all-to-alls of ulysses inside the graph."""
    compiled = [Layout((("dp", 2),), store, compile=True, donate=True),
                Layout((("sp", 2),), ("sp",) if store else (), compile=True)]
    for layout in compiled:
        assert_equivalent(outsider.step, [layout], batches=token_batches(outsider.V, max_packs=1, max_len=4),
                          examples=2, tolerance=1e-12, specs=USER["specs"], opt=USER["opt"])


def failure(step, drawn, **kw) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(step, drawn, examples=40, tolerance=1e-12, **{**USER, **kw})
    return str(caught.value)


def test_a_mean_of_means_shrinks_to_the_smallest_mesh_and_batch():
    start = time.monotonic()
    message = failure(partial(outsider.step, mean=True), layouts(4))
    assert time.monotonic() - start < 60
    assert re.search(r"gradient of (embed|layers\.\d)\S* differs", message), message
    sizes = re.search(r"mesh=\((.*?)\), store", message)[1]
    assert re.fullmatch(r"\('\w+', 2\),", sizes), f"not the smallest mesh: {sizes}"
    packs, length = map(int, re.search(r"input_ids \((\d+), (\d+)\)", message).groups())
    assert packs <= 2 and length <= 4, message


def hand_gather(grad_placements):
    """A transform that gathers by DTensor's own means in `use`; without Partial gradients the loss is right and the
    gradients wrong."""
    def wrap(ops, env):
        def gathered(p):
            if not isinstance(p, DTensor):
                return p
            d = DTensor.from_local(local(p), p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                   stride=p.stride())
            d = d.redistribute(placements=[Replicate()] * p.device_mesh.ndim)
            return d.to_local(grad_placements=[Partial()] * p.device_mesh.ndim if grad_placements else None)
        return replace(ops, use=lambda fn, params, *args: fn(tree.tree_map(gathered, params), *args))
    return xtf.Transform("hand_gather", 15, wrap)


DP2 = Layout((("dp", 2),), ("dp",))


def test_a_gather_by_hand_with_its_grad_placements_is_right():
    assert_equivalent(outsider.step, [replace(DP2, extra=(partial(hand_gather, True),))], examples=4, **USER)


def test_a_dropped_grad_placements_is_caught():
    message = failure(outsider.step, [replace(DP2, extra=(partial(hand_gather, False),))])
    assert "gradient of embed.weight" in message



def test_a_missing_sum_over_sp_is_caught():
    class Forgetful(Layout):
        def transforms(self):
            return fsdp("sp"), replace(ulysses("sp"), tokens=())
    assert "differs" in failure(outsider.step, [Forgetful((("sp", 2),))])


def test_unscaled_microbatches_are_caught():
    even = lambda layout: token_batches(outsider.V)(layout).filter(lambda b: b.input_ids.shape[0] == 2
                                                                   and b.loss_mask.sum() > 2)
    kw = {"specs": USER["specs"], "opt": USER["opt"], "batches": even, "vocab_size": None}
    assert "differs" in failure(partial(outsider.step, k=2, mean=True), [Layout()], reference=outsider.step, **kw)


def test_frozen_uneven_and_tiny_leaves():
    """Everything but the second layer frozen; widths that two ranks do not divide are in the model (V = 13)."""
    specs = tree.map_with_path(lambda path, p: replace(p, trainable=path.startswith("layers.1")), outsider.specs())
    assert_equivalent(outsider.step, layouts(4), examples=12, tolerance=1e-12, **{**USER, "specs": specs})


def freeze():
    """A user's transform, before fsdp: everything but the second layer stays as it is."""
    frozen = lambda path, p: replace(p, trainable=path.startswith("layers.1"))
    return xtf.Transform("freeze", 5, specs=lambda specs: tree.map_with_path(frozen, specs))


def louder(stage):
    """A user's transform of products, at any stage: another function, on one process too."""
    def wrap(ops, env):
        return replace(ops, linear=lambda x, node, axes: 1.5 * ops.linear(x, node, axes))
    return xtf.Transform("louder", stage, wrap)


def narrow():
    """A user's precision: products by weights rounded to float32 in a float64 model, gradients straight through."""
    rounded = lambda w: w + (w.float().to(w.dtype) - w).detach()
    return xtf.Transform("narrow", xtf.Stage.PRECISION, wrap=lambda ops, env: replace(
        ops, linear=lambda x, node, axes: ops.linear(x, {k: rounded(w) for k, w in node.items()}, axes)))


@pytest.mark.parametrize("extra", [(freeze,), *((partial(louder, stage),) for stage in (0, 7, 15, 33, 45, 70)),
                                   (narrow, freeze, partial(louder, 31))])
def test_what_needs_no_mesh_is_a_part_of_the_function(extra):
    """Whatever its stage: the one process that layouts are compared with is given it too."""
    assert not any(f().needs_mesh for f in extra)
    drawn = layouts(6).map(lambda layout: replace(layout, extra=extra))
    assert_equivalent(outsider.step, drawn, examples=4, tolerance=1e-12, **USER)
    run = xtf.shard(outsider.step, *[f() for f in extra], specs=USER["specs"])
    if freeze in extra:
        assert {p.trainable for path, p in tree.flatten_with_path(run.specs) if "layers.1" not in path} == {False}


def test_what_places_leaves_is_no_part_of_it():
    assert all(t.needs_mesh for t in (fsdp("dp"), ulysses("sp"), ep("ep")))
    assert not any(t.needs_mesh for t in (bf16(), fp64(), jit(), lora(2), overlap(), remat()))


def test_layouts_of_three_and_six_ranks_are_drawn():
    drawn = lambda wanted, **kw: find(layouts(8, **kw), lambda layout: layout.num_ranks == wanted)
    assert [drawn(n).num_ranks for n in (1, 2, 3, 4, 6, 8)] == [1, 2, 3, 4, 6, 8]
    assert drawn(6, axes=["sp"], max_sp=12).sizes == {"sp": 6}
    with pytest.raises(NoSuchExample):
        drawn(3, axes=["sp"], max_sp=4)                      # three ranks do not divide four heads


def test_a_step_without_tokens_changes_nothing_by_the_loss():
    def batches(layout):
        return token_batches(outsider.V)(layout).map(lambda b: replace(b, loss_mask=torch.zeros_like(b.loss_mask)))
    assert_equivalent(outsider.step, [DP2], batches=batches, examples=2, specs=USER["specs"], opt=USER["opt"])


def test_compiled_blocks_in_bf16():
    """One step of the tiny model in bf16, compiled and not: to a few roundings of 8 bits."""
    batch = find_batch()
    losses = []
    for more in ((), (jit(donate=False),)):
        step = xtf.shard(outsider.step, bf16(), *more, specs=outsider.specs(torch.float32))
        params = xtf.init(step.specs)
        losses.append(step(xtf.TrainState.create(params, outsider.opt.init(params)), batch)[1]["loss"])
    assert abs(losses[0] / losses[1] - 1) < 2 ** -7


def find_batch():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(outsider.V, (2, 8), generator=g)
    return Batch(ids, ids.roll(-1, 1), torch.ones(2, 8), torch.arange(8).expand(2, 8),
                 torch.tensor([[0, 8, 8]] * 2, dtype=torch.int32))
