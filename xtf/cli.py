"""What recipes share that is not training: flags, starting up, and reading data. The step itself stands in the recipe."""
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch
import tyro
from torch.distributed.device_mesh import DeviceMesh

from xtf import device, tree
from xtf.data import Sample, read_samples, split_off
from xtf.layout import PACK_AXES, parse_mesh
from xtf.parallel import fsdp, mesh, ulysses
from xtf.parallel.mesh import is_main
from xtf.shard import Transform
from xtf.transforms import bf16, jit, remat


class Flags(msgspec.Struct, kw_only=True, frozen=True):
    """Flags of a fine-tuning recipe."""
    model: str
    """Hugging Face directory to start from."""
    data: str
    """JSONL file of chats to train on."""
    out: str
    """Directory for metrics.jsonl, loss.png, tensorboard/ and hf/ (the result, as transformers loads it)."""
    eval_data: str | None = None
    """JSONL file held out."""
    eval_fraction: float = 0.0
    """Without --eval-data: the share of --data to hold out."""
    eval_every: int = 0
    """Evaluate every so many steps too, not just before and after."""
    steps: int = 100
    seq_len: int = 2048
    """Tokens of a pack, which is a micro-batch."""
    batch_tokens: int = 16384
    """Tokens of a step over all ranks, a multiple of --seq-len times the ranks that hold different packs."""
    lr: float = 1e-5
    """Peak learning rate, of a cosine down to a tenth."""
    warmup: float = 0.03
    """The fraction of --steps in which the rate rises."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Global gradient norm."""
    seed: int = 0
    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Computation; parameters, moments and reductions are fp32."""
    mesh: str = ""
    """Sizes of dp, ep, sp, replicate, e.g. dp=2,sp=2; those unnamed are 1 (dp alone takes all ranks if none is named)."""
    remat: bool = False
    """Recompute each block in backward."""
    compile: bool = msgspec.field(default_factory=lambda: device.device().type != "cpu")
    """Compile each block."""
    resume: str | None = None
    """Not there yet: refused."""
    dry_run: bool = False
    """Print what each rank would store, and stop."""
    threads: int = 0
    """CPU threads a rank; 0 divides the machine's."""


F = TypeVar("F", bound=Flags)


def parse(kind: type[F], argv: Sequence[str] | None = None, description: str | None = None) -> F:
    """Flags from the command line, checked.

    Raises SystemExit, naming the flag, where one is missing, malformed, contradicts another or is not there yet.

    >>> parse(Flags, ["--model", ".", "--data", ".", "--out", "runs", "--steps", "3"]).steps
    3
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(a.split("=")[0] == "--resume" for a in argv):
        raise SystemExit("--resume: not supported yet; start a run in a new --out")
    flags = tyro.cli(kind, args=argv, description=description)
    if flags.dtype == "fp8":
        raise SystemExit("--dtype fp8: not supported yet; use fp32 or bf16")
    for name in ("steps", "seq_len", "batch_tokens"):
        if getattr(flags, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if flags.batch_tokens % flags.seq_len:
        raise SystemExit(f"--batch-tokens {flags.batch_tokens}: must be a multiple of --seq-len {flags.seq_len}, since a micro-batch is one pack")
    for name, value in (("--model", flags.model), ("--data", flags.data), ("--eval-data", flags.eval_data)):
        if value is not None and not Path(value).exists():
            raise SystemExit(f"{name} {value}: no such file or directory")
    return flags


def start(flags: Flags) -> DeviceMesh | None:
    """Join the ranks that torchrun started, keep the allocator's pages, and make the mesh.

    Raises ValueError if the mesh does not fit the ranks, or the batch does not divide over it.
    """
    _, world = device.init_process_group()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device.keep_pages()
    sizes = parse_mesh(flags.mesh) or ({"dp": world} if world > 1 else {})
    made = mesh(**sizes)
    packs, ranks = flags.batch_tokens // flags.seq_len, math.prod(sizes.get(axis, 1) for axis in PACK_AXES)
    if packs % ranks:
        raise ValueError(f"--batch-tokens {flags.batch_tokens} is {packs} packs of --seq-len {flags.seq_len}, which do not divide "
                         f"over the {ranks} ranks of replicate × dp × ep; change one of them")
    return made


def transforms(flags: Flags, training: bool = True) -> tuple[Transform, ...]:
    """The layout that the flags ask for. An evaluation must not donate its state."""
    out = [fsdp("dp", "ep", "sp"), ulysses("sp"), jit(compile=flags.compile, donate=training)]
    if flags.dtype == "bf16":
        out.append(bf16())
    if flags.remat:
        out.append(remat())
    return tuple(out)


def samples(flags: Flags, tokenizer: Any, vocab_size: int) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out) samples; rank 0 says what became of the lines."""
    train, stats = read_samples(flags.data, tokenizer, flags.seq_len, vocab_size=vocab_size)
    say(f"{flags.data}: {stats}")
    if flags.eval_data:
        held_out, stats = read_samples(flags.eval_data, tokenizer, flags.seq_len, vocab_size=vocab_size)
        say(f"{flags.eval_data}: {stats}")
        if not held_out:
            raise ValueError(f"--eval-data {flags.eval_data}: no sample in it has a token that carries loss; give another file or leave the flag out")
        return train, held_out
    return split_off(train, flags.eval_fraction, flags.seed) if flags.eval_fraction else (train, [])


def on_device(values: tree.Tree) -> tree.Tree:
    """The tree on this process's device; DTensors are there already."""
    where = device.device()
    move = lambda x: x.detach().to(where, non_blocking=True).requires_grad_(x.requires_grad)
    return tree.tree_map(lambda x: x if x.device.type == where.type else move(x), values)


def say(text: str) -> None:
    """Print, on rank 0."""
    if is_main():
        print(text, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a recipe's main; what a user can mend is one line on stderr and exit status 1."""
    code = 0
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 1
    if torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(code)             # gloo's threads may abort an interpreter that takes itself apart (seen once in 8 runs of two ranks)
    if code:
        raise SystemExit(code)
