"""A run of a recipe in its folder: locked, resumed, logged, saved, stopped on a signal, and finished once.

    with Run(flags) as run:
        if run.finished: return
        ...
        state = run.begin(state, loader, model, cfg, held_out)
        for i, batch in run.steps():
            state, metrics = step(state, batch)
            run.log(i, metrics)
            run.evaluate(i, state)
            run.save(i, state)
        run.finish(state.params)
"""
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch.distributed as dist

from xtf import cli, device, hf, peft, tree
from xtf.checkpoint import Checkpoints, Exporter, steps
from xtf.nn import ModelConfig
from xtf.parallel import Overflow, settle
from xtf.parallel._mesh import describe
from xtf.parallel.peers import Peers
from xtf.run import process, profile
from xtf.run.log import Log
from xtf.state import TrainState
from xtf.transforms._lora import base, merge

PACKAGES = ("xtf", "torch", "transformers", "orbax-checkpoint", "safetensors", "numpy", "triton")


class GaveUp(ValueError):
    """Too many steps in a row were skipped."""


class Run:
    """The context around a recipe's work; `mesh` is there from its start.

    `flags` is a `cli.Flags`. OUT is locked; it holds run.json (what made it), metrics.jsonl, checkpoints/ and at the
    end hf/. Every rank calls every method, in one order.

    Raises OSError where OUT is in use or cannot be written, ValueError where it holds checkpoints that the run would
    not go on from.
    """

    def __init__(self, flags: Any):
        self.flags, self.out, self.first = flags, Path(flags.out), 0
        self.finished, self.held = False, contextlib.ExitStack()
        self.looks = flags.dry_run or flags.show_batch              # and trains nothing: OUT is not touched
        self.dog: process.Watchdog | None = None
        self._checkpoints: Any = None
        self._exporter: Any = None
        self._evaluation: cli.Evaluation | None = None
        self._evaluated: dict[str, float] = {}
        # the last step: its number, its metrics on their way to the host, and when it was over
        self._coming: tuple[int, Callable[[], dict[str, float]], float] | None = None
        self.profiled = profile.steps(flags.profile, self.out)
        self._advice = cli.guard(flags).advice
        self._quantise: Literal["fp8"] | None = "fp8" if flags.export_fp8 else None

    def __enter__(self) -> "Run":
        process.die_with_launcher()
        self.mesh = cli.start(self.flags)
        if self.looks:
            return self
        with self.held:
            self.peers = Peers()
            self.held.callback(self.peers.close)
            self.held.enter_context(process.locked(self.out, self.peers))
            finished, saved = self.peers.tell("resume", lambda: (self._recorded()["finished"], self._saved()))
            self.saved = saved
            auto, want = self.flags.resume == "auto", self.flags.steps
            self.finished = auto and finished is not None and finished >= want
            if self.finished:
                more = ("a larger --steps goes on" if saved else
                        "it kept no checkpoint to go on from: another --out begins anew")
                cli.say(f"{self.out}: finished at step {finished}; nothing to do ({more})")
            elif auto and finished is not None and not saved:
                raise ValueError(f"--out {self.out}: finished at step {finished} and kept no checkpoint to go on from "
                                 f"to --steps {want}; start from its model in another folder: --model {self.out}/hf "
                                 "--out ...")
            elif auto and saved and saved[-1] > want:
                raise ValueError(f"--steps {want}: {self.out}/checkpoints is at step {saved[-1]} already; ask for "
                                 "more steps, or move the later checkpoints away")
            elif not auto and saved:
                raise ValueError(f"--out {self.out}: holds checkpoints of a run (steps {', '.join(map(str, saved))}); "
                                 "--resume auto goes on from the newest, another --out begins anew")
            self.stop = process.Stop()
            self.held = self.held.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.looks:
            return
        try:
            if self._coming is not None and not (kind is not None and issubclass(kind, Overflow)):
                with contextlib.suppress(Exception):                  # the error that is on its way says more
                    self._row(self._coming)
            if kind is None or issubclass(kind, GaveUp | Overflow):  # all ranks are here; elsewhere one may be missing
                self.stop.close()
                for background in filter(None, (self._checkpoints, self._exporter)):
                    background.close()
        finally:
            self.stop.restore()
            self.held.__exit__(kind, error, trace)

    def begin(self, state: TrainState, loader: Any, model: Any, cfg: ModelConfig, held_out: Any = None) -> TrainState:
        """The newest whole checkpoint's state, in the memory of `state`, where --resume finds one; else `state` itself.

        `loader` is set to the step after it, metrics.jsonl cut back to it, and run.json says what begins here. The loss
        on `held_out` data, if there is some, is taken where nothing went before.

        Raises ValueError where the checkpoint is of another model, or the data is not what it was.
        """
        flags, self.loader, self.names = self.flags, loader, model.names(cfg)
        if self._quantise:  # not all leaves of all families can: say so now, not at the end
            hf.check(base(state.params), self.names, flags.model, quantise=self._quantise)
        source = self._source()
        if source is not None:
            folder, number = source
            with self._open(folder) as checkpoints:
                state, data = checkpoints.restore(state, number)
            loader.seek(data["cursor"])
            self.first = int(data["cursor"]["step"])
            cli.say(f"{folder}/{self.first}: going on after step {self.first} of {flags.steps}")
        resumed_from = None if source is None else f"{source[0]}/{self.first}"
        self.peers.tell("record", lambda: self._record(loader, resumed_from))
        self.held.enter_context(self.profiled)
        if source is not None and source[0] != self.out / "checkpoints":
            rows = self.out / "metrics.jsonl"                         # of another run
            self.peers.tell("begin", lambda: rows.unlink(missing_ok=True))
        specs = cli.step_specs(flags, model.specs(cfg))
        self.logged = self.held.enter_context(Log(flags, model, cfg, specs, self.mesh, first=self.first))
        if flags.save_every:
            self._checkpoints = self._open(self.out / "checkpoints")
        if dist.is_initialized():                                     # one process has nobody to wait for
            self.dog = process.Watchdog(flags.hang_timeout, self.out / "hang")
            self.held.callback(self.dog.close)
        self.stop.armed = True
        if held_out:
            layout = cli.transforms(flags, training=False)
            self._evaluation = cli.Evaluation(flags, model, cfg, loader, held_out, layout, self.mesh,
                                              cli.micro_packs(flags))
        if self.first == 0:
            self.evaluate(0, state)
        return state

    def steps(self) -> Iterator[tuple[int, tree.Tree]]:
        """(number from 1, batch of this rank on its device) of each step that is left; the next are made meanwhile."""
        with contextlib.closing(self.loader.stream(self.first, self.mesh)) as batches:
            for i in range(self.first + 1, self.flags.steps + 1):
                batch = cli.on_device(next(batches))
                self.profiled.step(i)
                yield i, batch

    def log(self, i: int, metrics: Mapping[str, Any]) -> None:
        """Log step `i`; what `optim.guard` says of it is among the metrics.

        A row is written one step late, or before anything is evaluated or saved, so that nothing waits for the device.

        Raises GaveUp, with advice, once --max-skipped steps in a row were skipped.
        """
        before, self._coming = self._coming, (i, device.read_later(metrics), time.perf_counter())
        self._row(before)
        self._done(f"step {i}")

    def _settle(self) -> None:
        """Wait for the last step: its row is written, and it was a step. Raises GaveUp, and Overflow on all ranks."""
        settle()
        last, self._coming = self._coming, None
        self._row(last)

    def _row(self, of: tuple[int, Callable[[], dict[str, float]], float] | None) -> None:
        if of is None:
            return
        i, read, over = of
        row = read()
        if self.logged.main:
            self.logged.step(i, row, self.loader.documents(i - 1), self.loader.sources(i - 1), over)
        if "in_a_row" in row and (why := self._advice(row)):
            raise GaveUp(f"step {i}: {why}")

    def evaluate(self, i: int, state: TrainState) -> None:
        """Take and log the held-out loss after step `i`, where there is data and it is due; --keep-best goes by it."""
        if self._evaluation is None or not self._evaluation.due(i):
            return
        self._settle()
        loss = self._evaluation.loss(state)
        self.logged.evaluation(i, loss)
        self._evaluated = {"eval_loss": loss}
        self._done(f"evaluation after step {i}")

    def save(self, i: int, state: TrainState) -> None:
        """Save what is due after step `i` in the background: every --save-every steps, at the end; at once on a signal.

        The same for the model in Hugging Face's format (OUT/hf-STEP), every --export-every steps.

        Raises SystemExit (128 + the signal's number, as shells have it) once the checkpoint of a signal is on disk.
        """
        flags = self.flags
        heard = self.stop.agreed() if i < flags.steps else 0          # after the last step the run ends anyway
        due = flags.save_every and (i % flags.save_every == 0 or i == flags.steps)
        exports = flags.export_every and i % flags.export_every == 0 and not heard
        if due or heard or exports:
            self._settle()                                            # no checkpoint of a step that was none
        if due or heard:
            self._checkpoints = self._checkpoints or self._open(self.out / "checkpoints")
            self.logged.sync()                                        # no checkpoint without its rows
            self._checkpoints.save(i, state, {"cursor": self.loader.cursor(i)}, self._evaluated or None)
            self._done(f"save after step {i}")
        if exports:
            self._exporter = self._exporter or Exporter()
            self._exporter.save(self.out / f"hf-{i}", self._merged(state.params), self.names, flags.model,
                                self._quantise)
        if heard:
            self._checkpoints.close()
            cli.say(f"{signal.Signals(heard).name}: {self.out}/checkpoints/{i} is saved; the same command with "
                    "--resume auto goes on")
            raise SystemExit(128 + heard)

    def finish(self, params: tree.Tree) -> None:
        """Write OUT/hf in the format and dtypes of --model, with --lora OUT/adapter in PEFT's; mark the run as done."""
        self._settle()
        for background in filter(None, (self._checkpoints, self._exporter)):
            background.wait()
        if self.flags.lora:
            peft.save(self.out / "adapter", params, self.names, cli.adapter(self.flags), self.flags.model)
        hf.save(self.out / "hf", self._merged(params), self.names, like=self.flags.model, quantise=self._quantise)
        self.peers.tell("finish", lambda: self._write(self._recorded() | {"finished": self.flags.steps}))
        cli.say(f"{self.out}/hf: the model, as transformers loads it")

    def _merged(self, params: tree.Tree) -> tree.Tree:
        """The parameters of the same function without adapters, as Hugging Face directories have them."""
        return merge(params, cli.adapter(self.flags)) if self.flags.lora else params

    def _done(self, what: str) -> None:
        if self.dog is not None:
            self.dog.tick(what)

    def _open(self, folder: Path) -> Any:
        flags = self.flags
        return Checkpoints(folder, keep=flags.keep, keep_every=flags.keep_every,
                           best="eval_loss" if flags.keep_best else None)

    def _saved(self) -> list[int]:
        """The checkpoints in OUT that are whole, rising; others are named and passed over."""
        folder = self.out / "checkpoints"
        whole = steps(folder)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.isdigit() and int(path.name) not in whole:
                print(f"{path}: not a whole checkpoint, passed over; move it away", flush=True)
        return whole

    def _source(self) -> tuple[Path, int] | None:
        """(folder, step) of the checkpoint that --resume asks for, if there is one."""
        if self.flags.resume is None:
            return None
        if self.flags.resume != "auto":
            path = Path(self.flags.resume)
            if not path.name.isdigit() or not path.is_dir():
                raise ValueError(f"--resume {path}: neither `auto` nor a checkpoint's directory, like "
                                 "OUT/checkpoints/100")
            return path.parent, int(path.name)
        return (self.out / "checkpoints", self.saved[-1]) if self.saved else None

    def _recorded(self) -> dict[str, Any]:
        file = self.out / "run.json"
        try:
            found = json.loads(file.read_text()) if file.exists() else {"runs": [], "finished": None}
            sound = isinstance(found["finished"], int | None)
            if sound and all(isinstance(run["flags"], dict) for run in found["runs"]):
                return found
            reason = "not a record of a run"
        except (ValueError, TypeError, KeyError) as e:
            reason = f"broken: {e!r}"
        raise ValueError(f"{file}: {reason}; move it away. It says what made the run, and whether it is finished: "
                         "checkpoints do not need it")

    def _record(self, loader: Any, resumed_from: str | None) -> None:
        flags = json.loads(msgspec.json.encode(self.flags))
        record = self._recorded()
        before = record["runs"][-1]["flags"] if record["runs"] and resumed_from else flags
        alpha = lambda flags: flags.get("lora_alpha") or 2.0 * flags.get("lora", 0)
        if alpha(before) != alpha(flags) and before.get("lora") == flags["lora"]:
            raise ValueError(f"--lora-alpha {alpha(flags)}: the adapters of {resumed_from} were trained with "
                             f"{alpha(before)}; resume with that one")
        changed = {k: (before.get(k), v) for k, v in flags.items() if before.get(k) != v and k != "resume"}
        if changed:
            print("flags that changed: "
                  + ", ".join(f"--{k.replace('_', '-')} {a} → {b}" for k, (a, b) in changed.items()), flush=True)
        entry = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "argv": sys.argv, "flags": flags,
                 "versions": versions(), "git": git(), "host": socket.gethostname(), "machine": platform.platform(),
                 "mesh": describe(self.mesh), "data": loader.fingerprint,
                 "resumed_from": resumed_from}
        self._write({"runs": [*(record["runs"] if resumed_from else []), entry], "finished": None})

    def _write(self, record: dict[str, Any]) -> None:
        work = self.out / "run.json.new"
        work.write_text(json.dumps(record, indent=1))
        os.replace(work, self.out / "run.json")


def versions() -> dict[str, str]:
    """Releases of what computes, and of Python.

    >>> versions()["python"] == platform.python_version()
    True
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git() -> dict[str, str] | None:
    """The commit of the script that runs, and what differs from it (`diff`, at most 1 MB); None outside of git."""
    def ask(*words: str) -> str:
        where = Path(sys.argv[0]).resolve().parent
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True, timeout=20).stdout
    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "diff": ask("diff", "HEAD")[:1_000_000]}
    except (OSError, subprocess.SubprocessError):
        return None
