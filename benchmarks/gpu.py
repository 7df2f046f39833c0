"""One accelerator, one command: `python benchmarks/gpu.py`. Parity with transformers, then 20 training steps at
Qwen3-0.6B's shape beside it.

Random weights and tokens, bf16 products over fp32 weights, documents packed. `--rehearse` runs all of it at toy size on
any machine, save what torch.compile takes long to make.
"""
import argparse
import datetime
import gc
import json
import re
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import loops
import torch
import transformers
from loops import FLOPS, Case, Shape, flops, hf_inputs, hf_model, make, num_params, ragged, weights
from rich.console import Console
from rich.table import Table

import xtf
from xtf import device, tree
from xtf.data.batch import Batch
from xtf.models import qwen3
from xtf.transforms import bf16

QWEN3_06B = Shape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151936)
TOY = Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512)
STEPS, WARMUP = 20, 3
MEMORY = ("peak of allocated bytes in a step, less those before the model was made, less parameters, gradients and "
          "moments (all fp32)")


# ---------------------------------------------------------------- parity

def our_logits_and_grads(case: Case, shape: Shape, batch: Batch) -> dict[str, torch.Tensor]:
    """Logits [P × T, V] as "logits", and the summed loss's gradients by transformers' names."""
    cfg = qwen3.config(shape.config())

    def probe(params, batch, ops):
        with torch.no_grad():
            logits = qwen3.forward(params, batch, cfg, ops)
        loss = lambda params, batch, ops: qwen3.loss(params, batch, cfg, ops)
        return logits, xtf.value_and_grad(loss)(params, batch, ops)[1]
    run = xtf.shard(probe, *[bf16()] * (case.dtype == "masters"), specs=qwen3.specs(cfg))
    logits, grads = run(weights(shape, case), batch)
    return {"logits": logits.flatten(0, 1)} | {qwen3.names(cfg)[path]: g for path, g in tree.flatten_with_path(grads)}


