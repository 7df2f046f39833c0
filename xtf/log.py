"""What a run shows and keeps: a progress bar, metrics.jsonl, TensorBoard event files and the loss curve. Rank 0 does it all."""
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.tensorboard.writer import SummaryWriter

from xtf import device
from xtf.parallel.mesh import is_main

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class Log:
    """A context manager around the training loop; files go to `flags.out`, where those of an earlier run are replaced.

    metrics.jsonl has one object a step: step, loss, grad_norm, lr, tokens, tokens_per_s, mfu, memory_gb, and whatever else the step
    returns (numbers are not rounded); and one an evaluation: step, eval_loss. It is flushed row by row. tensorboard/ has the same
    scalars. loss.png is drawn at the end, also of a run that fails. On a terminal a progress bar shows the last row; elsewhere it is
    printed, about a hundred times a run.

    tokens are those of the step's documents over all ranks, padding left out; tokens_per_s counts the time since the last row, so that
    neither evaluations nor their rows slow it down. mfu = 3 × forward FLOPs (`model.flops`) / seconds / (ranks × `device.peak_flops`).

    `flags` has out, steps and dtype ("fp32", "bf16", "fp8"); `model.flops(cfg, lengths)` is the forward pass's FLOPs.
    """

    def __init__(self, flags: Any, model: Any, cfg: Any, mesh: DeviceMesh | None = None):
        self.flags, self.out, self.main = flags, Path(flags.out), is_main()
        self.flops = lambda lengths: 3 * model.flops(cfg, lengths)
        self.curves: dict[str, list[tuple[int, float]]] = {"loss": [], "eval_loss": []}
        if not self.main:
            return
        self.peak = device.peak_flops(DTYPES[flags.dtype]) * (1 if mesh is None else mesh.size())
        self.out.mkdir(parents=True, exist_ok=True)
        for old in (self.out / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()                                     # else its curve would be drawn over this run's
        self.file = open(self.out / "metrics.jsonl", "w")
        self.board = SummaryWriter(str(self.out / "tensorboard"))
        self.bar = Progress(MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn(),
                            disable=not sys.stdout.isatty())
        self.task = self.bar.add_task("", total=flags.steps)

    def __enter__(self) -> "Log":
        if self.main:
            self.bar.start()
        self.since = time.perf_counter()
        return self

    def step(self, step: int, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
        """Log step number `step` (from 1): its metrics (numbers or scalar tensors) and the lengths of its documents on all ranks.

        Reading the metrics waits for the device.
        """
        if not self.main:
            return
        row = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        row |= {"tokens": sum(lengths), "tokens_per_s": sum(lengths) / seconds, "mfu": self.flops(lengths) / seconds / self.peak,
                "memory_gb": device.memory_gb()}
        text = (f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.1%}  {row['memory_gb']:.2f} GB")
        self.bar.update(self.task, completed=step, description=text)
        if step % max(1, self.flags.steps // 100) == 0 or step in (1, self.flags.steps):
            self._say(f"step {step}/{self.flags.steps}  {text}")
        self._write(step, row)

    def evaluation(self, step: int, eval_loss: float) -> None:
        """Log the held-out loss after `step` steps; the time that it took is not the next step's."""
        if self.main:
            self.bar.console.print(f"step {step}/{self.flags.steps}  held-out loss {eval_loss:.4f}", highlight=False)
            self._write(step, {"eval_loss": float(eval_loss)})
        self.since = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        if self.main:
            self.bar.stop()
            self.file.close()
            self.board.close()
            if any(self.curves.values()):
                self._draw()

    def _say(self, text: str) -> None:
        if self.bar.disable:
            print(text, flush=True)

    def _write(self, step: int, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        for name in self.curves.keys() & row.keys():
            self.curves[name].append((step, row[name]))

    def _draw(self) -> None:
        axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
        for name, style in (("loss", "-"), ("eval_loss", "o-")):
            if self.curves[name]:
                axes.plot(*zip(*self.curves[name], strict=True), style, label=name.replace("eval_", "held-out "))
        axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.out / "loss.png", dpi=120)
