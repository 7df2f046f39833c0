"""The flags of recipes, and what is checked of them before anything starts."""
import math
import sys
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec
import tyro

from xtf import device
from xtf.data.read import model_path
from xtf.data.sources import CACHE


class Flags(msgspec.Struct, kw_only=True, frozen=True):
    """Flags of a fine-tuning recipe."""
    model: str
    """Directory in Hugging Face's format to start from, or an id on the hub."""
    data: tuple[str, ...]
    """Files, folders, globs or hub ids to train on; SOURCE=WEIGHT gives a source that share of the tokens. See
    docs/data-formats.md."""
    out: str
    """Directory for what the run leaves: run.json, metrics.jsonl, loss.png, tensorboard/, checkpoints/ and hf/ (the
    model)."""
    eval_data: tuple[str, ...] = ()
    """Held-out files."""
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
    """Peak learning rate."""
    warmup: float = 0.03
    """The fraction of --steps in which the rate rises."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Global gradient norm."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """How AdamW keeps its moments."""
    max_skipped: int = 10
    """Give up after so many steps in a row with a loss or norm that is not finite or beyond 6 sigma: each is skipped
    and counted."""
    seed: int = 0
    dtype: Literal["fp32", "bf16", "fp8", "fp64"] = "fp32"
    """Computation; parameters and reductions are fp32, but for fp64, which is float64 throughout: to tell mistakes from
    rounding."""
    mesh: str = ""
    """Sizes of dp, ep, sp, replicate, e.g. dp=2,sp=2; those unnamed are 1 (dp alone takes all ranks if none is
    named)."""
    remat: bool = False
    """Recompute each block in backward."""
    lora: int = 0
    """Freeze the model and train adapters of this rank beside its products; with bf16 the frozen matrices are stored in
    bf16."""
    lora_alpha: float | None = None
    """Adapters are multiplied by alpha over rank; by default alpha is twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Products to adapt, by node or part of its path (q, experts, layers.0.mlp); by default all but vocabulary and
    routers."""
    trust_remote_code: bool = False
    """Run the tokenizer code that the model's directory brings (Kimi K2 has such)."""
    compile: bool = msgspec.field(default_factory=lambda: device.device().type != "cpu")
    """Compile each block."""
    resume: str | None = None
    """`auto`: go on from the newest checkpoint in --out, if there is one. Or the directory of any checkpoint, like
    runs/a/checkpoints/100."""
    save_every: int = 0
    """Save a checkpoint every so many steps and at the end, in the background; 0: only when a signal ends the run."""
    keep: int = 3
    """Keep the newest so many checkpoints ..."""
    keep_every: int = 0
    """... and those of every so many steps ..."""
    keep_best: bool = False
    """... and the one with the least held-out loss."""
    export_every: int = 0
    """Write the model to OUT/hf-STEP every so many steps, in the background."""
    export_fp8: bool = False
    """Export matrices in block FP8, as DeepSeek's are; without it a quantised --model comes out in bf16."""
    train_on_everything: bool = False
    """Every token carries loss, not just the assistant's."""
    on_bad_line: Literal["raise", "skip"] = "raise"
    """What a line does that cannot be trained on; it is named either way."""
    group_by_length: bool = False
    """Make the packs of a step alike in the cost of attention, so that ranks finish together."""
    cache: str = CACHE
    """Where tokenised data is kept between runs."""
    show_batch: bool = False
    """Print the first batch, its tokens coloured by loss, and stop."""
    dry_run: bool = False
    """Print what each rank would store, and stop."""
    profile: str | None = None
    """FROM:TO, steps from FROM up to, without, TO to record for Perfetto in OUT/profile."""
    wandb: str | None = None
    """A project of Weights & Biases to log to as well (pip install 'xtf[wandb]')."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which a rank says where it and the others stand, and ends."""
    threads: int = 0
    """CPU threads a rank; 0 divides the machine's."""


class ExpertFlags(Flags, kw_only=True, frozen=True):
    """Flags of recipes for models with experts: those of fine-tuning, and these."""
    balance: float | None = None
    """What the balancing loss is multiplied by; by default what the config asks for (mostly nothing)."""
    balance_over: Literal["document", "batch", "pack"] = "document"
    """Experts are to be used evenly within each document, over the whole batch (by the step before), or within each
    pack."""
    z_loss: float = 0.0
    """What the routers' z-loss is multiplied by."""
    experts_on: Literal["ep", "sp", "dp"] = "ep"
    """The mesh axis that experts are divided over."""
    expert_rows: int = 0
    """Room for so many rows a pair of ranks, and --expert-pairs pairs a rank, instead of exactly those that are needed
    (0): the host waits for nothing, and a step that needs more stops the run, its update withheld."""
    expert_pairs: int = 0
    overlap: bool = False
    """Micro-batches of two packs, the messages of one under the compute of the other."""


F = TypeVar("F", bound=Flags)


def parse(kind: type[F], argv: Sequence[str] | None = None, description: str | None = None) -> F:
    """Flags from the command line, checked.

    Raises SystemExit, naming the flag, where one is missing, malformed, contradicts another or is not there yet.

    >>> parse(Flags, ["--model", ".", "--data", ".", "--out", "runs", "--steps", "3"]).steps
    3
    """
    flags = tyro.cli(kind, args=list(sys.argv[1:] if argv is None else argv), description=description)
    if flags.dtype == "fp8":
        raise SystemExit("--dtype fp8: not supported yet; use fp32 or bf16")
    for name in ("steps", "seq_len", "batch_tokens", "keep", "max_skipped"):
        if getattr(flags, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if flags.seq_len < 2 or not 0 <= flags.eval_fraction < 1:
        raise SystemExit(f"--seq-len {flags.seq_len} --eval-fraction {flags.eval_fraction}: at least 2 tokens, and a "
                         "fraction in [0, 1)")
    if flags.batch_tokens % flags.seq_len:
        raise SystemExit(f"--batch-tokens {flags.batch_tokens}: must be a multiple of --seq-len {flags.seq_len}, "
                         "since a micro-batch is one pack")
    try:
        flags = msgspec.structs.replace(flags, model=str(model_path(flags.model)))
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from e
    if isinstance(flags, ExpertFlags) and not all(map(math.isfinite, (flags.balance or 0.0, flags.z_loss))):
        raise SystemExit(f"--balance {flags.balance} --z-loss {flags.z_loss}: have to be finite")
    if flags.lora < 0:
        raise SystemExit(f"--lora {flags.lora}: a rank is positive; 0 trains everything")
    if isinstance(flags, ExpertFlags) and min(flags.expert_rows, flags.expert_pairs) < 1 <= max(flags.expert_rows, flags.expert_pairs):
        raise SystemExit(f"--expert-rows {flags.expert_rows} --expert-pairs {flags.expert_pairs}: give both, or neither")
    if flags.keep_best and not (flags.eval_data or flags.eval_fraction):
        raise SystemExit("--keep-best: needs a held-out loss to go by; give --eval-data or --eval-fraction")
    return flags
