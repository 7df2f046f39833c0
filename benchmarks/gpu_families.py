"""The families on this device: beside transformers in float64, without waits, with few slots for documents and many."""
import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import apart
from loops import Shape, lengths, ragged, weights_of
from reported import Case, LeftOut, Part, place

import xtf
from xtf import device, hf, models, plan, tree
from xtf.data.batch import Batch
from xtf.spec import Param, is_matrix
from xtf.transform import Transform
from xtf.transforms import bf16, jit

Tensor = torch.Tensor
SMALL = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
         "tie_word_embeddings": False}
LATENT = {name: x for name, x in SMALL.items() if name != "head_dim"}
CONFIGS = {
    "qwen3": SMALL | {"tie_word_embeddings": True},
    "qwen3_moe": SMALL | {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
                          "norm_topk_prob": True},
    "gpt_oss": SMALL | {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2,
                        "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    # heads of 192 and 128 dims, as published
    "deepseek_v3": LATENT | {"num_key_value_heads": 4, "moe_intermediate_size": 128, "n_routed_experts": 8,
                             "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
                             "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "kv_lora_rank": 64,
                             "q_lora_rank": 96, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
                             "num_nextn_predict_layers": 0},
}
TOY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
EVERY = {"qwen3_moe": {"num_experts_per_tok": 8}, "gpt_oss": {"num_experts_per_tok": 8},
         "deepseek_v3": {"num_experts_per_tok": 8, "topk_group": 4}}
PROMISED = 1e-5                                          # of float32, as in xtf.parity
SAID = "called a synchronizing"                          # what torch raises or warns of
SLOW = "torch.compile takes long on a CPU; on an accelerator this is run"


def settings(family: str, rehearse: bool) -> dict:
    """A config.json."""
    small = TOY | ({} if family == "deepseek_v3" else {"head_dim": 16}) if rehearse else {}
    return {"model_type": family, **CONFIGS[family], **small}


# ---------------------------------------------------------------- parity

PARITY = ("two layers, all parameters random, one pack of documents here and each document alone there; distance from "
          "transformers in float64: of the logits, and of the gradient that is farthest, |off| / |gradient| (one below "
          "a hundredth of the average size, as a key's bias's, is held to that). Ours may be twice as far as "
          "transformers' own, and in fp32 1e-5. bf16: products alone, theirs under autocast; every token goes to all "
          "experts, since what rounding does to a choice no bound holds")


def parity(rehearse: bool) -> Part:
    cases = []
    for family in CONFIGS:
        for products, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
            title = f"{family} {products}{', compiled' * compiled}"
            cases.append(Case(title, partial(distances, family, products, compiled, rehearse)))
    return Part("parity with transformers", cases, PARITY)


def distances(family: str, products: str, compiled: bool, rehearse: bool) -> dict:
    """How far ours and theirs are."""
    if rehearse and compiled:
        raise LeftOut(SLOW)
    config = settings(family, rehearse) | (EVERY.get(family, {}) if products == "bf16" else {})
    model = models.FAMILIES[family]
    cfg = model.config(config)
    names, seq_len = model.names(cfg), 64 if rehearse else 512
    params = drawn(model.specs(cfg))
    batch = on_device(ragged(Shape(vocab=cfg.vocab_size), 1, seq_len, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        hf.save(path, params, names)
        (path / "config.json").write_text(json.dumps(config))
        documents = list(batch.input_ids[0].split(lengths(batch)))
        want = theirs(path, family, documents, torch.float64, False)
        other = theirs(path, family, documents, torch.float32, products == "bf16")
    params = tree.tree_map(lambda p: p.detach().to(device.device()).requires_grad_(p.requires_grad), params)
    transforms = [jit(compile=True, donate=False)] * compiled + [bf16()] * (products == "bf16")
    got = ours(model, cfg, params, batch, transforms)
    found = {"logits": (apart(got["logits"], want["logits"]), apart(other["logits"], want["logits"])),
             "gradients": (farthest(got, want), farthest(other, want))}
    ok = all(a <= max(2 * b, PROMISED if products == "fp32" else 0) for a, b in found.values())
    loss = apart(got["loss"], want["loss"])
    return {"ok": ok, **{f"{what}, {who}": x for what, pair in found.items()
                         for who, x in zip(("ours", "theirs"), pair, strict=True)}, "loss, ours": loss}


def drawn(specs: tree.Tree) -> tree.Tree:
    """Parameters on the CPU, each so that it matters."""
    generator = torch.Generator().manual_seed(0)

    def leaf(path: str, p: Param) -> Tensor:
        noise = torch.randn(p.shape, generator=generator)
        if not is_matrix(p):
            noise = 0.3 * noise + ("norm" in path)
        elif not ("embed" in path and "head" in specs):                      # a tied one is a product too
            noise /= p.shape[-1] ** 0.5
        return noise.to(p.dtype).requires_grad_(p.trainable)
    return tree.map_with_path(leaf, specs)


def ours(model: Any, cfg: Any, params: tree.Tree, batch: Batch, transforms: list[Transform]) -> dict[str, Tensor]:
    """Logits [T, V], the summed loss, and its gradients by their names in the files."""
    def probe(params: tree.Tree, batch: Batch, ops: Any) -> Any:
        with torch.no_grad():
            logits_PTV = model.forward(params, batch, cfg, ops)
        share = lambda params, batch, ops: model.loss(params, batch, cfg, ops)
        return logits_PTV, *xtf.value_and_grad(share)(params, batch, ops)
    logits_PTV, loss, grads = xtf.shard(probe, *transforms, specs=model.specs(cfg))(params, batch)
    named = {name: x for path, g in tree.flatten_with_path(grads) if g is not None
             for name, x in hf.file_tensors(model.names(cfg), path, g).items()}
    return {"logits": logits_PTV.flatten(0, 1), "loss": loss.detach(), **named}


def theirs(path: Path, family: str, documents: list[Tensor], dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """The same by transformers, each document alone."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion
    attention = "eager" if family == "gpt_oss" else "sdpa"                   # which knows no sinks
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention,
                                                      experts_implementation="eager")
    model.to(device.device())
    logits, total = [], torch.zeros((), dtype=dtype, device=device.device())
    for ids_T in documents:
        with torch.autocast(device.device().type, torch.bfloat16, enabled=autocast):
            out_TV = model(ids_T[None], use_cache=False).logits[0].to(dtype)
        logits.append(out_TV.detach())
        total = total + F.cross_entropy(out_TV[:-1], ids_T[1:], reduction="sum")
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": torch.cat(logits), "loss": total.detach(), **revert_weight_conversion(model, grads)}


def farthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    if got.keys() != want.keys():
        raise ValueError(f"gradients of {sorted(got.keys() ^ want.keys())} are on one side only")
    grads = [(got[name].double(), g.double()) for name, g in want.items() if name not in ("logits", "loss")]
    average = torch.cat([g.flatten() for _, g in grads]).square().mean().sqrt()
    off = torch.stack([(a - g).norm() / torch.maximum(g.norm(), 0.01 * average * g.numel() ** 0.5) for a, g in grads])
    return off.nan_to_num(torch.inf, torch.inf).max().item()


# ---------------------------------------------------------------- the recipes' step

class Trained:
    """A state, and the recipes' step on it: bf16 products over float32 parameters and moments."""

    def __init__(self, config: dict, compiled: bool):
        model = models.FAMILIES[config["model_type"]]
        cfg = model.config(config)
        train_step, tx, watch = plan.training_step(model, cfg, "fp32")
        transforms = [t for t in plan.transforms(cfg, "bf16", False) if t.name != "jit"]
        self.step = xtf.shard(train_step, jit(compile=compiled), *transforms, specs=model.specs(cfg))
        params = weights_of(self.step.specs)
        self.state = xtf.TrainState.create(params, tx.init(params), watch.init())

    def __call__(self, batch: Batch) -> Tensor:
        """One step; its loss, on the device."""
        self.state, loss = self.step(self.state, batch)
        return loss


def on_device(batch: Batch) -> Batch:
    return tree.tree_map(lambda x: x.to(device.device()), batch)


# ---------------------------------------------------------------- no waits

WAITS = ("two of the recipes' steps, two micro-batches each, in bf16, after three of warm-up, under "
         "torch.cuda.set_sync_debug_mode('error'): whatever makes the host wait for the device raises, and is then "
         "listed. By design wait: `ep` with exact sizes, once a layer, on more than one rank; grouped products in "
         "other dtypes than bf16, which read offsets on the host; and whoever reads what a step returns. On a CPU "
         "nothing is watched")


def no_waits(rehearse: bool) -> Part:
    cases = [Case(f"{family}{', compiled' * compiled}", partial(unwaited, family, compiled, rehearse))
             for compiled in (False, True) for family in CONFIGS]
    return Part("no host synchronisation within a step", cases, WAITS)


def unwaited(family: str, compiled: bool, rehearse: bool) -> dict:
    if rehearse and compiled:
        raise LeftOut(SLOW)
    config = settings(family, rehearse) | ({"num_nextn_predict_layers": 1} if family == "deepseek_v3" else {})
    # as long as real packs: torch sums gradients of an embedding in another way beyond 3072 tokens
    batch = on_device(ragged(Shape(vocab=config["vocab_size"]), 2, 64 if rehearse else 4096, seed=0))
    try:
        loss, _ = two_steps("error", config, compiled, batch)
    except RuntimeError as e:
        if SAID not in str(e):
            raise
        loss, noted = two_steps("warn", config, compiled, batch)
        return {"ok": False, "loss": loss, "waits": ", ".join(f"{at} ({n})" for at, n in Counter(noted).items())}
    return {"ok": math.isfinite(loss), "loss": loss}


def two_steps(mode: str, config: dict, compiled: bool, batch: Batch) -> tuple[float, list[str]]:
    """The last loss, and where the host waited."""
    train = Trained(config, compiled)
    for _ in range(3):
        train(batch)
    with watched(mode) as noted:
        train(batch)
        loss = train(batch)
    return loss.item(), noted


@contextlib.contextmanager
def watched(mode: str) -> Iterator[list[str]]:
    """Waits raise or, as "warn", are noted with the place that the host was at: in backward the call that began it."""
    noted: list[str] = []
    if device.device().type != "cuda":
        yield noted
        return
    device.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield noted
    finally:
        torch.cuda.set_sync_debug_mode("default")
    noted += [f"{place(w.filename) or Path(w.filename).name}:{w.lineno}" for w in said if SAID in str(w.message)]


# ---------------------------------------------------------------- slots for documents

SLOTS = ("steps of one and the same batch, eager: its segments with room for 16 documents a pack, as the loader trims "
         "them, and with room for one in 16 tokens. ms: median; memory: peak of allocated bytes in a step beyond those "
         "before it. The first losses must agree to 1e-5, for documents without tokens are nothing")


def slots(rehearse: bool) -> Part:
    dense = settings("qwen3", rehearse) | ({} if rehearse else {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128})
    experts = settings("qwen3_moe", rehearse) | ({} if rehearse else {
        "vocab_size": 32768, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8})
    return Part("slots for documents", [
        Case("8 layers of Qwen3-0.6B", partial(few_and_many, dense, rehearse)),
        Case("4 layers of Qwen3-30B-A3B", partial(few_and_many, experts, rehearse))], SLOTS)


def few_and_many(config: dict, rehearse: bool) -> dict:
    packs, seq_len = (2, 512) if rehearse else (4, 4096)
    few = on_device(ragged(Shape(vocab=config["vocab_size"]), packs, seq_len, seed=0))
    have, S = few.segments.shape[1] - 1, seq_len // 16
    many = dataclasses.replace(few, segments=F.pad(few.segments, (0, S - have), value=seq_len))
    costs = {}
    for batch in (few, many):
        costs[batch.segments.shape[1] - 1] = cost(Trained(config, False), batch, 1 if rehearse else 5)
    (ms, memory, loss), (more_ms, more_memory, more_loss) = costs[have], costs[S]
    found: dict[str, Any] = {f"ms, {have} slots": ms, f"ms, {S} slots": more_ms, "times as long": more_ms / ms}
    if memory is not None:
        found |= {f"memory GB, {have} slots": memory / 1e9, f"memory GB, {S} slots": more_memory / 1e9,
                  "times as much": more_memory / memory}
    return {"ok": abs(more_loss / loss - 1) < 1e-5, **found, "first losses": [loss, more_loss]}


def cost(train: Callable[[Batch], Tensor], batch: Batch, steps: int) -> tuple[float, int | None, float]:
    """(ms of a step, memory of it, the first loss)."""
    first, on_gpu = float(train(batch)), device.device().type != "cpu"
    train(batch)
    before = torch.accelerator.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.accelerator.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        device.synchronize()
        start = time.perf_counter()
        train(batch)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return (1e3 * statistics.median(seconds), torch.accelerator.max_memory_allocated() - before if on_gpu else None,
            first)
