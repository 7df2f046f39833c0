"""The door for others: a transform from outside the package is the same function beside ours, on real ranks; what it
could forget is caught."""
import inspect
from dataclasses import replace
from functools import partial

import msgspec
import pytest
import torch

import tests.tensor_parallel
import xtf
from tests.laws.test_lora import learnt
from tests.tensor_parallel import Leave, tensor_parallel
from xtf.models import qwen3
from xtf.optim import adamw, chain, clip_by_global_norm
from xtf.testing import Layout, assert_equivalent, token_batches

CFG = qwen3.config({"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "attention_bias": True,
                    "initializer_range": 0.3})
tx = chain(clip_by_global_norm(0.05), adamw(1e-2))
TP = partial(tensor_parallel, CFG.head_dim)


def step(state, batch, ops=xtf.LOCAL, cfg=CFG):
    num_tokens = batch.loss_tokens(ops)

    def share(params, batch, ops):
        return qwen3.loss(params, batch, cfg, ops) / num_tokens
    loss, grads = xtf.value_and_grad(share)(state.params, batch, ops)
    updates, opt = tx.update(grads, state.opt, state.params, ops)
    return state.apply(updates, opt), {"loss": loss}


def specs(cfg=CFG):
    """Biases that are not zero, else a bias added twice would be seen only after the first update."""
    drawn = lambda path, p: replace(p, init=xtf.spec.Normal(0.3)) if path.endswith(".bias") else p
    return xtf.tree.map_with_path(drawn, qwen3.specs(cfg, torch.float64))


def check(*layouts, examples=2, cfg=CFG, **kw):
    for layout in layouts:
        assert_equivalent(partial(step, cfg=cfg), [layout], specs=specs(cfg), opt=tx, tolerance=1e-11,
                          examples=examples, batches=token_batches(24, max_packs=1, max_len=6), **kw)


TP2, DP_TP, SP_TP = (("tp", 2),), (("dp", 2), ("tp", 2)), (("sp", 2), ("tp", 2))
LORA = partial(learnt, 3)


@pytest.mark.parametrize("layout", [
    Layout(TP2, extra=(TP,)),
    Layout(TP2, ("tp",), extra=(TP,), remat=("attn_out",)),
    Layout(DP_TP, ("dp",), extra=(TP,), reverse=True),
    Layout(DP_TP, ("dp", "tp"), extra=(TP, LORA), remat=()),
    Layout(SP_TP, ("sp", "tp"), extra=(TP,), reshard=False, donate=True),
    Layout(SP_TP, extra=(LORA, TP)),
], ids=lambda layout: "-".join(f"{a}{n}" for a, n in layout.mesh) + "-" + "".join(layout.store) + "-lora"
                         * (LORA in layout.extra))
def test_it_is_the_same_function_beside_ours(layout):
    check(layout)


@pytest.mark.slow
def test_its_blocks_compile_into_one_graph():
    check(Layout(TP2, extra=(TP,), compile=True), examples=1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(("tp", 2),), (("dp", 2), ("tp", 2)), (("sp", 2), ("tp", 2)),
                                  (("dp", 2), ("sp", 2), ("tp", 2)), (("replicate", 2), ("dp", 2), ("tp", 2))])
def test_it_is_the_same_function_at_length(mesh):
    axes = [a for a, _ in mesh]
    for store in ((), tuple(a for a in axes if a in ("dp", "sp")), tuple(a for a in axes if a != "replicate")):
        for remat in (None, (), ("attn_out",)):
            for extra in ((TP,), (LORA, TP)):
                check(Layout(mesh, store, remat=remat, extra=extra, reverse=len(extra) > 1), examples=4)


def bias_before_the_sum():
    right = TP()

    def wrap(ops, env):
        linear, group = right.wrap(ops, env).linear, env.group("tp").name
        early = lambda x, node, axes: Leave.apply(ops.linear(x, node, axes), group)
        return replace(ops, linear=lambda x, node, axes: early(x, node, axes) if axes == ("heads", "embed")
                       else linear(x, node, axes))
    return replace(right, wrap=wrap)


def inputs_not_summed():
    right = TP()

    def wrap(ops, env):
        linear = right.wrap(ops, env).linear
        return replace(ops, linear=lambda x, node, axes: (ops.linear if axes[1] == "mlp" else linear)(x, node, axes))
    return replace(right, wrap=wrap)


@pytest.mark.parametrize("mutant, leaf", [(bias_before_the_sum, ""), (inputs_not_summed, ""),
                                          (lambda: replace(TP(), partial=lambda p: ()), "_norm")])
def test_what_is_easily_forgotten_is_caught(mutant, leaf):
    with pytest.raises(AssertionError, match=rf"gradient of \S*{leaf}\S* differs"):
        check(Layout(TP2, extra=(mutant,)), examples=5)


@pytest.mark.parametrize("change, message", [
    ({"num_key_value_heads": 1}, "tensor_parallel: tp=2 does not divide the 1 kv_heads"),
    ({"intermediate_size": 13},
     r"leaf layers\.0\.gate\.weight \('mlp', 'embed'\): tensor_parallel splits 'mlp' of 13 over tp=2"),
])
def test_heads_and_widths_that_do_not_divide_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        check(Layout(TP2, extra=(TP,)), cfg=msgspec.structs.replace(CFG, **change), examples=1)


def test_the_door_is_narrow():
    """In at most 80 lines, from public names alone."""
    source = inspect.getsource(tests.tensor_parallel)
    assert len(source.splitlines()) <= 80 and "._" not in source
