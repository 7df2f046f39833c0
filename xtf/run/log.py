"""What a run shows and keeps, by rank 0: a progress bar, metrics.jsonl, TensorBoard files, W&B and the loss curve."""
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.distributed.device_mesh import DeviceMesh

from xtf import device, tree
from xtf.nn import ModelConfig
from xtf.parallel import is_main

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Log:
    """A context manager around the training loop; files go to `flags.out`, where those of an earlier run are replaced.

    A run that goes on after step `first` keeps the rows up to it, so that each step stands there once.

    metrics.jsonl has one object a step: step, loss, grad_norm, lr, tokens, tokens_per_s, mfu, memory_gb, and whatever
    else the step returns (numbers are not rounded; null where not finite); and one an evaluation: step, eval_loss. It
    is flushed row by row. tensorboard/ has the same scalars, and so has W&B, in the project `flags.wandb` if there is
    one. loss.png is drawn at the end, also of a run that fails. On a terminal a progress bar shows the last row;
    elsewhere it is printed, about a hundred times a run.

    tokens are those of the step's documents over all ranks, padding left out; tokens_per_s counts the time since the
    last row, so that neither evaluations nor their rows slow it down. mfu = FLOPs of forward and of the gradients
    that are made (`model.flops` of the step's specs: frozen leaves have none) / seconds / (ranks ×
    `device.peak_flops`).

    `flags` has out, steps and dtype ("fp32", "bf16", "fp64"); `model.flops(cfg, lengths, specs)` is a step's FLOPs,
    `specs` being those of the step, as its transforms left them.
    """

    def __init__(self, flags: Any, model: Any, cfg: ModelConfig, specs: tree.Tree, mesh: DeviceMesh | None = None,
                 first: int = 0):
        self.flags, self.out, self.main = flags, Path(flags.out), is_main()
        self.flops = lambda lengths: model.flops(cfg, lengths, specs)
        self.curves: dict[str, list[tuple[int, float]]] = {"loss": [], "eval_loss": []}
        if not self.main:
            return
        self.peak = device.peak_flops(DTYPES[flags.dtype]) * (1 if mesh is None else mesh.size())
        self.out.mkdir(parents=True, exist_ok=True)
        self.wandb = _wandb(flags, first) if getattr(flags, "wandb", None) else None
        for old in () if first else (self.out / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()                                     # else its curve would be drawn over this run's
        for row in cut(self.out / "metrics.jsonl", first):
            self._keep(row["step"], row)
        self.file = open(self.out / "metrics.jsonl", "a")
        from torch.utils.tensorboard.writer import SummaryWriter  # a second, which other ranks need not wait
        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=first + 1 if first else None)
        self.bar = Progress(MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                            TimeRemainingColumn(), disable=not sys.stdout.isatty())
        self.task = self.bar.add_task("", total=flags.steps, completed=first)
        self.began, self.first = time.perf_counter(), first

    def __enter__(self) -> "Log":
        if self.main:
            self.bar.start()
        self.since = time.perf_counter()
        return self

    def step(self, step: int, metrics: Mapping[str, Any], lengths: Sequence[int],
             mix: Mapping[str, int] | None = None, now: float | None = None) -> None:
        """Log step `step` (from 1): its metrics (numbers or scalar tensors), the lengths of all ranks' documents.

        `mix` is the step's tokens by source; they become columns `mix/SOURCE`. `now` is when the step was over
        (`time.perf_counter`), where that was before this call. Reading tensors waits for the device.
        """
        if not self.main:
            return
        row = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter() if now is None else now
        seconds, self.since = now - self.since, now
        row |= {"tokens": sum(lengths), "tokens_per_s": sum(lengths) / seconds,
                "mfu": self.flops(lengths) / seconds / self.peak,
                "memory_gb": device.memory_gb()} | {f"mix/{source}": n for source, n in (mix or {}).items()}
        text = (f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.1%}  "
                f"{row['memory_gb']:.2f} GB")
        text += f"  {row['skipped']:.0f} skipped" if row.get("skipped") else ""
        self.bar.update(self.task, completed=step, description=text)
        if step % max(1, self.flags.steps // 100) == 0 or step in (1, self.flags.steps):
            left = (now - self.began) / (step - self.first) * (self.flags.steps - step)
            self._say(f"step {step}/{self.flags.steps}  {text}  ETA "
                      f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}")
        self._write(step, row)

    def evaluation(self, step: int, eval_loss: float) -> None:
        """Log the held-out loss after `step` steps; the time that it took is not the next step's."""
        if self.main:
            self.bar.console.print(f"step {step}/{self.flags.steps}  held-out loss {eval_loss:.4f}", highlight=False)
            self._write(step, {"eval_loss": float(eval_loss)})
        self.since = time.perf_counter()

    def sync(self) -> None:
        """Return once every row so far is on disk: what a checkpoint may rely on."""
        if self.main:
            os.fsync(self.file.fileno())

    def __exit__(self, *error: Any) -> None:
        if self.main:
            self.bar.stop()
            self.file.close()
            self.board.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=int(error[0] is not None))
            if any(self.curves.values()):
                self._draw()

    def _say(self, text: str) -> None:
        if self.bar.disable:
            print(text, flush=True)

    def _write(self, step: int, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **{k: v if math.isfinite(v) else None for k, v in row.items()}})
                        + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        if self.wandb is not None:
            self.wandb.log(row, step=step)
        self._keep(step, row)

    def _keep(self, step: int, row: Mapping[str, Any]) -> None:
        for name in self.curves.keys() & row.keys():
            self.curves[name].append((step, math.nan if row[name] is None else row[name]))

    def _draw(self) -> None:
        from matplotlib.figure import Figure  # a second, too
        axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
        for name, style in (("loss", "-"), ("eval_loss", "o-")):
            if self.curves[name]:
                axes.plot(*zip(*self.curves[name], strict=True), style, label=name.replace("eval_", "held-out "))
        axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.out / "loss.png", dpi=120)


def cut(file: Path, step: int) -> list[dict[str, Any]]:
    """Cut a metrics file back to the rows up to `step`, at once or not at all, and return them; half a row is none."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_bytes().splitlines() if step and file.exists() else (), 1):
        try:
            row = json.loads(line)
            rows += [row] if row["step"] <= step else []
        except (ValueError, TypeError, KeyError):  # a row that was being written when the process died, or none of ours
            print(f"{file}:{number}: no row of a run, left out: {line[:60]!r}", flush=True)
    work = file.with_name(file.name + ".new")
    with open(work, "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
        out.flush()
        os.fsync(out.fileno())
    os.replace(work, file)
    return rows


def _wandb(flags: Any, first: int) -> Any:
    try:
        import wandb  # pyright: ignore
    except ImportError as e:
        raise ValueError("--wandb: the package is not installed; pip install 'xtf[wandb]', or leave the flag out "
                         "(metrics.jsonl has it all)") from e
    file = Path(flags.out) / "wandb.id"                      # a resumed run goes on in the same curve
    name = file.read_text() if first and file.exists() else wandb.util.generate_id()
    file.write_text(name)
    return wandb.init(project=flags.wandb, id=name, resume="allow", dir=flags.out, config=msgspec.to_builtins(flags))
