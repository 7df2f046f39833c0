"""Our training step beside a plain transformers loop on this processor: `make bench`, or `python benchmarks/cpu.py
--quick` for minutes.

Every case is a process of its own that stays loaded and runs one step when told; a round runs each case once, on the
same tokens, one at a time. All times are medians over rounds, and a ratio is the median of the ratios within a round,
so that a machine which other people use too slows both sides alike. Each group compares like with like; what is
compared stands in loops.py.
"""
import argparse
import ctypes
import datetime
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loops import FLOPS, TINY, TINY_MIXTURE, Case, Mixture, Shape, Sizes, Step, flops, make, num_params, ragged
from rich.console import Console
from rich.table import Table

from xtf import device

THIN = Shape(hidden=64, intermediate=128, layers=28, heads=4, kv_heads=2, head_dim=16, vocab=512)
MEMORY = ("resident: VmHWM of one step after warm-up, less resident memory before the model is made (after a step of "
          "a tiny one), less parameters, gradients and moments. tensors: the most bytes of tensors that a step holds "
          "over those before it (torch.profiler), less gradients.")
PEAK = "torch.mm 1024³, in the dtype of the products, best of 5 in each round"


# libraries are imported once, and no thread is alive when a child is made
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["loops", "transformers.models.qwen3.modeling_qwen3"])


class Group(NamedTuple):
    """What is compared: cases, and the tokens that all of them get (`ragged` in loops.py)."""
    title: str
    cases: list[Case]
    shape: Sizes
    packs: int
    seq_len: int
    whole: bool = False
    trained: float = 1.0
    host: bool = False  # time outside kernels is what counts: memory and peak say nothing


def groups(args: argparse.Namespace) -> list[Group]:
    hf = lambda *how, **more: Case("transformers", "fp32", *how, **more)
    tokens = (TINY, 2, 32) if args.toy else (Shape(), args.packs, args.seq_len)
    thin = (THIN._replace(layers=2) if args.toy else THIN, 1, 16)
    if args.quick:
        few = [hf("rows", "sdpa", "full"), hf("flat", "documents", "full"), hf("packs", "documents", "chunked"), Case()]
        return [g for g in (Group("fp32", few, *tokens), Group("host time", [few[0], Case()], *thin, host=True))
                if args.only in ("", g.title)]
    ours = [Case(), Case(compile="layers")]
    plain = [hf("rows", "sdpa", "full"), hf("rows", "sdpa", "full", "layers")]
    documents = [hf("flat", "documents", "full"), hf("flat", "documents", "full", "layers")]
    many = [*plain, hf("rows", "sdpa", "full", "model"), hf("rows", "sdpa", "chunked", "layers"), *documents,
            hf("flat", "documents", "chunked"), plain[1]._replace(keep_pages=True),
            documents[0]._replace(keep_pages=True), *ours]
    made = [Group("fp32", many, *tokens),
            Group("fp32, one document a pack", [*plain, *ours], *tokens, whole=True),
            Group("fp32, loss on the second half of each document", [*plain, documents[0], *ours], *tokens,
                  trained=0.5),
            Group("host time", [*plain, documents[0], *ours], *thin, host=True)]
    if device.native_bf16():                                       # elsewhere theirs runs at a hundredth of the speed
        titles = {"masters": "bf16 over fp32 masters", "bf16": "pure bf16"}
        made[1:1] = [Group(title, [c._replace(dtype=dtype) for c in many], *tokens) for dtype, title in titles.items()]
    return [g for g in made if args.only in ("", g.title)]


# ---------------------------------------------------------------- one case, in its own process

def child(pipe: Any, case: Case | None, group: Group, threads: int) -> None:
    """Answer commands: ("step", seed), ("memory", seed), ("profile", seed) and None, the end. `case=None` measures the
    product peak.

    Every answer is (True, value) or (False, what went wrong).
    """
    torch.set_num_threads(threads)
    try:
        run = _peak(group) if case is None else _runner(case, group)
        pipe.send((True, None))
        while (command := pipe.recv()) is not None:
            pipe.send((True, run(*command)))
    except Exception as e:
        traceback.print_exc()
        pipe.send((False, traceback.format_exception_only(e)[0].splitlines()[0][:200]))


def _runner(case: Case, group: Group) -> Any:
    import transformers
    transformers.logging.set_verbosity_error()
    tiny = TINY_MIXTURE if isinstance(group.shape, Mixture) else TINY
    make(case, tiny)(ragged(tiny, 1, 16, 0))                       # whatever is loaded at a first step is loaded
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    step = make(case, group.shape)
    params = num_params(group.shape)
    gradients = params * case.weights.itemsize
    moments = 2 * params * (4 if case.who == "xtf" else case.weights.itemsize)

    def run(what: str, seed: int) -> Any:
        batch = ragged(group.shape, group.packs, group.seq_len, seed, group.whole, group.trained)
        if what == "step":
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(batch)
            return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "loss": loss,
                    "flops": flops(group.shape, batch)}
        if what == "profile":
            return _profile(step, batch)
        Path("/proc/self/clear_refs").write_text("5")              # VmHWM starts again
        step(batch)
        return {"resident": _status("VmHWM") - before - 2 * gradients - moments,
                "tensors": _tensors(step, batch) - gradients}
    return run


