"""Checkpoints of a run: saved in the background, whole or not there at all, restored onto any layout.

    with Checkpoints("out/checkpoints", keep=3) as checkpoints:
        if (step := checkpoints.latest()) is not None:
            state, data = checkpoints.restore(state, step)
        ...
        checkpoints.save(step, state, {"cursor": loader.cursor(step)}, {"eval_loss": 2.31})

On disk each is an ordinary Orbax checkpoint (zarr3 in OCDBT), `N/state` and `N/data`, that JAX reads without torch.
Rank 0 runs Orbax's CheckpointManager, which makes, merges, renames and retires; the other ranks write their parts with
tensorstore and import no JAX. A step is written to `N.orbax-checkpoint-tmp` and appears by one rename, once all of it
is on disk; it leaves by one rename too, to `.retired`, before it is deleted. So whatever is called N is whole, whenever
a process was killed.
"""
import asyncio
import contextlib
import json
import math
import shutil
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from xtf import lock, tree
from xtf.checkpoint import tensorstore as arrays
from xtf.parallel.peers import BACKGROUND, Peers

TMP, RETIRED, LOCK = ".orbax-checkpoint-tmp", ".retired", ".lock"
LOCK_SECONDS = 5.0


class Checkpoints:
    """The checkpoints in `directory`, which every rank opens; every rank calls every method, in one order.

    Kept are the last `keep`, those whose step is a multiple of `keep_every` (0: none for that reason), and, if `best`
    names a metric, the one with its lowest value. With `background` off, `save` returns when the checkpoint is on disk.
    A rank that does not answer its peers within `timeout` seconds fails them.

    Raises ValueError if `keep` or `keep_every` is out of range.

    >>> import tempfile
    >>> state = {"w": torch.arange(3.0), "step": torch.tensor(7)}
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(7, state, {"epoch": 1})
    ...     checkpoints.wait()
    ...     checkpoints.steps(), checkpoints.restore({"w": torch.zeros(3), "step": torch.tensor(0)})
    ([7], ({'w': tensor([0., 1., 2.]), 'step': tensor(7)}, {'epoch': 1}))
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, keep_every: int = 0, best: str | None = None,
                 background: bool = True, timeout: float = 1800.0):
        if keep < 1 or keep_every < 0:
            raise ValueError(f"checkpoints: keep={keep} must be at least 1 and keep_every={keep_every} at least 0")
        self.directory, self.keep, self.keep_every, self.best = Path(directory).absolute(), keep, keep_every, best
        self.background, self.peers = background, Peers(timeout=timeout)
        self._manager: Any = None
        self._buffers: dict[str, torch.Tensor] = {}  # kept: filling fresh memory takes ten times as long
        self._current: _Job | None = None
        self._lock: TextIO | None = None
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        if self.peers.rank == 0:
            # no directory yet, not ours to write, or another run's: nothing to sweep
            with contextlib.suppress(OSError):
                self._take_lock(0.0)
                self._release()

    def save(self, step: int, state: tree.Tree, data: Mapping[str, Any],
             metrics: Mapping[str, float] | None = None) -> None:
        """Save as checkpoint `step` the tree `state` of tensors (DTensors among them) and None, and `data`, plain JSON.

        Returns when both are copied, so that the next step may overwrite them: the copy takes as much host memory as
        this rank's part of `state`.

        Raises what the previous save raised; ValueError naming a leaf that cannot be saved, or a step that does not
        come after those that are there; OSError if the directory cannot be written, or another run writes there. What
        happens in the background is raised by the next `save`, `wait` or `close`: OSError if the disk is full or fails
        (the space is given back, earlier checkpoints are as they were), ConnectionError if a rank died. Every rank
        raises, naming the one that failed.
        """
        self.wait()
        with self.peers.together(f"save {step}"):
            text = _json(data)
            leaves = _named(state)
            if self.peers.rank == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                if self._lock is None:
                    self._take_lock(LOCK_SECONDS)
                if (newest := max(steps(self.directory), default=-1)) >= step:
                    raise ValueError(f"{self.directory}: checkpoint {newest} is there, {step} does not come after it; "
                                     "restore the newest, or move the later ones away")
            todo = arrays.parts(leaves, self.peers.rank, self.peers.world, self._buffers if self.background else None)
        job = _Job(step, f"save {step}", todo, _skeleton(state), text,
                   {k: float(v) for k, v in (metrics or {}).items()})
        self._saving = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}")
        self._saving.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Return when the save that is under way is on disk; raises what went wrong with it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> int | None:
        """The newest step that is whole; None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps that are whole, rising; what rank 0 sees."""
        return self.peers.tell("steps", lambda: steps(self.directory))

    def restore(self, state: tree.Tree, step: int | None = None) -> tuple[tree.Tree, dict[str, Any]]:
        """Fill the tensors of `state` from a checkpoint (the newest, if `step` is None); returns `state` and its data.

        Each rank reads its own part, whatever layout wrote it. Names, shapes and dtypes are compared before anything is
        overwritten; a rank that finds damage later fails all, and `state` is then of no use.

        Raises FileNotFoundError if there is no such checkpoint, ValueError listing what differs if it is another
        model's, OSError naming the leaf or file that is damaged.
        """
        self.wait()
        there = self.steps()
        if step is None:
            step = max(there, default=None)
        if step not in there:
            raise FileNotFoundError(f"{self.directory}: no checkpoint{'' if step is None else f' {step}'} in it"
                                    + (f", only {', '.join(map(str, there))}" if there else ""))
        folder = self.directory / str(step)
        data: dict[str, Any] = {}
        with self.peers.together(f"restore {step}"):
            data = _read_data(folder)
            asyncio.run(arrays.read(folder / "state", _named(state)))
        return state, data

    def close(self) -> None:
        """Wait, and let another run write here; raises what `wait` does."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
            self._manager = None
            self._release()
            self.peers.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        leave(self, kind)

    def _run(self, job: "_Job") -> None:
        """The background's part. The ranks agree three times: there is a folder; all is written; it is committed."""
        agree = lambda stage, **kw: self.peers.agree(f"{job.what}: {stage}", tag=BACKGROUND, **kw)
        try:
            if self.peers.rank:
                folder = Path(agree("begin"))
                failed = None
                try:
                    asyncio.run(arrays.write(folder, self.peers.rank, job.parts))
                except Exception as e:
                    failed = e
                job.parts.clear()
                agree("written", error=failed)
                agree("committed")
                return
            try:
                self._commit(job)
            except Exception as e:
                manager, self._manager = self._manager, None             # it may believe in a step that is not there
                with contextlib.suppress(Exception):
                    manager.close()
                self._sweep()
                if job.stage is not None:                                # else the peers know: one of them said so
                    agree(job.stage, error=_named_error(e, self.directory))
                raise
            agree("committed")
            shutil.rmtree(self.directory / RETIRED, ignore_errors=True)
        except BaseException as e:
            self._error = e

    def _commit(self, job: "_Job") -> None:
        from xtf.checkpoint.orbax import ocp
        self._manager = self._manager or self._make_manager()
        self._current = job
        self._manager.save(job.step, force=True, metrics=job.metrics, args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(job.skeleton),
            data=ocp.args.JsonSave({"json": job.data, "crc32": zlib.crc32(job.data.encode())})))

    async def _write_parts(self, folder: Path) -> None:
        """What Orbax calls where it would write arrays: rank 0's part, while the others write theirs."""
        job, self._current = self._current, None
        assert job is not None
        job.stage = None
        self.peers.agree(f"{job.what}: begin", value=str(folder), tag=BACKGROUND)
        failed = None
        try:
            await arrays.write(folder, 0, job.parts)
        except Exception as e:
            failed = e
        job.parts.clear()
        self.peers.agree(f"{job.what}: written", error=failed, tag=BACKGROUND)
        job.stage = "committed"

    def _make_manager(self) -> Any:
        """Orbax's manager for rank 0. Importing JAX takes a second: in the background, at the first save."""
        from xtf.checkpoint.orbax import durable, handler, ocp
        policies = ocp.checkpoint_managers
        keep: list[Any] = [policies.LatestN(self.keep)]
        if self.keep_every:
            keep.append(policies.EveryNSteps(self.keep_every))
        value = lambda metrics: v if not math.isnan(v := (metrics or {}).get(self.best, math.inf)) else math.inf
        if self.best is not None:
            keep.append(policies.BestN(get_metric_fn=value, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        return ocp.CheckpointManager(
            self.directory, item_handlers={"state": handler(self._write_parts), "data": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=value if self.best is not None else None, best_mode="min", enable_async_checkpointing=False,
                todelete_subdir=RETIRED, temporary_path_class=durable()))

    def _take_lock(self, seconds: float) -> None:
        """Hold the directory for this process, and sweep what a killed one left."""
        self._lock = lock.hold(
            open(self.directory / LOCK, "a+"), seconds,              # a killed owner needs a moment to be gone
            lambda owner: f"{self.directory}: another run writes checkpoints here ({owner}); stop it, or use another "
                          "folder")
        self._sweep()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def _sweep(self) -> None:
        """Give back the space of steps that did not become whole, or were retired. Only under the lock."""
        if self._lock is not None:
            for path in (*self.directory.glob(f"*{TMP}"), self.directory / RETIRED):
                shutil.rmtree(path, ignore_errors=True)


class _Job:
    """One save on its way: `stage` is what the peers wait for, None if they were told."""

    def __init__(self, step: int, what: str, parts: list[arrays.Part], skeleton: Any, data: str,
                 metrics: dict[str, float]):
        self.step, self.what, self.parts, self.skeleton = step, what, parts, skeleton
        self.data, self.metrics = data, metrics
        self.stage: str | None = "begin"


def leave(x: Any, kind: Any) -> None:
    """Close `x` at the end of its `with`; what goes wrong then is raised only where no error is on its way already."""
    try:
        x.close()
    except Exception:
        if kind is None:                                                 # else the error that is on its way says more
            raise


def restore_params(path: str | Path, params: tree.Tree, name: str = "params") -> tree.Tree:
    """Fill `params` from a checkpoint's part `name`: `path` is OUT/checkpoints/N, or OUT/checkpoints for the newest.

    For evaluation, export or the start of another run: no optimizer state is read, and nothing is locked or written.
    Every rank that holds a part of `params` calls this. Returns `params`.

    Raises as `Checkpoints.restore` does.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(1, {"params": {"w": torch.ones(2)}, "opt": [torch.ones(2)]}, {})
    >>> restore_params(folder, {"w": torch.zeros(2)})
    {'w': tensor([1., 1.])}
    """
    path = Path(path).absolute()
    if not path.name.isdigit():
        there = steps(path)
        if not there:
            raise FileNotFoundError(f"{path}: no checkpoint in it")
        path = path / str(there[-1])
    asyncio.run(arrays.read(path / "state", _named(params, name), name))
    return params


def steps(directory: str | Path) -> list[int]:
    """The steps of the whole checkpoints in a directory, rising.

    >>> steps("nowhere")
    []
    """
    directory = Path(directory)
    inside = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(p.name) for p in inside if p.name.isdigit() and (p / "state").is_dir())


def _named(state: tree.Tree, prefix: str = "") -> dict[str, torch.Tensor]:
    """The leaves by path, without None; these are the arrays' names."""
    out: dict[str, torch.Tensor] = {}
    for path, x in tree.flatten_with_path(state):
        name = ".".join(filter(None, (prefix, path)))
        if x is None:
            continue
        arrays.check(name, x)
        if name in out:
            raise ValueError(f"checkpoint: {name} is the path of two leaves; rename a key that has a dot in it")
        if not name or "/" in name:
            raise ValueError(f"checkpoint: {name or 'a leaf without a path'} cannot name an array; put it under a key "
                             "without slashes")
        out[name] = x
    if not out:
        raise ValueError("checkpoint: no tensors to save or restore")
    return out


def _skeleton(x: tree.Tree) -> Any:
    """The tree as Orbax knows trees: dicts and lists, with a place holder for each tensor."""
    children = tree._children(x)
    if children is None:
        return None if x is None else arrays.Leaf()
    if _is_sequence(x):
        return [_skeleton(v) for v in children.values()]
    return {k: _skeleton(v) for k, v in children.items()}


def _is_sequence(x: Any) -> bool:
    return isinstance(x, list) or (isinstance(x, tuple) and not hasattr(x, "_fields"))


def _json(data: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"checkpoint: data must be plain JSON values: {e}") from e
    if json.loads(text) != data:
        raise ValueError("checkpoint: data would not come back from JSON as it is: use lists instead of tuples, and "
                         "strings for keys")
    return text


def _read_data(folder: Path) -> dict[str, Any]:
    file = folder / "data" / "metadata"                                  # JsonCheckpointHandler's name
    try:
        stored = json.loads(file.read_bytes())
        if zlib.crc32(stored["json"].encode()) != stored["crc32"]:
            raise ValueError("its checksum does not fit")
        return json.loads(stored["json"])
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise OSError(f"{file}: damaged or gone; move this checkpoint away to use the one before: {e}") from e


def _named_error(e: Exception, directory: Path) -> Exception:
    known = isinstance(e, ValueError | OSError) and str(directory) in str(e)
    return e if known else OSError(f"{directory}: saving failed: {type(e).__name__}: {e}")
