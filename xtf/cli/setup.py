"""From flags to what a recipe works with: mesh, transforms, parameters, tokenizer and data."""
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import device, init, models, peft, tree
from xtf.cli.flags import ExpertFlags, Flags, PretrainFlags
from xtf.cli.ranks import on_device, say
from xtf.data import Encoder, Loader, open_data
from xtf.data.tokenizer import load as load_tokenizer
from xtf.layout import PACK_AXES, parse_mesh, table
from xtf.parallel import ep, exact, fsdp, is_main, mesh, static, ulysses
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


def model(flags: Flags, *families: ModuleType, other: str) -> tuple[ModuleType, Any]:
    """(the family's module, the decoded config) of --model.

    Raises ValueError where it is none of `families`, with `other` as what to say of it, where `sp` does not divide its
    query heads, and as `models.from_hf`.
    """
    module, cfg = models.from_hf(flags.model, say)
    if module not in families:
        raise ValueError(f"--model {flags.model}: {module.__name__} {other}")
    if cfg.num_attention_heads % (sp := parse_mesh(flags.mesh).get("sp", 1)):
        raise ValueError(f"--mesh {flags.mesh}: sp={sp} does not divide the {cfg.num_attention_heads} query heads of "
                         f"--model {flags.model}")
    return module, cfg


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


def step_specs(flags: Flags, specs: tree.Tree) -> tree.Tree:
    """A model's specs as the flags' transforms leave them: what `shard` has in `.specs`."""
    for transform in sorted(transforms(flags), key=lambda t: t.stage):
        specs = transform.specs(specs)
    return specs


def micro_packs(flags: Flags) -> int:
    """Packs of a micro-batch: two where their messages and compute overlap."""
    return 2 if isinstance(flags, ExpertFlags) and flags.overlap else 1


def adapter(flags: Flags) -> Any:
    """The transform that --lora asks for."""
    return lora(flags.lora, flags.lora_alpha, flags.lora_targets or None,
                torch.bfloat16 if flags.dtype == "bf16" else None)


def load(flags: Flags, step: Any, names: Mapping[str, str]) -> tree.Tree:
    """The parameters of a sharded step: the weights of --model, and with --lora adapters as they are drawn.

    In pre-training all are drawn if --from-scratch says so, or --model has no weights.

    Raises ValueError or OSError naming what is wrong with the files.
    """
    if isinstance(flags, PretrainFlags) and (flags.from_scratch or not any(Path(flags.model).glob("*.safetensors"))):
        return on_device(init(step.specs, flags.seed, step.layout))
    return on_device(peft.start(flags.model, step.specs, names, step.layout, flags.seed))


def tokenizer(flags: Flags) -> Any:
    """The tokenizer of --model; one that is code of its own needs --trust-remote-code."""
    return load_tokenizer(flags.model, flags.trust_remote_code)


def data(flags: Flags, vocab_size: int) -> tuple[Loader, Any]:
    """(the loader of training data, held-out data for `Run.begin`); rank 0 says what became of the lines."""
    encoder = Encoder(tokenizer(flags), train_on_everything=flags.train_on_everything, vocab_size=vocab_size)
    train, held_out = open_data(flags.data, encoder, flags.seq_len, eval_data=flags.eval_data,
                                eval_fraction=flags.eval_fraction, seed=flags.seed, on_bad=flags.on_bad_line, say=say,
                                folder=flags.cache)
    return Loader(train, flags.seq_len, flags.batch_tokens // flags.seq_len, flags.seed,
                  group_by_length=flags.group_by_length), held_out


def shown(flags: Flags, step: Any, vocab_size: int) -> bool:
    """Whether --dry-run (what each rank stores) or --show-batch (the first batch, its tokens coloured by loss) asked
    for a look: rank 0 has printed it, and nothing is to be trained."""
    if flags.dry_run:
        say(table(step.specs, step.layout))
    elif flags.show_batch:
        batch = data(flags, vocab_size)[0].step(0)
        if is_main():
            from xtf.data.show import show
            show(batch, tokenizer(flags))
    return flags.dry_run or flags.show_batch
