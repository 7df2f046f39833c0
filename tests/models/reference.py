"""Drawn tiny models of the three families beside transformers: the same weights, each sequence run alone there."""
import torch
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from xtf import models, tree
from xtf.data.batch import Batch, Sample, pack, stack

VOCAB = 37


@st.composite
def ropes(draw, half: int) -> dict:
    """rope_parameters of any kind, in transformers 5's spelling, for heads of `2 * half` dims."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0, 1000000.0]))}
    factor, original = draw(st.sampled_from([1.0, 2.0, 3.5])), draw(st.sampled_from([4, 8, 16]))
    numbers = st.lists(st.sampled_from([1.0, 1.25, 2.0, 5.0]), min_size=half, max_size=half)
    maybe = lambda **options: {k: draw(v) for k, v in options.items() if draw(st.booleans())}
    match kind:
        case "linear" | "dynamic":
            return rope | {"factor": factor}
        case "yarn":
            return rope | {"factor": factor, "original_max_position_embeddings": original} | maybe(
                attention_factor=st.sampled_from([0.9, 1.3]), beta_fast=st.sampled_from([2.0, 8.0]),
                beta_slow=st.sampled_from([0.25, 1.5]), mscale=st.just(0.7), mscale_all_dim=st.just(1.2),
                truncate=st.booleans())
        case "longrope":
            return rope | {"short_factor": draw(numbers), "long_factor": draw(numbers),
                           "original_max_position_embeddings": original} | maybe(
                factor=st.just(factor), attention_factor=st.just(1.2))
        case "llama3":
            return rope | {"factor": factor, "low_freq_factor": 1.0,
                           "high_freq_factor": draw(st.sampled_from([2.0, 4.0])),
                           "original_max_position_embeddings": original}
    return rope


@st.composite
def configs(draw, family: str) -> dict:
    """A config.json in transformers 5's spelling."""
    kv, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    layers = draw(st.integers(1, 3))
    hf = {
        "model_type": family, "vocab_size": VOCAB, "hidden_size": kv * group * draw(st.sampled_from([8, 16])),
        "intermediate_size": draw(st.sampled_from([12, 20])), "num_hidden_layers": layers,
        "num_attention_heads": kv * group, "num_key_value_heads": kv, "head_dim": 2 * half,
        "hidden_act": draw(st.sampled_from(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "max_position_embeddings": draw(st.sampled_from([8, 16, 64])),
        "tie_word_embeddings": draw(st.booleans()), "rope_parameters": draw(ropes(half)),
        "pad_token_id": draw(st.sampled_from([None, 3])),
    }
    if family != "qwen2":
        hf["attention_bias"] = draw(st.booleans())
    if family == "llama":
        return hf | {"mlp_bias": draw(st.booleans())}
    hf |= {"use_sliding_window": draw(st.booleans()), "sliding_window": draw(st.integers(1, 9)),
           "max_window_layers": draw(st.integers(0, layers))}
    if hf["use_sliding_window"] and draw(st.booleans()):
        hf["layer_types"] = draw(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers,
                                          max_size=layers))
    return hf


def spelled_4(hf: dict) -> dict:
    """The same config.json as transformers 4 wrote it."""
    old = {k: v for k, v in hf.items() if k != "rope_parameters"} | {"torch_dtype": "float32"}
    rope = dict(hf["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    return old | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}


@st.composite
def sequences(draw, min_tokens: int = 8) -> list[list[int]]:
    """Ragged sequences of random ids, one of them of `min_tokens` tokens at least.

    Ids come from a seed: in a sequence of equal tokens all values are equal, the true gradients of q and k are 0, and
    what float32 computes for them is rounding.
    """
    lengths = [*draw(st.lists(st.integers(1, 20), max_size=3)), draw(st.integers(min_tokens, 24))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def packed(seqs: list[list[int]], padding: int = 3) -> tuple[Batch, list[tuple[int, slice]]]:
    """Sequences in two packs with padding at the end, and where each is: (pack, positions)."""
    halves = [seqs[::2], seqs[1::2]]
    T = max(sum(map(len, half)) for half in halves) + padding
    where = []
    for i in range(len(seqs)):
        start = sum(map(len, halves[i % 2][:i // 2]))
        where.append((i % 2, slice(start, start + len(seqs[i]))))
    return stack([pack([Sample(s, [1] * len(s)) for s in half], T, len(seqs) + 1) for half in halves]), where


def hf_model(hf: dict, seed: int = 0) -> torch.nn.Module:
    """transformers' model in float32 with every parameter drawn so that it matters."""
    cfg = AutoConfig.for_model(**{k: v for k, v in hf.items() if v is not None})
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            elif "embed" in name and not hf.get("tie_word_embeddings"):
                p.copy_(noise)
            else:
                p.copy_(noise / p.shape[1] ** 0.5)
    return model.eval()


def load(model: torch.nn.Module, module, cfg, dtype: torch.dtype = torch.float32):
    """transformers' weights as our parameter tree."""
    state, names = model.state_dict(), module.names(cfg)
    ours = lambda path, p: state[names[path]].detach().to(dtype).reshape(p.shape).clone().requires_grad_()
    return tree.map_with_path(ours, module.specs(cfg))


def hf_logits_and_grads(model: torch.nn.Module, seqs: list[list[int]]) -> tuple[list[torch.Tensor],
                                                                                dict[str, torch.Tensor]]:
    """Each sequence alone through transformers: logits, and gradients of the summed next-token loss."""
    model.zero_grad()
    out = []
    for seq in seqs:
        # `dynamic` remembers the longest sequence it met
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        ids = torch.tensor([seq])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
        out.append(logits.detach())
    return out, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                 for name, p in model.named_parameters()}


def rounding(model: torch.nn.Module, seqs: list[list[int]]) -> tuple[list[float], dict[str, float]]:
    """How far transformers' own logits and gradients move when every weight moves by about 4 roundings of float32.

    No float32 computation can be held to less. It matters where a token's residual stream nearly cancels before a norm,
    and for k's bias: softmax ignores what is added to every key, so but for the rotation its gradient is 0.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits, grads = hf_logits_and_grads(model, seqs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 4 * torch.finfo(p.dtype).eps * torch.randn(p.shape, generator=generator))
    moved_logits, moved = hf_logits_and_grads(model, seqs)
    model.load_state_dict(before, strict=False)
    return ([deviation(a, b) for a, b in zip(moved_logits, logits, strict=True)],
            {name: deviation(moved[name], g) for name, g in grads.items()})


def family(hf: dict):
    """(module, Config) of a config.json's dict."""
    module = models.FAMILIES[hf["model_type"]]
    return module, module.config(hf)


def deviation(a: torch.Tensor, b: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference over b's largest magnitude, or over `floor` if that is more (over 1 where both are
    zero)."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / (max(b.abs().max().item(), floor) or 1)).item()


def floor(grads: dict) -> float:
    """A thousandth of the largest of all gradients. Below it a gradient may be what is left of terms that cancel (of q
    under a window of one token, whose softmax is constant), and has their rounding."""
    return 1e-3 * max(g.abs().max().item() for g in grads.values())
