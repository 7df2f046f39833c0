"""The flags of recipes, and what is checked of them before anything starts.

What is said of a flag on more than one line stands in parentheses: --help would break the lines of a docstring too.
"""
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from xtf import device
from xtf.cli._optimizer import OptimizerFlags, PretrainOptimizerFlags
from xtf.cli.evaluation import EvaluationFlags
from xtf.data.read import model_path
from xtf.data.sources import CACHE


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """What a run starts from, and what it leaves."""
    model: str
    """Directory in Hugging Face's format to start from, or an id on the hub."""
    data: tuple[str, ...]
    ("Files, folders, globs or hub ids to train on; SOURCE=WEIGHT gives a source that share of the tokens. See "
     "docs/data-formats.md.")
    out: str
    ("Directory for what the run leaves: run.json, metrics.jsonl, loss.png, tensorboard/, checkpoints/ and hf/ (the "
     "model).")


@dataclass(frozen=True, kw_only=True)
class Flags(OptimizerFlags, EvaluationFlags, SourceFlags):          # --help has them from right to left
    """Flags of a fine-tuning recipe."""
    seed: int = 0
    dtype: Literal["fp32", "bf16", "fp64"] = field(
        default_factory=lambda: "fp32" if device.device().type == "cpu" else "bf16")
    ("Computation, by default bf16 on an accelerator and fp32 on a CPU, or what a resumed run was started with. "
     "Parameters and reductions are fp32, but for fp64, which is float64 throughout: to tell mistakes from rounding.")
    mesh: str = ""
    ("Sizes of dp, ep, sp, replicate, e.g. dp=2,sp=2; those unnamed are 1 (dp alone takes all ranks if none is "
     "named).")
    remat: bool = False
    """Recompute each block in backward."""
    lora: int = 0
    ("Freeze the model and train adapters of this rank beside its products; with bf16 the frozen matrices are stored "
     "in bf16.")
    lora_alpha: float | None = None
    """Adapters are multiplied by alpha over rank; by default alpha is twice the rank."""
    lora_targets: tuple[str, ...] = ()
    ("Products to adapt, by node or part of its path (q, experts, layers.0.mlp); by default all but vocabulary and "
     "routers.")
    trust_remote_code: bool = False
    """Run the tokenizer code that the model's directory brings (Kimi K2 has such)."""
    compile: bool = field(default_factory=lambda: device.device().type != "cpu")
    """Compile each block."""
    resume: str | None = None
    ("`auto`: go on from the newest checkpoint in --out, if there is one. Or the directory of any checkpoint, like "
     "runs/a/checkpoints/100.")
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


@dataclass(frozen=True, kw_only=True)
class PretrainFlags(PretrainOptimizerFlags, Flags):
    """Flags of pre-training: those of fine-tuning, and these. With those of experts too, name these first."""
    from_scratch: bool = False
    """Draw the parameters even if --model has weights."""


@dataclass(frozen=True, kw_only=True)
class ExpertFlags(Flags):
    """Flags of recipes for models with experts: those of fine-tuning, and these."""
    balance: float | None = None
    """What the balancing loss is multiplied by; by default what the config asks for (mostly nothing)."""
    balance_over: Literal["document", "batch", "pack"] = "document"
    ("Experts are to be used evenly within each document, over the whole batch (by the step before), or within each "
     "pack.")
    z_loss: float = 0.0
    """What the routers' z-loss is multiplied by."""
    experts_on: Literal["ep", "sp", "dp"] = "ep"
    """The mesh axis that experts are divided over."""
    expert_rows: int = 0
    ("Room for so many rows a pair of ranks, and --expert-pairs pairs a rank, instead of exactly those that are needed "
     "(0): the host waits for nothing, and a step that needs more stops the run, its update withheld.")
    expert_pairs: int = 0
    overlap: bool = False
    """Micro-batches of two packs, the messages of one under the compute of the other."""


@dataclass(frozen=True, kw_only=True)
class BiasFlags(ExpertFlags):
    """Flags of models whose routers are corrected by a bias: those of models with experts, and these."""
    bias_rate: float = 1e-3
    ("By how much a step moves the bias of each expert that had more or fewer tokens than its share; 0, and --lora, "
     "leave them.")


F = TypeVar("F", bound=Flags)


def parse(kind: type[F], argv: Sequence[str] | None = None, description: str | None = None) -> F:
    """Flags from the command line, checked.

    Raises SystemExit, naming the flag, where one is missing, malformed, contradicts another or is not there yet.

    >>> parse(Flags, ["--model", ".", "--data", ".", "--out", "runs", "--steps", "3"]).steps
    3
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--dtype=fp8" in words or ("--dtype", "fp8") in pairwise(words):
        raise SystemExit("--dtype fp8: not supported yet; use fp32 or bf16")
    flags = tyro.cli(kind, args=words, description=description)
    if flags.resume and not any(word == "--dtype" or word.startswith("--dtype=") for word in words):
        flags = replace(flags, dtype=_started_with(flags) or flags.dtype)
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
        flags = replace(flags, model=str(model_path(flags.model)))
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from e
    if isinstance(flags, ExpertFlags) and not all(map(math.isfinite, (flags.balance or 0.0, flags.z_loss))):
        raise SystemExit(f"--balance {flags.balance} --z-loss {flags.z_loss}: have to be finite")
    if flags.lora < 0:
        raise SystemExit(f"--lora {flags.lora}: a rank is positive; 0 trains everything")
    if isinstance(flags, ExpertFlags) and (flags.expert_rows < 1) != (flags.expert_pairs < 1):
        raise SystemExit(f"--expert-rows {flags.expert_rows} --expert-pairs {flags.expert_pairs}: give both, "
                         "or neither")
    if flags.keep_best and not (flags.eval_data or flags.eval_fraction):
        raise SystemExit("--keep-best: needs a held-out loss to go by; give --eval-data or --eval-fraction")
    return flags


def _started_with(flags: Flags) -> Literal["fp32", "bf16", "fp64"] | None:
    """The --dtype of the run that --resume goes on with, from its run.json: the machine may be another one now.

    None where nothing is recorded; what is wrong with a record that is there, `Run` says.
    """
    folder = Path(flags.out) if flags.resume == "auto" else Path(flags.resume or "").parent.parent
    try:
        dtype = json.loads((folder / "run.json").read_text())["runs"][-1]["flags"]["dtype"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return dtype if dtype in ("fp32", "bf16", "fp64") else None
