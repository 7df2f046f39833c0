"""Drawn tiny mixtures of experts beside transformers, whose fused parameters in memory are read as they are written to
files."""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from hypothesis import strategies as st

from tests.models import reference as R
from xtf import tree
from xtf.hf import Transposed

FAMILIES = ["qwen3_moe", "gpt_oss"]


@st.composite
def configs(draw, family: str) -> dict:
    """A config.json in transformers 5's spelling."""
    hf = {k: v for k, v in draw(R.configs("qwen3")).items()
          if k not in ("max_window_layers", "layer_types")} | {"model_type": family}
    layers, experts = hf["num_hidden_layers"], draw(st.integers(1, 9))
    hf |= {"num_experts_per_tok": draw(st.integers(1, min(experts, 4)))}
    if family == "qwen3_moe":
        step = draw(st.sampled_from([1, 1, 2]))
        dense = draw(st.lists(st.integers(0, layers - 1), max_size=1)) if layers > step else []
        return hf | {"num_hidden_layers": max(layers, step),
                     draw(st.sampled_from(["num_experts", "num_local_experts"])): experts,
                     "moe_intermediate_size": draw(st.sampled_from([4, 6, 10])), "norm_topk_prob": draw(st.booleans()),
                     "decoder_sparse_step": step, "mlp_only_layers": [i for i in dense if step == 1]}
    del hf["use_sliding_window"]
    hf |= {"num_local_experts": experts, "hidden_act": "silu", "swiglu_limit": draw(st.sampled_from([0.25, 1.0, 7.0])),
           "swiglu_alpha": draw(st.sampled_from([1.702, 0.5]))}
    if draw(st.booleans()):
        hf["layer_types"] = draw(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers,
                                          max_size=layers))
    return hf if draw(st.booleans()) else {k: v for k, v in hf.items() if k != "rope_parameters"}


def spelled_4(hf: dict) -> dict:
    """The same config.json as transformers 4 wrote it."""
    if "rope_parameters" not in hf:
        return hf | {"torch_dtype": "float32"}
    old = R.spelled_4(hf)
    if hf["model_type"] == "gpt_oss":                                    # null would be its default, yarn
        old["rope_scaling"] = {k: v for k, v in hf["rope_parameters"].items() if k != "rope_theta"}
    return old


def hf_model(hf: dict, seed: int = 0, skewed: bool = False) -> torch.nn.Module:
    """transformers' model in float32 with every parameter drawn so that it matters.

    `skewed`: routers send all tokens to the same `top_k` experts, by a large bias or, where they have none, because all
        logits are equal.
    """
    model = R.hf_model(hf, seed)
    model.set_experts_implementation("eager")
    if skewed:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    p.zero_()
                if name.endswith("mlp.router.bias"):
                    p[:hf["num_experts_per_tok"]] += 20
    return model


def as_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors under the names, and cut as, they have in files: Qwen3-MoE's one an expert and product."""
    files = {}
    for name, x in tensors.items():
        if name.endswith("mlp.experts.gate_up_proj") and name.replace("gate_up_proj", "down_proj_bias") not in tensors:
            for e, gate_up in enumerate(x):
                files |= {name.replace("gate_up_proj", f"{e}.{part}_proj.weight"): y
                          for part, y in zip(("gate", "up"), gate_up.chunk(2), strict=True)}
        elif name.endswith("mlp.experts.down_proj") and name + "_bias" not in tensors:
            files |= {name.replace("down_proj", f"{e}.down_proj.weight"): y for e, y in enumerate(x)}
        else:
            files[name] = x
    return files


def leaves(tensors: dict[str, torch.Tensor], module, cfg) -> dict[str, torch.Tensor]:
    """transformers' tensors (parameters or gradients) as ours, by path; none may be left over."""
    files, out = as_files(tensors), {}
    for path, name in module.names(cfg).items():
        if "{e}" in name:
            out[path] = torch.stack([files.pop(name.replace("{e}", str(e))) for e in range(cfg.num_experts)])
        else:
            x = files.pop(str(name))
            out[path] = x.mT if isinstance(name, Transposed) else x
    assert set(files) <= {"lm_head.weight"}                              # a tied head is the embedding's twin
    return out


def load(model: torch.nn.Module, module, cfg, dtype: torch.dtype = torch.float32):
    """transformers' weights as our parameter tree."""
    values = leaves(dict(model.named_parameters()), module, cfg)
    return tree.map_with_path(lambda path, p: values[path].detach().to(dtype).reshape(p.shape).clone().requires_grad_(),
                              module.specs(cfg))


def by_expert(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked gradients one expert at a time, so that each is held to its own size."""
    return {f"{path}[{e}]": x for path, g in grads.items()
            for e, x in (enumerate(g) if ".experts." in path else [("", g)])}


def largest(grads: dict[str, torch.Tensor]) -> float:
    return max(g.abs().max().item() for g in grads.values())


def rounding(model: torch.nn.Module, seqs: list[list[int]], module, cfg) -> dict:
    """`reference.rounding` by our paths: how far transformers' own logits and gradients move when weights move by 4
    roundings."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits, grads = R.hf_logits_and_grads(model, seqs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 4 * torch.finfo(p.dtype).eps * torch.randn(p.shape, generator=generator))
    moved_logits, moved = R.hf_logits_and_grads(model, seqs)
    model.load_state_dict(params, strict=False)
    before, after = (by_expert(leaves(g, module, cfg)) for g in (grads, moved))
    found = dict(enumerate(map(R.deviation, moved_logits, logits)))
    return found | {key: R.deviation(after[key], g) for key, g in before.items()}


@contextmanager
def told(model: torch.nn.Module, routes: list[torch.Tensor], cfg) -> Iterator[None]:
    """transformers' model with its routers' choices replaced: one [T, K] of expert ids a layer with experts."""
    def choose(experts_TK: torch.Tensor):
        def hook(module, inputs, out):
            logits_TE = out[0]
            if cfg.router.score == "softmax_top_k":
                return logits_TE, logits_TE.gather(1, experts_TK).softmax(-1), experts_TK
            weights_TK = logits_TE.softmax(-1).gather(1, experts_TK)
            if cfg.router.normalise:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            return logits_TE, weights_TK, experts_TK
        return hook

    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    with ExitStack() as stack:
        for router, experts_TK in zip(routers, routes, strict=True):
            stack.enter_context(router.register_forward_hook(choose(experts_TK)))
        yield
