"""A process group over gloo that sends as late as it may, and names what was not there any more by then.

On an accelerator a collective reads its input after the call that started it has returned, and writes its output at
some time before `wait`. Gloo on a CPU hides what that allows: a copy is made at once. Here a collective runs when it is
waited for (with all that were started before it, in that order), from weak references, and until then its output is
filled with NaN (integers with their minimum). An input that died or was overwritten meanwhile is replaced by the same
filling and named by `faults`, and so is an output that somebody wrote into.

`Pool(size, late=True)` runs its ranks on it, `assert_equivalent` compares on such ranks.
"""
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from xtf.testing._gloo import Gloo

PATIENCE = 2.0                                 # seconds after which one that nobody waits for runs all the same
# the layers beneath the line that starts a collective
BENEATH = ("torch", "typing_extensions.py", os.path.join("xtf", "testing", "late.py"),
           os.path.join("xtf", "parallel", "collectives.py"))


class Held(NamedTuple):
    """A tensor that a collective reads or writes: its memory, weakly, and its bytes when the collective was started."""
    storage: Any
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    snapshot: torch.Tensor

    @property
    def text(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    def alive(self) -> torch.Tensor | None:
        """The tensor in its own memory, None if that was given back."""
        storage = self.storage()
        if storage is None:
            return None
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)

    def changed(self, now: torch.Tensor) -> bool:
        return not torch.equal(_bytes(now), _bytes(self.snapshot))


class Job(NamedTuple):
    """A collective that was started and has not run: `make(inputs, outputs)` runs it on the group beneath."""
    label: str
    reads: list[Held]
    writes: list[Held]
    in_place: bool
    make: Callable[[list, list], Any]
    started: float
    done: threading.Event


_lock = threading.RLock()
_jobs: list[Job] = []
_faults: list[str] = []


def faults() -> list[str]:
    """What died, or was overwritten, before it was sent, since the last call: one line each.

    >>> faults()
    []
    """
    with _lock:
        found = _faults[:]
        _faults.clear()
    return found


def register() -> str:
    """Make the backend known to torch.distributed; its name."""
    if "LATE" not in dist.Backend.__dict__:
        dist.Backend.register_backend("late", _create, devices=["cpu"])
    return "late"


def _create(store: Any, rank: int, size: int, timeout: Any) -> "Late":
    return Late(store, rank, size, timeout)


class LateWork(dist.Work):
    """What a started collective returns: `wait` runs it, after all that were started before it."""

    def __init__(self, job: Job, outputs: list[torch.Tensor], held: list[torch.Tensor]):
        super().__init__()
        self.job, self.outputs, self.held = job, outputs, held

    def wait(self, timeout: Any = None) -> bool:
        _run_until(self.job)
        self.outputs = self.held = []
        return True

    def is_completed(self) -> bool:
        return self.job.done.is_set()

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        outputs = self.outputs
        self.wait()
        future.set_result(outputs)
        return future


