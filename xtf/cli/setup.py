"""From flags to what a recipe works with: mesh, transforms, parameters, tokenizer and data."""
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import device, peft, tree
from xtf.cli.flags import ExpertFlags, Flags
from xtf.data import Batch, Encoder, Loader, open_data
from xtf.data.tokenizer import load as load_tokenizer
from xtf.layout import PACK_AXES, parse_mesh
from xtf.parallel import Overflow, ep, exact, fsdp, is_main, mesh, static, ulysses
from xtf.transform import Transform
from xtf.transforms import bf16, fp64, jit, lora, overlap, remat


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
        raise ValueError(f"--batch-tokens {flags.batch_tokens} is {packs} packs of --seq-len {flags.seq_len}, which "
                         f"do not divide over the {ranks} ranks of replicate × dp × ep; change one of them")
    if packs // ranks % micro_packs(flags):
        raise ValueError(f"--overlap: a rank has {packs // ranks} packs a step, an odd number; change --batch-tokens "
                         "or --mesh")
    return made


def transforms(flags: Flags, training: bool = True) -> tuple[Transform, ...]:
    """The layout that the flags ask for. An evaluation must not donate its state."""
    out = [fsdp("dp", "ep", "sp"), ulysses("sp"), jit(compile=flags.compile, donate=training)]
    if flags.dtype in ("bf16", "fp64"):
        out.append(bf16() if flags.dtype == "bf16" else fp64())
    if flags.remat:
        out.append(remat())
    if flags.lora:
        out.append(adapter(flags))
    if isinstance(flags, ExpertFlags):
        bounded = training and flags.expert_rows
        out.append(ep(flags.experts_on, static(flags.expert_rows, flags.expert_pairs) if bounded else exact()))
    if training and micro_packs(flags) == 2:
        out.append(overlap())
    return tuple(out)


def micro_packs(flags: Flags) -> int:
    """Packs of a micro-batch: two where their messages and compute overlap."""
    return 2 if isinstance(flags, ExpertFlags) and flags.overlap else 1


def adapter(flags: Flags) -> Any:
    """The transform that --lora asks for."""
    return lora(flags.lora, flags.lora_alpha, flags.lora_targets or None,
                torch.bfloat16 if flags.dtype == "bf16" else None)


def load(flags: Flags, step: Any, names: Mapping[str, str]) -> tree.Tree:
    """The parameters of a sharded step: the weights of --model, and with --lora adapters as they are drawn.

    Raises ValueError or OSError naming what is wrong with the files.
    """
    return on_device(peft.start(flags.model, step.specs, names, step.layout, flags.seed))


def tokenizer(flags: Flags) -> Any:
    """The tokenizer of --model; one that is code of its own needs --trust-remote-code."""
    return load_tokenizer(flags.model, flags.trust_remote_code)


def data(flags: Flags, tokenizer: Any, vocab_size: int) -> tuple[Loader, Any]:
    """(the loader of training data, held-out data for `eval_batches`); rank 0 says what became of the lines."""
    encoder = Encoder(tokenizer, train_on_everything=flags.train_on_everything, vocab_size=vocab_size)
    train, held_out = open_data(flags.data, encoder, flags.seq_len, eval_data=flags.eval_data,
                                eval_fraction=flags.eval_fraction, seed=flags.seed, on_bad=flags.on_bad_line, say=say,
                                folder=flags.cache)
    return Loader(train, flags.seq_len, flags.batch_tokens // flags.seq_len, flags.seed,
                  group_by_length=flags.group_by_length), held_out


def show(batch: Batch, tokenizer: Any) -> None:
    """Print a batch on rank 0, its tokens coloured by loss."""
    if is_main():
        from xtf.data.show import show
        show(batch, tokenizer)


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
    except (ValueError, OSError, Overflow) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 1
    except SystemExit as e:  # a signal's, once all is saved; or flags that are wrong
        if not isinstance(e.code, int | None):
            print(e.code, file=sys.stderr, flush=True)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    if torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.barrier()
        sys.stdout.flush()
        # gloo's threads may abort an interpreter that takes itself apart (seen once in 8 runs of two ranks)
        os._exit(code)
    if code:
        raise SystemExit(code)