def _peak(group: Group) -> Any:
    a, b, out = torch.randn(3, 1024, 1024).to(torch.float32 if group.cases[0].dtype == "fp32" else torch.bfloat16)

    def run(what: str, seed: int) -> dict:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - start)
        return {"flops_per_s": 2 * 1024**3 / min(times[1:])}
    return run


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _tensors(step: Step, batch: Any) -> int:
    """The most bytes of tensors alive at once in a step, over those alive before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        step(batch)
    events: Any = p.profiler.kineto_results.events()               # type: ignore[union-attr]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes), default=0)


def _profile(step: Step, batch: Any) -> list[tuple[str, int, float]]:
    """(operator, calls, its share of the time spent in operators), largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        step(batch)
    rows = [(e.key, e.count, e.self_cpu_time_total) for e in p.key_averages()]
    total = sum(t for *_, t in rows)
    return sorted(((name, count, t / total) for name, count, t in rows), key=lambda r: -r[2])[:25]


# ---------------------------------------------------------------- all cases of a group, interleaved

class Child:
    """A case's process. `failed` says why it is gone."""

    def __init__(self, case: Case | None, group: Group, threads: int):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = SERVER.Process(target=child, args=(theirs, case, group, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.failed = ""
        self.steps: list[dict] = []

    def receive(self) -> Any:
        if self.failed:
            return None
        try:
            ok, value = self.pipe.recv()
        except EOFError:
            ok, value = False, f"the process ended with status {self.process.exitcode}; out of memory?"
        if not ok:
            self.failed = value
        return value if ok else None

    def ask(self, *command: Any) -> Any:
        if not self.failed:
            self.pipe.send(command)
        return self.receive()

    def end(self) -> None:
        if not self.failed:
            self.pipe.send(None)
        self.process.join()


def measure(group: Group, args: argparse.Namespace) -> dict:
    """Rounds over all cases; returns the group's rows, ready for the table and for JSON."""
    children = [Child(case, group, args.threads) for case in group.cases]
    peak = Child(None, group, args.threads)
    everyone = [peak, *children]
    for c in everyone:
        c.receive()                                                # loaded
    rounds = args.rounds * (5 if group.host else 1)
    for i in range(-args.warmup, rounds):
        for c in everyone if i % 2 else everyone[::-1]:
            result = c.ask("step", i)
            if result is not None and (i >= 0 or i == -args.warmup):
                c.steps.append(result)
        if group.host or i < 0 or args.toy:
            continue
        print(f"  {group.title}: round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for case, c in zip(group.cases, children, strict=True):
        memory = None if group.host else c.ask("memory", 0)
        profile = c.ask("profile", 0) if args.profile and case.who == "xtf" else None
        if c.failed:
            rows.append({"case": case.name, **case._asdict(), "failed": c.failed})
            continue
        first, *steps = c.steps
        rates = [p["flops_per_s"] for p in peak.steps[1:]]
        rows.append({"case": case.name, **case._asdict(), "first_loss": first["loss"], "memory": memory,
                     "profile": profile, "seconds": [s["seconds"] for s in steps],
                     "cpu_seconds": [s["cpu_seconds"] for s in steps],
                     "tokens_per_s": statistics.median(group.packs * group.seq_len / s["seconds"] for s in steps),
                     "of_peak":
                     statistics.median(s["flops"] / s["seconds"] / r for s, r in zip(steps, rates, strict=True))})
    for c in everyone:
        c.end()
    result = {"group": group.title, "shape": group.shape._asdict(), "tokens": group.packs * group.seq_len,
              "seq_len": group.seq_len, "host": group.host,
              "peak_flops_per_s": statistics.median(p["flops_per_s"] for p in peak.steps[1:]), "rows": rows}
    losses = [r["first_loss"] for r in rows if "failed" not in r]
    return result | {"compared": compare(rows), "loss_spread": (max(losses) - min(losses)) / min(losses)}


def compare(rows: list[dict]) -> dict[str, dict]:
    """Our fastest case against the fastest of some of theirs: time in theirs / ours, memory in ours / theirs."""
    fit = [r for r in rows if "failed" not in r]
    ours, theirs = ([r for r in fit if (r["who"] == "xtf") == mine] for mine in (True, False))
    fastest = lambda rows: min(rows, key=lambda r: statistics.median(r["seconds"]))
    out = {}
    for name, among in {"a plain loop": [r for r in theirs if r["attention"] == "sdpa" and not r["keep_pages"]],
                        "the best of theirs": [r for r in theirs if not r["keep_pages"]],
                        "the best of theirs, our allocator setting allowed": theirs}.items():
        if not ours or not among:
            continue
        best, peer = fastest(ours), fastest(among)
        paired = lambda what, best=best, peer=peer: statistics.median(
            t / o for o, t in zip(best[what], peer[what], strict=True))
        out[name] = {"ours": best["case"], "theirs": peer["case"], "speed": paired("seconds"),
                     "speed_in_cpu_time": paired("cpu_seconds")}
        if best["memory"]:
            smallest = min(among, key=lambda r: r["memory"]["resident"])
            out[name] |= {f"memory_{k}": best["memory"][k] / peer["memory"][k] for k in ("resident", "tensors")}
            out[name] |= {"smallest": smallest["case"],
                          "memory_resident_to_smallest": best["memory"]["resident"] / smallest["memory"]["resident"]}
    return out


# ---------------------------------------------------------------- what is shown

def show(console: Console, result: dict) -> None:
    scale, unit = (1e3, "ms") if result["host"] else (1, "s")
    table = Table(title=f"{result['group']}: {result['tokens']} tokens in packs of {result['seq_len']}, product peak "
                        f"{result['peak_flops_per_s'] / 1e9:.0f} GFLOP/s", title_justify="left")
    for head in ("case", f"{unit} a step", f"CPU {unit}", "tokens/s", "of peak", "resident MB", "tensors MB",
                 "first loss"):
        table.add_column(head, justify="left" if head == "case" else "right")
    for r in sorted(result["rows"], key=lambda r: statistics.median(r.get("seconds", [math.inf]))):
        if "failed" in r:
            table.add_row(r["case"], "failed")
            continue
        memory = ["", ""] if r["memory"] is None else [f"{r['memory'][k] / 1e6:,.0f}" for k in ("resident", "tensors")]
        table.add_row(r["case"], f"{scale * statistics.median(r['seconds']):.3f}",
                      f"{scale * statistics.median(r['cpu_seconds']):.3f}", f"{r['tokens_per_s']:,.0f}",
                      "" if result["host"] else f"{r['of_peak']:.2f}", *memory, f"{r['first_loss']:.5f}",
                      style="bold" if r["who"] == "xtf" else "")
    console.print(table)
    for r in result["rows"]:
        if "failed" in r:
            console.print(f"  {r['case']} failed: {r['failed']}", style="red", highlight=False)
    for name, c in result["compared"].items():
        text = (f"{c['ours']} against {name} ({c['theirs']}): {c['speed']:.3f} times as fast "
                f"({c['speed_in_cpu_time']:.3f} in CPU time)")
        if "smallest" in c:
            text += (f"; memory {c['memory_resident']:.2f} resident, {c['memory_tensors']:.2f} tensors; "
                     f"resident {c['memory_resident_to_smallest']:.2f} of their smallest ({c['smallest']})")
        console.print("  " + text, highlight=False)
    for r in result["rows"]:
        for op, calls, share in r.get("profile") or []:
            console.print(f"  {r['case']}: {share:6.1%} {calls:6} {op}", highlight=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, fp32 alone, nothing compiled")
    parser.add_argument("--toy", action="store_true",
                        help="a tiny model, to see that everything runs (with --quick: seconds)")
    parser.add_argument("--only", default="", help="the group of this title alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7,
                        help="of which medians are taken (5 times as many where only host time is measured)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--packs", type=int, default=1, help="each is a micro-batch of ours")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--profile", action="store_true", help="where our time goes, by operator")
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).parent / "results" / f"cpu-{datetime.date.today()}.json")
    args = parser.parse_args(argv)
    if device.device().type != "cpu":
        parser.error("this machine has an accelerator; use benchmarks/gpu.py, or hide it")
    import transformers
    torch.set_num_threads(args.threads)
    # the children's: idle pools would take time from the others
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    report: dict[str, Any] = {"capability": device.capability(), "torch": torch.__version__,
                              "transformers": transformers.__version__, "threads": args.threads, "rounds": args.rounds,
                              "memory": MEMORY, "flops": FLOPS, "peak": PEAK, "groups": []}
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(f"{report['capability']}; torch {report['torch']}, transformers {report['transformers']}",
                  highlight=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = groups(args)
    if not chosen:
        parser.error(f"--only {args.only!r}: there is no such group here; titles are those of the tables")
    for group in chosen:
        report["groups"].append(measure(group, args))
        show(console, report["groups"][-1])
        args.out.write_text(json.dumps(report, indent=1))
    console.print(f"memory: {MEMORY}\nflops: {FLOPS}\npeak: {PEAK}\n{args.out}", highlight=False)


if __name__ == "__main__":
    main()