class Late(dist.ProcessGroup):
    """The group of some ranks; every collective of theirs that xtf or DTensor asks for."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any):
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self.gloo: Any = Gloo(store, rank, size, timeout)

    # In each: what is read, what is written, and the call on the group beneath, given both.

    def allreduce(self, xs: list, opts: Any = None) -> LateWork:
        return self._later("all_reduce", xs, xs, lambda _, outs: self.gloo.allreduce(outs, *_given(opts)))

    def broadcast(self, xs: list, opts: Any = None) -> LateWork:
        return self._later("broadcast", xs, xs, lambda _, outs: self.gloo.broadcast(outs, *_given(opts)))

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, opts: Any = None) -> LateWork:
        return self._later("all_gather", [x], [out], lambda ins, outs: self.gloo._allgather_base(outs[0], ins[0]))

    def allgather(self, outs: list[list], xs: list, opts: Any = None) -> LateWork:
        return self._later("all_gather", xs, outs[0], lambda ins, outs: self.gloo.allgather([outs], ins))

    def allgather_into_tensor_coalesced(self, outs: list, xs: list, opts: Any = None) -> LateWork:
        def each(ins: list, outs: list) -> None:
            for out, x in zip(outs, ins, strict=True):
                self.gloo._allgather_base(out, x).wait()
        return self._later("all_gather", xs, outs, each)

    def _reduce_scatter_base(self, out: torch.Tensor, x: torch.Tensor, opts: Any = None) -> LateWork:
        return self._later("reduce_scatter", [x], [out],
                           lambda ins, outs: self.gloo._reduce_scatter_base(outs[0], ins[0], *_given(opts)))

    def reduce_scatter_tensor_coalesced(self, outs: list, xs: list, opts: Any = None) -> LateWork:
        def each(ins: list, outs: list) -> None:
            for out, x in zip(outs, ins, strict=True):
                self.gloo._reduce_scatter_base(out, x, *_given(opts)).wait()
        return self._later("reduce_scatter", xs, outs, each)

    def alltoall_base(self, out: torch.Tensor, x: torch.Tensor, recv: Any = None, send: Any = None,
                      opts: Any = None) -> LateWork:
        return self._later("all_to_all", [x], [out],
                           lambda ins, outs: self.gloo.alltoall_base(outs[0], ins[0], recv or [], send or []))

    def gather(self, outs: list[list], xs: list, opts: Any = None) -> LateWork:
        return self._later("gather", xs, outs[0] if outs else [],
                           lambda ins, got: self.gloo.gather([got] if outs else [], ins, *_given(opts)))

    def scatter(self, outs: list, xs: list[list], opts: Any = None) -> LateWork:
        return self._later("scatter", xs[0] if xs else [], outs,
                           lambda ins, got: self.gloo.scatter(got, [ins] if xs else [], *_given(opts)))

    def reduce(self, xs: list, opts: Any = None) -> LateWork:
        return self._later("reduce", xs, xs, lambda _, outs: self.gloo.reduce(outs, *_given(opts)))

    def send(self, xs: list, to: int, tag: int = 0) -> LateWork:
        return self._later("send", xs, [], lambda ins, _: self.gloo.send(ins, to, tag))

    def recv(self, xs: list, of: int, tag: int = 0) -> LateWork:
        return self._later("recv", [], xs, lambda _, outs: self.gloo.recv(outs, of, tag))

    def barrier(self, opts: Any = None) -> LateWork:
        return self._later("barrier", [], [], lambda *_: self.gloo.barrier())

    # torch 2.13's names
    all_gather_single: Any = _allgather_base
    reduce_scatter_single: Any = _reduce_scatter_base
    all_to_all_single: Any = alltoall_base

    def _later(self, kind: str, reads: list, writes: list, make: Callable[[list, list], Any]) -> LateWork:
        caller, functional = _caller()
        label = f"{kind} over {self.size()} ranks, started in {caller}"
        with _disable_current_modes():                       # remat's would count what is done here
            held = [_hold(x) for x in reads]
            for x in writes:
                fill(x)
            # of what is written, remember the filling
            job = Job(label, held, [_hold(x) for x in writes], reads is writes, make, time.monotonic(),
                      threading.Event())
        with _lock:
            _jobs.append(job)
        _clock()
        return LateWork(job, list(writes), list(reads) if functional else [])

    # what torch.distributed asks of a group

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_desc(self, text: str) -> None:
        self._desc = text

    @property
    def group_desc(self) -> str:
        return self._desc

    def _set_sequence_number_for_group(self) -> None:
        pass

    def getBackendName(self) -> str:
        return "late"


def _given(opts: Any) -> tuple:
    return () if opts is None else (opts,)


def fill(x: torch.Tensor) -> None:
    """NaN, or an integer's minimum, everywhere (True for bools), past autograd's count of versions."""
    x = x.detach()
    if x.dtype.is_floating_point or x.dtype.is_complex:
        value: Any = torch.nan
    else:
        value = True if x.dtype is torch.bool else torch.iinfo(x.dtype).min
    x.data.fill_(value)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def _hold(x: torch.Tensor) -> Held:
    x = x.detach()
    return Held(weakref.ref(x.untyped_storage()), x.shape, x.stride(), int(x.storage_offset()), x.dtype, x.clone())


def _caller() -> tuple[str, bool]:
    """The line that started a collective, the innermost one that is neither torch's nor of the layer beneath; and
    whether it asked torch's functional collectives (DTensor does), which hold what they read until it is waited for."""
    frame, functional = sys._getframe(2), False
    while frame.f_back is not None and any(f"{os.sep}{name}" in frame.f_code.co_filename for name in BENEATH):
        functional = functional or frame.f_code.co_filename.endswith("_functional_collectives.py")
        frame = frame.f_back
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})", functional


def _run_until(job: Job) -> None:
    """Run what was started up to this job, in order: ranks start their collectives in one order, over all groups."""
    with _lock, _disable_current_modes():
        while not job.done.is_set():
            _run(_jobs.pop(0))


def _run(job: Job) -> None:
    def fault(what: str) -> None:
        _faults.append(f"{job.label}: {what}")

    outputs = []
    for out in job.writes:
        now = out.alive()
        if now is None or out.changed(now):
            fault(f"its output {out.text} {'died' if now is None else 'was written to'} before it arrived")
        outputs.append(torch.empty(out.shape, dtype=out.dtype) if now is None else now)
    inputs = []
    for i, x in enumerate(job.reads):
        real = x.snapshot
        if job.in_place:                                     # what became of its memory has been looked at
            outputs[i].copy_(real)
        elif (now := x.alive()) is None or x.changed(now):
            fault(f"its input {x.text} {'died' if now is None else 'was overwritten'} before it was sent")
            fill(real)
        inputs.append(real)
    work = job.make(inputs, outputs)
    if work is not None:
        work.wait()
    job.done.set()


_watch: list[threading.Thread] = []


def _clock() -> None:
    """Start, once, the thread that runs what nobody has waited for: another rank may."""
    if not _watch:
        _watch.append(threading.Thread(target=_tick, daemon=True, name="late collectives"))
        _watch[0].start()


def _tick() -> None:
    while True:
        time.sleep(PATIENCE / 4)
        with _lock:
            while _jobs and time.monotonic() - _jobs[0].started > PATIENCE:
                _run(_jobs.pop(0))


__all__ = ["Late", "faults", "fill", "register"]
