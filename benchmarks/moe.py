"""A training step of Qwen3-MoE beside transformers' on this processor: `python benchmarks/moe.py`, or `--quick` for
minutes.

How cases run and what is compared: cpu.py and loops.py. Beside it, each in the same run: the layer of experts as a
fraction of its own products timed alone, AdamW beside torch's, and our step under the routings between even and all
tokens to one expert.
"""
import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cpu
import torch
from loops import BETAS, FLOPS, LR, TINY_MIXTURE, WEIGHT_DECAY, Case, Mixture, num_params, specs
from rich.console import Console
from rich.table import Table

import xtf
from xtf import device, moe, tree
from xtf.kernels import experts
from xtf.optim import adamw

LAYER = ("products: the nine of gate, up and down (forward, and for each gradient), expert by expert, into buffers "
         "that are there, nothing else; layer: router, statistics, dispatch, experts and the sum, forward and "
         "backward with fresh gradients")
BATCHED = ("batched_mm copies the experts' weights for each (token, expert) pair, {:.1f} GB a layer here, so it is "
           "compared at 64 tokens")

cpu.SERVER.set_forkserver_preload(["loops", "transformers.models.qwen3_moe.modeling_qwen3_moe"])


def groups(args: argparse.Namespace) -> list[cpu.Group]:
    hf = lambda experts, layout="rows", attention="sdpa", **more: Case("transformers", "fp32", layout, attention,
                                                                       "full", experts=experts, **more)
    shape, _, seq_len = tokens = (TINY_MIXTURE, 2, 32) if args.toy else (Mixture(), args.packs, args.seq_len)
    routed = cpu.Group("imbalance", [Case(routes=how) for how in ("even", "few", "one")], *tokens)
    if args.quick:
        made = [cpu.Group("fp32", [hf("grouped_mm"), hf("eager"), Case()], *tokens), routed]
    else:
        plain = [hf(experts, compile=compile) for experts in ("grouped_mm", "eager") for compile in ("none", "layers")]
        flat = hf("grouped_mm", "flat", "documents")
        ours = [Case(), Case(compile="layers")]
        more = [hf("grouped_mm", compile="model"), flat, flat._replace(compile="layers"),
                flat._replace(keep_pages=True)]
        made = [cpu.Group("fp32", [*plain, *more, *ours], *tokens),
                cpu.Group("fp32, one document a pack", [*plain[:2], plain[0]._replace(keep_pages=True), *ours], *tokens,
                          whole=True),
                cpu.Group("fp32, 64 tokens", [hf("batched_mm"), hf("grouped_mm"), Case()], shape, 1, min(64, seq_len)),
                routed]
    return [g for g in made if args.only in ("", g.title)]


# ---------------------------------------------------------------- parts, in this process

Times = dict[str, list[tuple[float, float]]]  # for each round (seconds, seconds of processor time)


