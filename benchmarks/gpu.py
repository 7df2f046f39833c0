"""One accelerator, one command of under nine minutes: `python benchmarks/gpu.py`. Whether it computes what it should,
and how fast it trains.

In this order: kernels against float64, two layers of each family beside transformers in float64, no host
synchronisation within a step, what slots for documents cost, and training at the shapes of Qwen3-0.6B (beside
transformers), Qwen3-4B and six layers of Qwen3-30B-A3B. Each case is printed, and the report rewritten, as soon as it
ends; one that raises is reported, and the others go on. What would start after `--minutes` is left out. The exit status
is 1 if anything of ours failed. `--rehearse` runs all of it at toy size on any machine, save what torch.compile takes
long to make.
"""
import argparse
import datetime
import os
import re
import sys
import time
from pathlib import Path

import gpu_families
import gpu_kernels
import gpu_training
import torch
import transformers
from reported import Part, Reported

from xtf import device


def parts(args: argparse.Namespace, out: Path) -> list[Part]:
    return [gpu_kernels.part(args.rehearse), gpu_families.parity(args.rehearse), gpu_families.no_waits(args.rehearse),
            gpu_families.slots(args.rehearse),
            *gpu_training.parts(args.rehearse, args.packs, args.seq_len, out)]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="at toy size, on any machine")
    parser.add_argument("--minutes", type=float, default=9, help="after which nothing is started any more")
    parser.add_argument("--packs", type=int, default=4, help="of a training step; each is a micro-batch of ours")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2 ** 31, help="of what kernels are given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with the report in --out, after its last case")
    args = parser.parse_args(argv)
    if device.device().type == "cpu" and not args.rehearse:
        parser.error("no accelerator here; --rehearse runs the same script at toy size")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    slug = re.sub(r"\W+", "-", device.name()).strip("-").lower()
    out = args.out or Path(__file__).parent / "results" / f"gpu-{slug}-{datetime.date.today()}.json"
    head = {"capability": device.capability(), "torch": torch.__version__, "transformers": transformers.__version__,
            "packs": args.packs, "seq_len": args.seq_len, "seed": args.seed, "rehearsal": args.rehearse}
    print("{capability}; torch {torch}, transformers {transformers}, seed {seed}".format(**head), flush=True)
    command = [sys.executable, __file__, *argv, "--out", str(out), "--resume"]
    return Reported(out, head, args.minutes, args.resume).run(parts(args, out), lambda: os.execv(command[0], command))


if __name__ == "__main__":
    sys.exit(main())
