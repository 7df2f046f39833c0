"""The lora transform: what it adds and freezes, that it is the formula, and that merging and bf16 bases are exact."""
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import xtf
from tests import outsider
from xtf import models, tree
from xtf.data.batch import Batch
from xtf.parallel import fsdp
from xtf.spec import Normal, Param, num_params
from xtf.transforms import bf16
from xtf.transforms._lora import A, B, adapters, base, join, lora, merge

SIZE = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
MOE = {**SIZE, "moe_intermediate_size": 6, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
DENSE, SPARSE = models.qwen3.config(SIZE), models.qwen3_moe.config(MOE)


def batch(seed=0, packs=2, length=12):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(37, (packs, length), generator=g)
    return Batch(ids, ids.roll(-1, 1), torch.ones(packs, length), torch.arange(length).expand(packs, length),
                 torch.tensor([[0, 5, length]] * packs, dtype=torch.int32))


def drawn(specs, seed=0):
    """Parameters whose adapters all do something."""
    return xtf.init(tree.map_with_path(lambda path, p: replace(p, init=Normal(0.3)) if path.endswith(B) else p, specs),
                    seed)


def adapted(t, model=models.qwen3, cfg=DENSE, dtype=torch.float32):
    """(ops, parameters) of a model with this transform."""
    run = xtf.shard(lambda state, batch, ops: None, t, specs=model.specs(cfg, dtype))
    return run.ops, drawn(run.specs)


def test_products_gain_adapters_and_all_else_is_frozen():
    specs = lora(3).specs(models.qwen3_moe.specs(SPARSE))
    layer = specs["layers"][1]
    described = lambda node: [(p.shape, p.axes) for p in (node[A], node[B])]
    assert described(layer["k"]) == [((3, 16), ("rank", "embed")), ((8, 3), ("kv_heads", "rank"))]
    down = layer["experts"]["down"]
    assert described(down) == [((4, 3, 6), ("expert", "rank", "mlp")), ((4, 16, 3), ("expert", "embed", "rank"))]
    trainable = {path for path, p in tree.flatten_with_path(specs) if p.trainable}
    assert trainable == {path for path, _ in tree.flatten_with_path(specs) if path.endswith((A, B))}
    assert not any(path.startswith(("embed", "head", "norm")) or ".router." in path for path in trainable)
    assert num_params(specs, trainable_only=True) == 2 * 3 * (2 * (16 + 16) + 2 * (16 + 8) + 4 * 3 * (16 + 6))


@pytest.mark.parametrize("targets, nodes", [
    (("q", "v"), {"layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"}),
    (("layers.1.experts",), {"layers.1.experts.gate", "layers.1.experts.up", "layers.1.experts.down"}),
    (("experts.up", "layers.0.o"), {"layers.0.experts.up", "layers.1.experts.up", "layers.0.o"}),
])
def test_targets_are_paths_or_parts_of_them(targets, nodes):
    leaves = tree.flatten_with_path(adapters(lora(2, targets=targets).specs(models.qwen3_moe.specs(SPARSE))))
    assert {path.rpartition(".")[0] for path, _ in leaves} == nodes


@pytest.mark.parametrize("make, message", [
    (lambda s: lora(0), "rank and alpha must be positive, got rank=0"),
    (lambda s: lora(2, alpha=-1.0), "rank and alpha must be positive, got rank=2, alpha=-1.0"),
    (lambda s: lora(2, targets=["q", "head", "gat"]).specs(s),
     r"targets \['gat', 'head'\] name no product; the .*are layers.\*.down,"),
    (lambda s: lora(2).specs({"norm": s["norm"]}), "the specs have no product to adapt"),
])
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(models.qwen3.specs(DENSE))


def test_it_is_the_formula():
    """Beside plain matrices, values and gradients, dense and grouped, with biases."""
    ops = lora(2, alpha=3.0).wrap(xtf.LOCAL, None)  # pyright: ignore
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    x, offsets = draw(7, 5), torch.tensor([3, 3, 6])
    for shape, product in (((), lambda node: ops.linear(x, node, ("embed", "mlp"))),
                           ((3,), lambda node: ops.grouped_linear(x, node, offsets, ("embed", "mlp")))):
        node = {"weight": draw(*shape, 4, 5), "bias": draw(*shape, 4), A: draw(*shape, 2, 5), B: draw(*shape, 4, 2)}
        w = node["weight"] + 1.5 * node[B] @ node[A]
        whole = F.linear(x, w, node["bias"]) if not shape else torch.cat(
            [*(F.linear(x[a:b], w[e], node["bias"][e]) for e, (a, b) in enumerate(((0, 3), (3, 3), (3, 6)))),
             torch.zeros(1, 4, dtype=torch.float64)])
        ours = product(node)
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
        inputs, weight = (x, *node.values()), torch.randn_like(whole)
        for g, h in zip(torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(whole, inputs, weight),
                        strict=True):
            torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_changes_nothing_and_frozen_leaves_keep_no_state():
    specs = outsider.specs(torch.float32)
    step = xtf.shard(outsider.step, lora(2), specs=specs)
    params = xtf.init(step.specs)
    plain = xtf.init(specs)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(outsider.V, (2, 8), generator=g)
    data = Batch(ids, ids.roll(-1, 1), torch.ones(2, 8), torch.arange(8).expand(2, 8),
                 torch.tensor([[0, 8, 8]] * 2, dtype=torch.int32))
    assert torch.equal(outsider.nll(params, data, step.ops), outsider.nll(plain, data, xtf.LOCAL))
    state, losses = xtf.TrainState.create(params, outsider.opt.init(params)), []
    for _ in range(20):
        state, metrics = step(state, data)
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0]
    for (path, before), after in zip(tree.flatten_with_path(params), tree.leaves(state.params), strict=True):
        assert torch.equal(before, after) == (not path.endswith((A, B))) == (not before.requires_grad), path
    frozen = len(tree.leaves(base(params)))
    assert sum(x is None for x in tree.leaves(state.opt[1])) == 2 * frozen                      # of AdamW's two moments
    _, grads = xtf.value_and_grad(lambda p, b, ops: outsider.nll(p, b, ops).sum())(params, data, step.ops)
    assert sum(g is None for g in tree.leaves(grads)) == frozen


