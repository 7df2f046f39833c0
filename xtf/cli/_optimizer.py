"""Steps and their optimizer: the flags, and what they make. One more such flag is a change to this file alone
(and a row of the README's table)."""
from dataclasses import dataclass
from typing import Literal

from xtf import optim, tree
from xtf.optim import schedules
from xtf.spec import matrices


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How many steps, of how many tokens, and what each does to the parameters."""
    steps: int = 100
    seq_len: int = 2048
    """Tokens of a pack, which is a micro-batch."""
    batch_tokens: int = 16384
    """Tokens of a step over all ranks, a multiple of --seq-len times the ranks that hold different packs."""
    lr: float = 1e-5
    """Peak learning rate."""
    warmup: float = 0.03
    """The fraction of --steps in which the rate rises."""
    weight_decay: float = 0.1
    """Of matrices; norms, biases and sinks never decay."""
    clip: float = 1.0
    """Global gradient norm."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """How AdamW keeps its moments."""
    max_skipped: int = 10
    ("Give up after so many steps in a row with a loss or norm that is not finite or beyond 6 sigma: each is skipped "
     "and counted.")


@dataclass(frozen=True, kw_only=True)
class PretrainOptimizerFlags(OptimizerFlags):
    """Those of pre-training."""
    lr: float = 3e-4
    """Peak learning rate: of a warm-up, a plateau, and a decay to nothing (WSD)."""
    decay: float = 0.2
    """The fraction of --steps in which the rate falls."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the layers' matrices at the same rate; adamw the rest, or all."""


def optimizer(flags: OptimizerFlags, specs: tree.Tree) -> tuple[optim.Optimizer, schedules.Schedule, optim.Guard]:
    """(optimizer, its schedule, guard): clipping, then AdamW, or in pre-training, if asked for, Muon for the layers'
    matrices.

    In fine-tuning the rate is a cosine, in pre-training WSD's. Only matrices decay, as the model's `specs` have them.
    """
    if isinstance(flags, PretrainOptimizerFlags):
        schedule = schedules.wsd(flags.lr, flags.steps, flags.warmup, flags.decay)
    else:
        schedule = schedules.cosine(flags.lr, flags.steps, flags.warmup)
    tx = optim.adamw(schedule, weight_decay=flags.weight_decay, mask=matrices(specs), moments=flags.moments)
    if isinstance(flags, PretrainOptimizerFlags) and flags.optimizer == "muon":
        hidden = optim.hidden_matrices(specs)
        tx = optim.partition({"muon": optim.muon(schedule, weight_decay=flags.weight_decay), "adamw": tx},
                             lambda path, leaf: "muon" if hidden(path, leaf) else "adamw")
    return optim.chain(optim.clip_by_global_norm(flags.clip), tx), schedule, guard(flags)


def guard(flags: OptimizerFlags) -> optim.Guard:
    """What says of each step whether to take it, and when to give up."""
    return optim.guard(patience=flags.max_skipped)
