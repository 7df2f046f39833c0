"""What a matrix is, by its axes: what is decayed, made orthogonal and cast, in every family."""
import pytest
import torch

import xtf
from tests.core.test_flops import CONFIGS
from xtf import cli, models, tree
from xtf.cli._optimizer import OptimizerFlags, PretrainOptimizerFlags
from xtf.parallel import ep, fsdp
from xtf.spec import is_matrix
from xtf.testing import pool
from xtf.testing.laws import shared_mesh
from xtf.transforms import bf16, lora

# as checkpoints name them
NO_MATRIX = "norm", "bias", "sinks"


def made(name):
    family, hf = CONFIGS[name]
    module = models.FAMILIES[family]
    return module, module.config(hf)


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_biases_and_sinks_are_no_matrices(name):
    module, cfg = made(name)
    names = module.names(cfg)
    for path, p in tree.flatten_with_path(module.specs(cfg)):
        assert is_matrix(p) == (not any(word in names[path].rpartition("layers.")[2] for word in NO_MATRIX)), path


@pytest.mark.parametrize("flags", [OptimizerFlags(warmup=0.0), PretrainOptimizerFlags(warmup=0.0),
                                   PretrainOptimizerFlags(warmup=0.0, optimizer="muon")], ids=["sft", "adamw", "muon"])
@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_alone_decay_and_go_to_muon(name, flags):
    """Where no gradient moves a leaf, decay alone does."""
    module, cfg = made(name)
    specs = module.specs(cfg)
    tx, _, _ = cli.optimizer(flags, specs)
    adapted = lora(2).specs(specs)
    for step in (specs, adapted):
        params = tree.tree_map(lambda x: (x.detach() + 1).requires_grad_(x.requires_grad), xtf.init(step, 0))
        opt = tx.init(params)
        zeros = tree.tree_map(lambda p: torch.zeros_like(p) if p.requires_grad else None, params)
        updates, _ = tx.update(zeros, opt, params)
        hidden = opt[1]["muon"]["m"] if "muon" in opt[1] else {}
        for (path, p), (_, spec), (_, u) in zip(*map(tree.flatten_with_path, (params, step, updates)), strict=True):
            if u is not None:
                want = -flags.lr * flags.weight_decay * p.detach() * is_matrix(spec)
                torch.testing.assert_close(u, want, rtol=1e-5, atol=0)
            assert not hidden or (path in hidden) == (is_matrix(spec) and path.split(".")[0] not in ("embed", "head"))


def dtypes(name, sizes, transforms):
    """In which dtype each leaf computes, as seen by forward alone, and when gradients are made."""
    module, cfg = made(name)
    mesh, seen = shared_mesh(sizes), []

    def look(params, ops):
        paths = [path for path, _ in tree.flatten_with_path(params)]
        note = lambda p: (seen.append(dict(zip(paths, (x.dtype for x in tree.leaves(p)), strict=True))),
                          sum(x.float().sum() for x in tree.leaves(p)))[1]
        return ops.use(note, params)

    def step(params, batch, ops=xtf.LOCAL):
        look(params, ops)
        xtf.value_and_grad(lambda p, b, o: look(p, o))(params, batch, ops)
    run = xtf.shard(step, *transforms, mesh=mesh, specs=module.specs(cfg))
    run(xtf.init(run.specs, 0, run.layout), None)
    assert len(seen) == 2 and seen[0] == seen[1]
    return {path: (is_matrix(p), seen[0][path]) for path, p in tree.flatten_with_path(run.specs)}


LAYOUTS = {"plain": ((), ()), "fsdp": ((), (fsdp("dp"),)), "ranks": ((("ep", 2),), (fsdp("dp", "ep"), ep("ep"))),
           "lora": ((), (fsdp("dp"), lora(2, base_dtype=torch.bfloat16)))}


@pytest.mark.parametrize("layout, name", [*(("plain", name) for name in CONFIGS), ("fsdp", "gpt_oss"),
                                          ("fsdp", "deepseek_v3"), ("ranks", "deepseek_v3"), ("lora", "gpt_oss")])
def test_bf16_casts_matrices(layout, name):
    """And leaves the routers of the families whose reference scores in float32, unless it is told not to."""
    sizes, more = LAYOUTS[layout]
    for routers in (False, True):
        args = name, sizes, (bf16(routers=routers), *more)
        seen = pool(2).run(dtypes, *args)[1] if sizes else dtypes(*args)
        for path, (matrix, dtype) in seen.items():
            wide = path.endswith("router.weight") and name in ("deepseek_v3", "kimi_k2") and not routers
            assert dtype == (torch.bfloat16 if matrix and not wide else torch.float32), path
