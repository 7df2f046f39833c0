"""Adapters on real ranks: any layout is the same function, only adapters' gradients travel, and merging and PEFT's
files are one process's."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import xtf
from tests import outsider
from tests.laws import moe_model as M
from xtf import hf, peft, tree
from xtf.data import Batch
from xtf.data.batch import cut
from xtf.parallel import collectives, ep, fsdp
from xtf.spec import Normal
from xtf.testing import Layout, assert_equivalent, layouts, pool, token_batches
from xtf.testing.laws import shared_mesh
from xtf.transforms._lora import B, base, join, lora, merge

USER = {"specs": outsider.specs(), "opt": outsider.opt, "vocab_size": outsider.V}


def learnt(*args, **kwargs):
    """`lora` with a B that is not zero, so that A has gradients from the first step on."""
    t = lora(*args, **kwargs)
    drawn = lambda path, p: replace(p, init=Normal(0.3)) if path.endswith(B) else p
    return replace(t, specs=lambda specs: tree.map_with_path(drawn, t.specs(specs)))


def adapted(*args):
    return lambda layout: replace(layout, extra=(partial(learnt, *args),))


def test_any_layout_is_the_same_function():
    assert_equivalent(outsider.step, layouts(4).map(adapted(3)), examples=8, tolerance=1e-12, **USER)


@pytest.mark.slow
def test_any_layout_is_the_same_function_at_length():
    assert_equivalent(outsider.step, layouts(8).map(adapted(3)), examples=100, tolerance=1e-12, **USER)


def test_layers_without_adapters():
    """The first layer has none, so nothing flows back through it; the second has some beside products that have
    none."""
    assert_equivalent(outsider.step, layouts(4).map(adapted(2, None, ["layers.1.o", "layers.1.qkv.k"])), examples=4,
                      tolerance=1e-12, **USER)


@pytest.mark.slow
def test_compiled_blocks_are_the_same_function():
    layout = adapted(2)(Layout((("dp", 2),), ("dp",), compile=True, donate=True))
    assert_equivalent(outsider.step, [layout], examples=1, tolerance=1e-12, **USER)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_live_with_them(name):
    """Over ep, stored further over dp: against one process, and beside attention's."""
    _, _, specs, extra = M.family(name)
    layout = adapted(2)(Layout((("dp", 2), ("ep", 2)), ("dp", "ep"), experts="ep"))
    batches = token_batches(M.VOCAB, max_packs=1)
    assert_equivalent(partial(M.step, name=name), [layout], batches=batches, examples=2, tolerance=1e-11, specs=specs,
                      opt=M.opt, extra=extra)


def sent_by_a_step(*transforms):
    """(bytes that this rank sent in reduce-scatters, bytes of its padded parts of all trainable leaves)."""
    step = xtf.shard(outsider.step, fsdp("dp"), *transforms, mesh=shared_mesh((("dp", 2),)),
                     specs=outsider.specs(torch.float32))
    params = xtf.init(step.specs, 0, step.layout)
    ids = torch.arange(16).view(2, 8) % outsider.V
    batch = cut(Batch(ids, ids, torch.ones(2, 8), ids, torch.tensor([[0, 8]] * 2, dtype=torch.int32)), step.mesh)
    with collectives.record() as sent:
        step(xtf.TrainState.create(params, outsider.opt.init(params)), batch)
    part = 0
    for (path, p), place in zip(tree.flatten_with_path(step.specs), tree.leaves(step.layout), strict=True):
        rows = p.shape[place.placements[0].dim]
        # the tied head
        part += p.trainable * 4 * -(-rows // 2) * (math.prod(p.shape) // rows) * (2 if path == "embed.weight" else 1)
    return sum(s.bytes for s in sent if s.kind == "reduce_scatter"), part


@pytest.mark.parametrize("transforms", [(), (lora(2),)])
def test_only_gradients_of_adapters_travel(transforms):
    for sent, trainable in pool(2).run(sent_by_a_step, *transforms):
        assert sent == trainable > 0


def files_of(out, name, mesh):
    """Save, load, merge and begin on this rank's layout; whole leaves that differ from what they should be."""
    module, cfg, specs, _ = M.family(name)
    t, names = learnt(3, 5.0), module.names(cfg)
    m = shared_mesh(mesh) if mesh else None
    run = xtf.shard(M.step, t, *((fsdp("dp"), ep("ep")) if mesh else ()), mesh=m, specs=specs)
    params = xtf.init(run.specs, 0, run.layout)
    peft.save(out / "adapter", params, names, t)
    hf.save(out / "base", base(params), names)
    hf.save(out / "merged", merge(params, t), names)
    loaded = join(base(params), peft.load(out / "adapter", run.specs, names, t, run.layout))
    begun = peft.start(out / "base", run.specs, names, run.layout)
    local = lambda x: (x._local_tensor if isinstance(x, DTensor) else x).detach()
    return [path for (path, x), *others in zip(tree.flatten_with_path(params), *map(tree.leaves, (loaded, begun)),
                                               strict=True)
            if not all(torch.equal(local(x), local(y)) and x.requires_grad == y.requires_grad for y in others)]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_files_and_merging_on_any_layout(tmp_path, name):
    assert files_of(tmp_path / "one", name, ()) == []
    assert pool(4).run(files_of, tmp_path / "four", name, (("dp", 2), ("ep", 2))) == [[]] * 4
    for folder, file in (("adapter", peft.FILE), ("merged", "model.safetensors")):
        one, four = (load_file(tmp_path / ranks / folder / file) for ranks in ("one", "four"))
        assert one.keys() == four.keys()
        for key, x in one.items():  # merged on parts: the same sums, of rank 3, in another order at most
            same = torch.equal if folder == "adapter" else partial(torch.allclose, rtol=1e-14, atol=1e-15)
            assert same(x, four[key]), key
    config = lambda ranks: (tmp_path / ranks / "adapter" / peft.CONFIG).read_text()
    assert config("one") == config("four")
    plain = load_file(tmp_path / "one/base/model.safetensors")
    assert any(not torch.equal(x, plain[key]) for key, x in one.items())
