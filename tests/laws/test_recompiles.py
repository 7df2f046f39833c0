"""Compiled blocks are compiled for the first steps, not for each: sizes that the data decides stay symbols.

What makes a number of a symbolic size in traced code (`len`, `int`, `tolist`) costs a graph for every size that comes.
"""
import random
from functools import partial

import pytest
import torch
import torch._dynamo.utils as dynamo

import xtf
from xtf import models, moe
from xtf.data import Sample, pack, stack
from xtf.data.batch import cut
from xtf.parallel import ep, fsdp
from xtf.testing import pool
from xtf.testing.laws import shared_mesh
from xtf.transforms import jit, lora, overlap, remat

V, STEPS = 97, 7
SIZE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "qwen3_moe": SIZE | EXPERTS | {"num_experts": 8},
    "gpt_oss": SIZE | {"num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": 8, "intermediate_size": 16},
    "deepseek_v3": SIZE | EXPERTS | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
                                     "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                     "qk_rope_head_dim": 8, "first_k_dense_replace": 1},
}
MORE = {"lora": partial(lora, 4), "overlap": overlap, "remat": remat}


def drawn(step, packs=4, seq_len=64):
    """Packs of documents of other lengths each step, and of another number of tokens."""
    rng = random.Random(step)
    rows = [[rng.randrange(3, 20) for _ in range(3)] for _ in range(packs)]
    return stack([pack([Sample([rng.randrange(V) for _ in range(n)], [1] * n) for n in row], seq_len, 6)
                  for row in rows])


def graphs(name, sizes, more):
    """How many graphs this rank has compiled after each step."""
    compile = torch.compile
    torch.compile = partial(compile, backend="aot_eager")  # forward and backward are traced, and not made fast
    try:
        dynamo.counters.clear()
        torch._dynamo.reset()
        module = models.FAMILIES[name]
        cfg, mesh, out = module.config(CONFIGS[name]), shared_mesh(sizes), []

        def share(params, batch, ops):
            nll, routing = module.loss_and_routing(params, batch, cfg, ops)
            return nll + 0.01 * moe.balance(routing, moe.num_tokens(batch, ops), ops)

        def step(params, batch, ops=xtf.LOCAL):
            return xtf.value_and_grad(share)(params, batch, ops)[0]
        transforms = fsdp("dp", "ep"), ep("ep"), jit(donate=False), *(MORE[m]() for m in more)
        run = xtf.shard(step, *transforms, mesh=mesh, specs=module.specs(cfg))
        params = xtf.init(run.specs, 0, run.layout)
        for i in range(STEPS):
            run(params, cut(drawn(i), mesh))
            out.append(dynamo.counters["stats"]["unique_graphs"])
        return out
    finally:
        torch.compile = compile


def check(name, ranks, more):
    sizes = (("ep", ranks),) if ranks > 1 else ()
    for counts in pool(ranks).run(graphs, name, sizes, more):
        assert counts[0] > 0 and counts[1:] == counts[1:2] * (STEPS - 1), counts


@pytest.mark.parametrize("name, ranks, more", [("qwen3_moe", 2, ()), ("gpt_oss", 2, ("lora",))])
def test_no_graph_is_compiled_after_the_second_step(name, ranks, more):
    check(name, ranks, more)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("lora",), ("overlap",), ("lora", "overlap"), ("remat",)], ids="+".join)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_graph_is_compiled_after_the_second_step_in_any_family(name, ranks, more):
    check(name, ranks, more)