def their_logits_and_grads(case: Case, shape: Shape, batch: Batch,
                           dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = hf_model(case, shape).to(dtype)
    (inputs, labels), = hf_inputs(case, batch)
    with torch.autocast(device.device().type, torch.bfloat16, enabled=case.dtype == "masters"):
        out = model(**inputs, labels=labels, num_items_in_batch=1)
    out.loss.backward()
    return {"logits": out.logits.detach().flatten(0, 1)} | {name: p.grad for name, p in model.named_parameters()}


def distances(got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """|got - reference| / |reference| in the 2-norm: of the logits, and of the gradient that is farthest."""
    if got.keys() != reference.keys():
        raise ValueError(f"gradients of {sorted(got.keys() ^ reference.keys())} are on one side only")
    apart = {name: ((got[name] - g).norm() / g.norm()).item() for name, g in reference.items()}
    return {"logits": apart.pop("logits"), "gradients": max(apart.values())}


def parity(shape: Shape, seq_len: int) -> list[dict]:
    """Ours and theirs, each against transformers in float64. Ours passes if it is at most twice as far as theirs."""
    batch = on_device(ragged(shape, 1, seq_len, seed=0))
    reference = their_logits_and_grads(Case("transformers", "fp32", "rows", "documents", "full"), shape, batch,
                                       torch.float64)
    rows = []
    for dtype in ("fp32", "masters"):
        ours = distances(our_logits_and_grads(Case(dtype=dtype), shape, batch), reference)
        theirs = distances(their_logits_and_grads(Case("transformers", dtype, "rows", "sdpa", "full"), shape, batch),
                           reference)
        for what in ours:
            rows.append({"products": dtype.replace("masters", "bf16"), "what": what, "ours": ours[what],
                         "theirs": theirs[what], "ok": ours[what] <= 2 * theirs[what]})
        free()
    return rows


# ---------------------------------------------------------------- training

def cases(rehearse: bool) -> list[Case]:
    packed = "varlen" if loops.varlen_attn is not None and device.device().type == "cuda" else "documents"
    hf = lambda *how: Case("transformers", "masters", *how)
    made = [Case(dtype="masters"), Case(dtype="masters", compile="layers"),
            hf("packs", "sdpa", "full"), hf("packs", packed, "full"), hf("packs", packed, "full", "layers"),
            hf("flat", packed, "chunked", "layers"), hf("packs", packed, "chunked")]
    return [c for c in made if not (rehearse and c.compile != "none")]


def train(case: Case, shape: Shape, packs: int, seq_len: int) -> dict:
    """`STEPS` steps, timed one by one (each waits for its loss), after `WARMUP` more on the first batch without
    counting them."""
    on_gpu = device.device().type != "cpu"
    before = torch.accelerator.memory_allocated() if on_gpu else 0
    step = make(case, shape)
    batches = [on_device(ragged(shape, packs, seq_len, seed)) for seed in range(STEPS)]
    losses, seconds = [], []
    for i in range(-WARMUP, STEPS):
        if on_gpu and i == 0:
            torch.accelerator.reset_peak_memory_stats()
        batch = batches[max(i, 0)]
        device.synchronize()
        start = time.perf_counter()
        losses.append(step(batch))
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = statistics.median(seconds[WARMUP:])
    return {"seconds": seconds[WARMUP:], "losses": losses, "tokens_per_s": packs * seq_len / rate,
            "mfu": statistics.median(flops(shape, b) / s for b, s in zip(batches, seconds[WARMUP:], strict=True))
            / device.peak_flops(torch.bfloat16),
            "memory": torch.accelerator.max_memory_allocated() - before - 16 * num_params(shape) if on_gpu else None}


def on_device(batch: Batch) -> Batch:
    return tree.tree_map(lambda x: x.to(device.device()), batch)


def free() -> None:
    gc.collect()
    torch.compiler.reset()
    if device.device().type != "cpu":
        torch.accelerator.empty_cache()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if device.device().type == "cpu" and not args.rehearse:
        parser.error("no accelerator here; --rehearse runs the same script at toy size")
    shape, packs, seq_len = (TOY, 2, 32) if args.rehearse else (QWEN3_06B, args.packs, args.seq_len)
    transformers.logging.set_verbosity_error()
    slug = re.sub(r"\W+", "-", device.name()).strip("-").lower()
    out = args.out or Path(__file__).parent / "results" / f"gpu-{slug}-{datetime.date.today()}.json"
    console = Console(width=None if sys.stdout.isatty() else 160)
    report: dict[str, Any] = {"capability": device.capability(), "torch": torch.__version__,
                              "transformers": transformers.__version__, "shape": shape._asdict(), "packs": packs,
                              "seq_len": seq_len, "flops": FLOPS, "memory": MEMORY}
    console.print(f"{report['capability']}; torch {report['torch']}, transformers {report['transformers']}",
                  highlight=False)

    report["parity"] = parity(shape, 32 if args.rehearse else 512)
    table = Table("products", "of", "ours", "transformers", "",
                  title="distance from transformers in float64, relative 2-norm (worst gradient)")
    for r in report["parity"]:
        table.add_row(r["products"], r["what"], f"{r['ours']:.1e}", f"{r['theirs']:.1e}",
                      "ok" if r["ok"] else "OURS IS MORE THAN TWICE AS FAR")
    console.print(table)

    report["training"] = []
    table = Table("case", "ms a step", "tokens/s", "MFU", "memory GB", "first loss", "last loss",
                  title=f"{STEPS} steps of {packs} packs of {seq_len} tokens")
    for case in cases(args.rehearse):
        try:
            row = train(case, shape, packs, seq_len)
            memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:.2f}"
            table.add_row(case.name, f"{1e3 * statistics.median(row['seconds']):.1f}", f"{row['tokens_per_s']:,.0f}",
                          f"{row['mfu']:.1%}", memory, f"{row['losses'][0]:.4f}", f"{row['losses'][-1]:.4f}")
        except Exception as e:  # out of memory, or a kernel that this device lacks: that case alone
            traceback.print_exc()
            row = {"failed": f"{type(e).__name__}: {e}"}
            table.add_row(case.name, "failed: " + type(e).__name__)
        report["training"].append({"case": case.name, **case._asdict(), **row})
        free()
    console.print(table)
    console.print(f"FLOPs: {FLOPS}\nmemory: {MEMORY}\n{out}", highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    return int(not all(r["ok"] for r in report["parity"])
               or any("failed" in r for r in report["training"] if r["who"] == "xtf"))


if __name__ == "__main__":
    sys.exit(main())
