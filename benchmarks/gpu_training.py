"""Training steps of ours on one device, and of transformers beside them: time, memory, MFU, and where the time goes."""
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import loops
import reported
import torch
from gpu_families import SLOW, on_device
from loops import FLOPS, Case, Mixture, Shape, Sizes, flops, make, num_params, ragged
from reported import LeftOut, Part
from torch.autograd import DeviceType

from xtf import device

QWEN3_06B = Shape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151936)
QWEN3_4B = QWEN3_06B._replace(hidden=2560, intermediate=9728, layers=36, heads=32)
QWEN3_30B = Mixture(hidden=2048, width=768, experts=128, top_k=8, layers=6, heads=32, kv_heads=4, head_dim=128,
                    vocab=151936, tied=False)
TOY = Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512)
TOY_30B = Mixture(hidden=64, width=32, experts=8, top_k=2, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512,
                  tied=False)
STEPS, WARMUP = 8, 3
ROOMY = 100e9                                      # bytes of a device on which the six layers need no recomputation
KERNELS = 15
MEMORY = ("peak of allocated bytes in a step, less those before the model was made, less parameters, gradients and "
          "moments (all fp32)")
ABOUT = (f"{{}} packs of {{}} tokens a step, random weights and tokens, bf16 products over fp32 weights; medians of "
         f"{STEPS} steps after {WARMUP}. MFU: FLOPs / time / the datasheet's dense bf16 FLOP/s, with FLOPs = {FLOPS}; "
         f"what remat computes again does not count. memory: {MEMORY}")


def parts(rehearse: bool, packs: int, seq_len: int, out: Path) -> list[Part]:
    small, large, experts = (TOY, TOY, TOY_30B) if rehearse else (QWEN3_06B, QWEN3_4B, QWEN3_30B)
    tokens = (2, 32) if rehearse else (packs, seq_len)
    on_cuda = device.device().type == "cuda"
    packed = "varlen" if loops.varlen_attn is not None and on_cuda else "documents"
    hf = lambda *how, **more: Case("transformers", "masters", *how, **more)
    ours, compiled = Case(dtype="masters"), Case(dtype="masters", compile="layers")
    again = not rehearse and device.total_memory() < ROOMY

    def part(title: str, shape: Sizes, *cases: Case, traced: bool = False, about: str = "") -> Part:
        made = []
        for c in cases:
            slug = "-".join(c.name.replace(",", "").split())
            trace = out.with_name(f"{out.stem}-{slug}.trace.json.gz") if traced else None
            made.append(reported.Case(c.name, partial(train, c, shape, *tokens, rehearse, trace), c.who == "xtf"))
        return Part(title, made, about or "as above")
    return [
        part("training Qwen3-0.6B", small, ours, compiled, hf("packs", packed, "full"),
             hf("packs", packed, "full", "layers"), hf("packs", packed, "full", liger=True),
             about=ABOUT.format(*tokens)),
        part("training Qwen3-4B", large, ours._replace(remat=True), compiled._replace(remat=True),
             hf("packs", packed, "full", remat=True)),
        part("training Qwen3-30B-A3B cut to 6 layers", experts, ours._replace(remat=again),
             compiled._replace(remat=again), traced=True,
             about=f"as above; then one step more under torch.profiler, whose trace lies beside this report: the "
                   f"{KERNELS} kernels that take longest (on a CPU, operators)"),
        part("training Qwen3-0.6B, other ways of transformers", small, hf("packs", "sdpa", "full"),
             hf("packs", packed, "chunked"), hf("flat", packed, "chunked", "layers")),
    ]


def train(case: Case, shape: Sizes, packs: int, seq_len: int, rehearse: bool, trace: Path | None) -> dict[str, Any]:
    """`STEPS` steps, timed one by one (each waits for its loss), after `WARMUP` more on the first batch; one more of
    each bound on the length of documents, for which blocks are compiled anew."""
    if rehearse and case.compile != "none":
        raise LeftOut(SLOW)
    if case.liger and importlib.util.find_spec("liger_kernel") is None:
        raise LeftOut("liger-kernel is not installed")
    on_gpu = device.device().type != "cpu"
    before = torch.accelerator.memory_allocated() if on_gpu else 0
    with as_it_was() if case.liger else contextlib.nullcontext():
        step = make(case, shape)
        batches = [on_device(ragged(shape, packs, seq_len, seed)) for seed in range(STEPS)]
        kinds = {batch.longest: batch for batch in reversed(batches)}
        for batch in [batches[0]] * (WARMUP - 1) + list(kinds.values()):
            step(batch)
        if on_gpu:
            torch.accelerator.reset_peak_memory_stats()
        losses, seconds = [], []
        for batch in batches:
            device.synchronize()
            start = time.perf_counter()
            losses.append(step(batch))
            device.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.accelerator.max_memory_allocated() if on_gpu else None
        profile = {} if trace is None else profiled(lambda: step(batches[0]), trace)
    rate = statistics.median(seconds)
    mfu = statistics.median(flops(shape, b) / s for b, s in zip(batches, seconds, strict=True))
    found = {"ms a step": 1e3 * rate, "tokens/s": packs * seq_len / rate,
             "MFU": mfu / device.peak_flops(torch.bfloat16)}
    if peak is not None:
        found["memory GB"] = (peak - before - 16 * num_params(shape)) / 1e9
    return found | {"first loss": losses[0], "last loss": losses[-1], "how": case._asdict(),
                    "shape": shape._asdict(), "seconds": seconds, "losses": losses, **profile}


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """transformers' Qwen3 as it was before Liger replaced functions and classes of it."""
    from transformers.models.qwen3 import modeling_qwen3 as module
    names, forward = dict(module.__dict__), module.Qwen3ForCausalLM.forward
    try:
        yield
    finally:
        module.__dict__.update(names)
        module.Qwen3ForCausalLM.forward = forward


def profiled(run: Any, trace: Path) -> dict[str, Any]:
    """One step's trace, for ui.perfetto.dev, and the kernels that took most of its time."""
    on_gpu = device.device().type != "cpu"
    device.synchronize()
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        run()
        device.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    # microseconds: of kernels on a device, of operators themselves on a CPU
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = [(e.key, getattr(e, clock), e.count) for e in profiler.key_averages()
             if not on_gpu or (e.device_type != DeviceType.CPU and not getattr(e, "is_user_annotation", False))]
    total = sum(us for _, us, _ in spent)
    top = sorted(spent, key=lambda row: -row[1])[:KERNELS]
    rows = [{"kernel": name, "ms": us / 1e3, "calls": calls, "of all": us / total} for name, us, calls in top]
    lines = [f"   {r['ms']:9.2f} ms {r['of all']:6.1%} {r['calls']:6} calls  {r['kernel'][:120]}" for r in rows]
    return {"kernels": rows, "trace": trace.name, "text": "\n".join(lines)}