@pytest.mark.parametrize("model, cfg", [(models.qwen3, DENSE), (models.qwen3_moe, SPARSE)])
def test_merging_is_the_same_function(model, cfg):
    t = lora(3, alpha=5.0)
    ops, params = adapted(t, model, cfg)
    merged = merge(params, t)
    assert [p for p, _ in tree.flatten_with_path(merged)] == [p for p, _ in tree.flatten_with_path(model.specs(cfg))]
    torch.testing.assert_close(model.forward(merged, batch(), cfg), model.forward(params, batch(), cfg, ops), rtol=1e-4,
                               atol=1e-5)
    assert merged["embed"]["weight"] is params["embed"]["weight"]


def test_merging_adds_in_float32_and_rounds_once():
    torch.manual_seed(0)
    w, a, b = torch.randn(6, 5, 9).bfloat16(), torch.randn(6, 3, 9), torch.randn(6, 5, 3)
    got = merge({"x": {"weight": w, A: a, B: b}}, lora(3, alpha=1.0))["x"]["weight"]
    assert torch.equal(got, (w.float() + 1 / 3 * (b @ a)).bfloat16()) and got.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="the adapters have rank 3, the transform 4"):
        merge({"x": {"weight": w, A: a, B: b}}, lora(4))


def test_trees_come_apart_and_together():
    specs = lora(2).specs(models.qwen3_moe.specs(SPARSE))
    assert join(base(specs), adapters(specs)) == specs
    assert tree.leaves(join(base(specs), adapters(specs))) == tree.leaves(specs)                # in one order
    params = xtf.init(specs, 3)
    again = join(xtf.init(base(specs), 3), xtf.init(adapters(specs), 3))                        # values go by path
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(params), tree.leaves(again), strict=True))


@pytest.mark.parametrize("more", [(), (bf16(),)], ids=["fp32", "bf16"])
def test_a_base_in_bf16_takes_half_the_bytes_and_computes_as_before(more):
    """The same numbers as a float32 base that holds them: only storage differs."""
    narrow, plain = lora(2, base_dtype=torch.bfloat16), lora(2)
    grads = []
    for t in (narrow, plain):
        run = xtf.shard(lambda state, batch, ops: None, t, *more, fsdp("dp"), specs=models.qwen3_moe.specs(SPARSE))
        params = drawn(run.specs)
        for path, x in tree.flatten_with_path(base(params)):
            assert x.dtype == (torch.bfloat16 if t is narrow and x.ndim >= 2 else torch.float32), path
        params = tree.tree_map(lambda x: x.detach().bfloat16().to(x.dtype).requires_grad_(x.requires_grad), params)
        share = lambda p, b, ops: models.qwen3_moe.loss(p, b, SPARSE, ops)
        grads.append(xtf.value_and_grad(share)(params, batch(), run.ops))
    assert grads[0][0].isfinite() and torch.equal(grads[0][0], grads[1][0])
    for x, y in zip(*(tree.leaves(g[1]) for g in grads), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
    untouched = lora(2, base_dtype=torch.bfloat16).specs({"q":
                                                          {"weight": Param((2, 2), torch.float64, ("heads", "embed"))}})
    assert untouched["q"]["weight"].dtype == torch.float64


def test_torch_func_sees_the_same_gradients():
    ops, params = adapted(lora(2), dtype=torch.float64)
    loss = lambda p, b, ops: models.qwen3.token_losses(p, b, DENSE, ops).sum()
    _, ours = xtf.value_and_grad(loss)(params, batch(), ops)
    theirs = torch.func.grad(lambda new: loss(join(base(params), new), batch(), ops))(adapters(params))
    for (path, g), h in zip(tree.flatten_with_path(adapters(ours)), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}")