def interleaved(parts: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Times of each part, after a round of warm-up."""
    times: Times = {name: [] for name in parts}
    for i in range(-1, rounds):
        for name in parts if i % 2 else reversed(parts):
            done = timed(parts[name])
            if i >= 0:
                times[name].append(done)
    return times


def timed(fn: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu_time = time.perf_counter(), time.process_time()
    kept = fn()
    spent = time.perf_counter() - wall, time.process_time() - cpu_time
    del kept  # gradients are freed between parts, as between steps
    return spent


def layer(shape: Mixture, tokens: int, rounds: int, compile: bool) -> dict:
    """One layer of experts, and its own products alone with the same numbers of rows."""
    p = xtf.init(specs(shape))["layers"][0]
    p = {name: p[name] for name in ("router", "experts")}
    leaves = [x.detach().requires_grad_() for x in tree.leaves(p)]
    p = tree.unflatten(leaves, p)
    router = moe.Router(shape.experts, shape.top_k, normalise=True)
    documents = torch.zeros(1, tokens, dtype=torch.int64)
    x_PtD, onto, g = (torch.randn(1, tokens, shape.hidden) for _ in range(3))
    x_PtD.requires_grad_()

    @moe.staged
    def block(p: Any, x_PtD: torch.Tensor) -> Any:
        yield from moe.layer(p, x_PtD, documents, 1, router, xtf.LOCAL, onto=onto, experts=moe.swiglu_experts)

    with torch.no_grad():
        chosen = block(p, x_PtD)[1]["experts"].flatten(0, 1).long()
    offsets = experts.announce(chosen, shape.experts).offsets_E
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    wide, narrow = (torch.randn(tokens * shape.top_k, width) for width in (shape.hidden, shape.width))
    products = partial(alone, sizes, [x.detach() for x in leaves[-3:]], {shape.hidden: wide, shape.width: narrow})
    a, b, out = torch.randn(3, 1024, 1024)
    run = lambda block: torch.autograd.grad(block(p, x_PtD)[0], [*leaves, x_PtD], g)
    parts = {"peak": lambda: [torch.mm(a, b, out=out) for _ in range(4)], "products": products,
             "layer": lambda: run(block)}
    if compile:
        compiled = torch.compile(block, fullgraph=True, dynamic=False)
        parts["layer, compiled"] = lambda: run(compiled)
    times = interleaved(parts, rounds)
    flops = 3 * 2 * tokens * shape.top_k * 3 * shape.hidden * shape.width
    pairs = lambda name: list(zip(times["products"], times[name], strict=True))
    ratios = lambda name: [statistics.median(p[clock] / t[clock] for p, t in pairs(name)) for clock in (0, 1)]
    rate = statistics.median(4 * 2 * 1024 ** 3 / t for _, t in times["peak"])
    of_peak = statistics.median(flops / t / rate for _, t in times["products"])
    return {"tokens": tokens, "times": times, "peak_flops_per_s": rate, "products_of_peak": of_peak, "what": LAYER,
            "of_products": {name: ratios(name) for name in times if name.startswith("layer")}}


def alone(sizes: list[int], weights: list[torch.Tensor], rows: dict[int, torch.Tensor]) -> None:
    """All products of the experts: y = x wᵀ, dx = g w and dw = gᵀ x of each weight."""
    for weight in weights:
        x, g = rows[weight.shape[2]], rows[weight.shape[1]]
        y, dx, dw = (KEPT.setdefault((name, like.shape), torch.empty_like(like))
                     for name, like in (("y", g), ("dx", x), ("dw", weight)))
        for x_nD, g_nF, y_nF, dx_nD, w_FD, dw_FD in zip(*(t.split(sizes) for t in (x, g, y, dx)), weight, dw,
                                                        strict=True):
            torch.mm(x_nD, w_FD.T, out=y_nF)
            torch.mm(g_nF, w_FD, out=dx_nD)
            torch.mm(g_nF.T, x_nD, out=dw_FD)


KEPT: dict[Any, torch.Tensor] = {}


def optimizers(shape: Mixture, rounds: int) -> Times:
    """A step of AdamW over all parameters: ours (update, then apply, state donated) and torch's, fused and foreach."""
    params = lambda: tree.tree_map(lambda x: x.detach().requires_grad_(), xtf.init(specs(shape)))
    grads = tree.tree_map(lambda p: torch.randn_like(p) * 1e-3, params())
    tx = adamw(LR, *BETAS, weight_decay=WEIGHT_DECAY)

    def train_step(state: Any, _: Any, ops: Any = xtf.LOCAL) -> Any:
        fresh = tree.tree_map(torch.clone, grads)  # gradients may always be overwritten
        wall, cpu_time = time.perf_counter(), time.process_time()
        updates, opt = tx.update(fresh, state.opt, state.params, ops)
        state = state.apply(updates, opt)
        spent.append((time.perf_counter() - wall, time.process_time() - cpu_time))
        return state, {}

    spent: list[tuple[float, float]] = []
    step = xtf.shard(train_step, xtf.transforms.jit(compile=False), specs=specs(shape))
    made = params()
    state = xtf.TrainState.create(made, tx.init(made))
    del made
    theirs = {}
    for kind in ("fused", "foreach"):
        leaves = tree.leaves(params())
        for leaf, grad in zip(leaves, tree.leaves(grads), strict=True):
            leaf.grad = grad
        theirs[f"torch.optim.AdamW, {kind}"] = torch.optim.AdamW(leaves, LR, BETAS, weight_decay=WEIGHT_DECAY,
                                                                 **{kind: True}).step

    def ours() -> None:
        nonlocal state
        state, _ = step(state, None)
    times = interleaved({"xtf.optim.adamw": ours, **theirs}, rounds)
    return times | {"xtf.optim.adamw": spent[-rounds:]}


# ---------------------------------------------------------------- what is shown

def imbalance(rows: list[dict], shape: Mixture) -> dict[str, dict]:
    """Time and memory of each routing as multiples of the even one's, medians of the ratios within a round.

    peak: resident memory, parameters, gradients and moments included; beyond: without them; tensors: as in the table.
    """
    even, *others = rows
    state = 16 * num_params(shape)
    paired = lambda what, r: statistics.median(b / a for a, b in zip(even[what], r[what], strict=True))
    return {r["routes"]: {"seconds": paired("seconds", r), "cpu_seconds": paired("cpu_seconds", r),
                          "peak": (r["memory"]["resident"] + state) / (even["memory"]["resident"] + state),
                          "beyond": r["memory"]["resident"] / even["memory"]["resident"],
                          "tensors": r["memory"]["tensors"] / even["memory"]["tensors"]} for r in others}


def table(title: str, times: Times) -> Table:
    out = Table("part", "ms", "CPU ms", title=title, title_justify="left")
    for name, each in times.items():
        out.add_row(name, *(f"{1e3 * statistics.median(t[clock] for t in each):.1f}" for clock in (0, 1)))
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, nothing compiled")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--only", default="", help='the group of this title alone, or "parts"')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--packs", type=int, default=1, help="each is a micro-batch of ours")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--profile", action="store_true", help="where our time goes, by operator")
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).parent / "results" / f"moe-{datetime.date.today()}.json")
    args = parser.parse_args(argv)
    if device.device().type != "cpu":
        parser.error("this machine has an accelerator; hide it")
    import transformers
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    shape = TINY_MIXTURE if args.toy else Mixture()
    copied = 4 * args.seq_len * shape.top_k * 3 * shape.hidden * shape.width / 1e9
    report: dict[str, Any] = {"capability": device.capability(), "torch": torch.__version__,
                              "transformers": transformers.__version__, "threads": args.threads, "rounds": args.rounds,
                              "params": num_params(shape), "memory": cpu.MEMORY, "flops": FLOPS,
                              "peak": cpu.PEAK, "batched_mm": BATCHED.format(copied), "groups": []}
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(f"{report['capability']}; torch {report['torch']}, transformers {report['transformers']}; "
                  f"{report['params'] / 1e6:.1f}M parameters",
                  highlight=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = groups(args)
    if not chosen and args.only != "parts":
        parser.error(f"--only {args.only!r}: there is no such group here; titles are those of the tables")
    for group in chosen:
        report["groups"].append(cpu.measure(group, args))
        cpu.show(console, report["groups"][-1])
        if group.title == "imbalance":
            report["imbalance"] = imbalance(report["groups"][-1]["rows"], shape)
            for how, r in report["imbalance"].items():
                console.print(f"  routes {how} against even: time {r['seconds']:.3f} ({r['cpu_seconds']:.3f} in CPU "
                              f"time), peak memory {r['peak']:.3f}, {r['beyond']:.3f} beyond parameters, gradients "
                              f"and moments, tensors {r['tensors']:.3f}",
                              highlight=False)
        args.out.write_text(json.dumps(report, indent=1))
    if args.only in ("", "parts"):
        device.keep_pages()
        report["layer"] = found = layer(shape, 64 if args.toy else args.seq_len, args.rounds, not args.quick)
        console.print(table(f"one layer of experts, {found['tokens']} tokens", found["times"]),
                      f"products {found['products_of_peak']:.2f} of peak",
                      *(f"{name} {wall:.2f} of its products ({cpu_time:.2f} in CPU time)"
                        for name, (wall, cpu_time) in found["of_products"].items()), sep="\n", highlight=False)
        report["adamw"] = optimizers(shape, args.rounds)
        console.print(table(f"AdamW over {report['params'] / 1e6:.1f}M parameters", report["adamw"]))
        args.out.write_text(json.dumps(report, indent=1))
    console.print(f"memory: {cpu.MEMORY}\nflops: {FLOPS}\npeak: {cpu.PEAK}\nlayer: "
                  f"{LAYER}\n{report['batched_mm']}\n{args.out}", highlight=False)


if __name__ == "__main__":
    main()
