"""Save and restore beside torch.distributed.checkpoint: time and memory, medians of interleaved rounds.

    python benchmarks/checkpoint.py                      # 1 GB on 1 and on 4 ranks
    python benchmarks/checkpoint.py --small              # a few MB, to see that it runs

Both sides save the same tree (parameters and two moments of a transformer, fp32) to the same disk, with checksums
(crc32c ours; the crc32 of torch.save theirs, which their load does not look at) and fsync of every file (ours: and
folder), and restore it into memory that exists. Time is the slowest rank's, `ratio` that of the medians and `paired`
the median of the rounds' own ratios; cpu is processor time of all ranks, which others on the machine disturb less;
memory is what all ranks together needed at their peak beyond what they held before. What is restored is compared bit
for bit. `stall` is how long `save` keeps the training waiting when it works in the background, `first` the same where
its buffers have to be made; `step` is the time that the products alone of a training step of this model on 2048 tokens
take here on every rank at once (6 × parameters × tokens, at the rate of torch.mm), so a step takes longer. `load` is of
the last minute, at the end.
"""
import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from xtf import tree
from xtf.checkpoint import Checkpoints
from xtf.layout import Place
from xtf.testing import Pool


def shapes(small: bool) -> dict[str, tuple[int, ...]]:
    """A transformer's parameters: 84.9 million, 1.02 GB with two moments; or 0.1 million."""
    width, layers, vocab = (64, 2, 512) if small else (768, 8, 32768)
    out: dict[str, tuple[int, ...]] = {"embed": (vocab, width)}
    for i in range(layers):
        for name, shape in {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width),
                            "gate": (3 * width, width), "up": (3 * width, width), "down": (width, 3 * width),
                            "norm1": (width,), "norm2": (width,)}.items():
            out[f"layers.{i}.{name}"] = shape
    return out | {"norm": (width,)} | ({} if small else {"more": (vocab // 8, width)})


def tree_of(mesh: DeviceMesh, small: bool, fill: bool) -> dict[str, dict[str, DTensor]]:
    torch.manual_seed(dist.get_rank())
    place = Place(mesh, (Shard(0),))

    def leaf(shape: tuple[int, ...]) -> DTensor:
        size = place.box(shape)[1]
        return place.from_local(torch.randn(size) if fill else torch.full(size, 7.0), shape)
    return {part: {name: leaf(shape) for name, shape in shapes(small).items()} for part in ("params", "mu", "nu")}


def memory(key: str) -> float:
    """GB of this process: VmRSS is now, VmHWM the peak since `reset`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024 / 1e9


def measured(fn) -> dict[str, float]:
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    fn()
    cpu = time.process_time() - cpu
    dist.barrier()
    return {"seconds": time.perf_counter() - start, "gb": memory("VmHWM") - before, "cpu": cpu}


def step_seconds(small: bool) -> float:
    """The products of one training step, on all ranks at once; from a fiftieth of them."""
    tokens, width = 2048, 64 if small else 768
    x, w = torch.randn(tokens, width), torch.randn(width, 3 * width)
    products = 6 * sum(torch.Size(s).numel() for s in shapes(small).values()) / (2 * w.numel())
    some = math.ceil(products / 50)
    return measured(lambda: [x @ w for _ in range(some)])["seconds"] * products / some


def one_round(folder: str, small: bool, first: int) -> dict[str, dict[str, float]]:
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()), mesh_dim_names=("dp",))
    state, into = tree_of(mesh, small, True), tree_of(mesh, small, False)
    out = {}
    with Checkpoints(f"{folder}/ours", background=False) as ours:
        ours.save(1, state, {})                                          # JAX is imported once in a run
        sides = {"ours": (lambda: ours.save(2, state, {}), lambda: ours.restore(into, 2)),
                 "DCP": (lambda: dcp.save(state, checkpoint_id=f"{folder}/dcp"),
                         lambda: dcp.load(into, checkpoint_id=f"{folder}/dcp"))}
        order = list(sides)[::-1 if first else 1]  # the one that goes first may leave the disk busy
        for who in order:
            out[f"save {who}"] = measured(sides[who][0])
        for who in order:
            for x in tree.leaves(into):
                x.to_local().fill_(7.0)
            out[f"restore {who}"] = measured(sides[who][1])
            assert all(torch.equal(a.to_local(), b.to_local())
                       for a, b in tree.zip_leaves(state, into)), f"{who}: not what was saved"
    with Checkpoints(f"{folder}/ours") as ours:
        for step, key in ((3, "first ours"), (4, "stall ours")):
            out[key] = measured(lambda step=step: ours.save(step, state, {}))
            ours.wait()
    out["step ours"] = {"seconds": step_seconds(small), "gb": 0.0, "cpu": 0.0}
    if dist.get_rank() == 0:
        shutil.rmtree(f"{folder}/ours")
        shutil.rmtree(f"{folder}/dcp")
    return out


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--small", action="store_true")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    flags.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    flags.add_argument("--out", help="write the figures as JSON")
    args = flags.parse_args()
    folder = tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder)
    nbytes, cores = 12 * sum(torch.Size(s).numel() for s in shapes(args.small).values()), os.cpu_count()
    rows: list[dict] = []
    print(f"{nbytes / 1e9:.3f} GB, {3 * len(shapes(args.small))} leaves, medians of {args.rounds} interleaved rounds, "
          f"{cores} cores")
    print(f"{'ranks':>5}  {'what':8} {'ours s':>8} {'DCP s':>8} {'ratio':>6} {'paired':>6}   {'ours GB':>8} "
          f"{'DCP GB':>8}   {'ours cpu':>8} {'DCP cpu':>8}")
    try:
        for ranks in args.ranks:
            rounds: list[dict[str, dict[str, float]]] = []
            pool = Pool(ranks, timeout=600)
            for i in range(args.rounds):
                by_rank = pool.run(one_round, folder, args.small, i % 2)
                add = {"seconds": max, "gb": sum, "cpu": sum}
                rounds.append({k: {q: f(r[k][q] for r in by_rank) for q, f in add.items()} for k in by_rank[0]})
            pool.close()
            middle = {k: {q: statistics.median(r[k][q] for r in rounds) for q in rounds[0][k]} for k in rounds[0]}
            for what in ("save", "restore"):
                a, b = middle[f"{what} ours"], middle[f"{what} DCP"]
                pairs = [(r[f"{what} ours"]["seconds"], r[f"{what} DCP"]["seconds"]) for r in rounds]
                row = {"ranks": ranks, "what": what, "ours": a, "dcp": b, "ratio": a["seconds"] / b["seconds"],
                       "paired": statistics.median(x / y for x, y in pairs), "seconds": pairs}
                rows.append(row)
                print(f"{ranks:>5}  {what:8} {a['seconds']:8.3f} {b['seconds']:8.3f} {row['ratio']:6.2f} "
                      f"{row['paired']:6.2f}   {a['gb']:8.3f} {b['gb']:8.3f}   {a['cpu']:8.3f} {b['cpu']:8.3f}",
                      flush=True)
            for key in ("first", "stall", "step"):
                print(f"{ranks:>5}  {key:8} {middle[f'{key} ours']['seconds']:8.3f}", flush=True)
            print(f"{ranks:>5}  {'load':8} {os.getloadavg()[0]:8.1f}", flush=True)
            rows.append({"ranks": ranks, "what": "stall"}
                        | {key: middle[f"{key} ours"]["seconds"] for key in ("first", "stall", "step")})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.out:
        Path(args.out).write_text(json.dumps({"bytes": nbytes, "rounds": args.rounds, "cores": cores, "rows": rows},
                                             indent=1))


if __name__ == "__main__":
    main()
