"""What may happen to a run's processes: a dead launcher, a signal, a folder in use, a collective that hangs."""
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from xtf import lock
from xtf.parallel import collectives, is_main
from xtf.parallel.peers import Peers

# a scheduler's, the terminal's, and what Slurm is asked for in docs/multi-node.md
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when torchrun, its parent, is gone: killed -9 it would leave workers running.

    Does nothing where torchrun did not start this process, or the system is not Linux.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent, PR_SET_PDEATHSIG = os.getppid(), 1                      # sys/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent == 1 or os.getppid() != parent:                       # it died before we asked
        os._exit(1)


@contextmanager
def locked(folder: str | Path, peers: Peers, wait: float = 10.0) -> Iterator[None]:
    """Hold `folder` for this run: the kernel frees it when rank 0 ends, however it ends.

    Raises OSError on every rank, naming host, process and start of the owner, if another run still holds it after
    `wait` seconds (those that a killed launcher leaves behind need a moment to go).
    """
    held: list[TextIO] = []

    def take() -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = open(Path(folder) / ".lock", "a+")                    # closed below, or with the process
        except OSError as e:
            raise OSError(f"--out {folder}: cannot be written ({e}); give a folder that can") from e
        held.append(lock.hold(file, wait, lambda owner: f"--out {folder}: in use by {owner}; wait for it, stop it, or "
                                                        "choose another --out"))
    peers.tell("lock", take)
    try:
        yield
    finally:
        for file in held:
            lock.note(file, "")
            file.close()


class Stop:
    """Turns signals into one decision that all ranks take after the same step.

    `armed` says that there is something to save: before that a signal ends the process at once. `agreed()` is called by
    every rank after every step; the number of the signal that any rank had heard by the step before, or 0.
    """

    def __init__(self):
        self.heard, self.armed = 0, False
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pending: tuple[Any, torch.Tensor] | None = None
        main = threading.current_thread() is threading.main_thread()    # Python lets no other thread set handlers
        self.before = {s: signal.signal(s, self._hear) for s in SIGNALS} if main else {}

    def _hear(self, number: int, frame: Any) -> None:
        again, self.heard = self.heard, number
        if not self.armed or (again and number == signal.SIGINT):
            raise SystemExit(128 + number)
        if is_main() and not again:
            print(f"\n{signal.Signals(number).name}: saving after this step (Ctrl-C stops at once)", file=sys.stderr,
                  flush=True)

    def agreed(self) -> int:
        """Costs a word a step, sent while the next step computes."""
        if self.group is None:
            return self.heard
        result = 0
        if self.pending is not None:
            work, word = self.pending
            work.wait()
            result = int(word)
        word = torch.tensor(self.heard)
        self.pending = (dist.all_reduce(word, dist.ReduceOp.MAX, group=self.group, async_op=True), word)
        return result

    def close(self) -> None:
        """Wait for the last word, so that no peer loses its partner. Only where all ranks come to this."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class Watchdog:
    """A thread that ends a rank which makes no progress, and says where it and the others stand.

    Progress is a `tick(what)`, or a collective that this rank starts. After `seconds` without any, each rank writes to
    stderr and to `folder`/rank-N.txt: what it did last, the last collective it started (kind, bytes, ranks), where
    Python stands, and which ranks are behind or ahead by the count of their collectives, or have not been heard of (a
    stopped process, a dead node). Then it exits with status 1, and torchrun ends the rest.
    """

    def __init__(self, seconds: float, folder: str | Path, every: float = 5.0):
        self.seconds, self.folder, self.every = seconds, Path(folder), min(every, seconds / 4)
        self.at, self.what = time.monotonic(), "starting"
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        store: Any = dist.distributed_c10d._get_default_store() if self.world > 1 else None
        # a connection of its own: others may be waiting on theirs
        self.store: Any = store and dist.PrefixStore("xtf/beat", store.clone())
        self.ended, self.seen = threading.Event(), collectives.started()[0]
        threading.Thread(target=self._watch, name="xtf-watchdog", daemon=True).start()

    def tick(self, what: str) -> None:
        """`what` is done, and the time starts anew."""
        self.at, self.what = time.monotonic(), what

    def close(self) -> None:
        self.ended.set()

    def beat(self) -> dict[str, Any]:
        count, last = collectives.started()
        return {"done": self.what, "collectives": count, "last": last, "time": time.time()}

    def _watch(self) -> None:
        while not self.ended.wait(self.every):
            count, _ = collectives.started()
            if count != self.seen:
                self.at, self.seen = time.monotonic(), count
            if time.monotonic() - self.at > self.seconds:
                self._report()
                os._exit(1)
            # the store's server may be what hangs: never wait for it in this thread
            threading.Thread(target=self._send, daemon=True).start() if self.store is not None else None

    def _send(self) -> None:
        try:
            self.store.set(str(self.rank), json.dumps(self.beat()))
        except RuntimeError:                                           # the store ends with its host
            pass

    def _report(self) -> None:
        mine = self.beat()
        head = (f"rank {self.rank} of {self.world} ({socket.gethostname()}, process {os.getpid()}): no progress for "
                f"{self.seconds:.0f} s; done: {mine['done']}; last collective: number {mine['collectives']}, "
                f"{mine['last']}")
        others: list[str] = []
        if self.store is not None:
            asking = threading.Thread(target=self._ask, args=(mine, others), daemon=True)
            asking.start()
            asking.join(self.every)
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = "\n".join([head, *others, "(a longer --hang-timeout allows slower steps)", file.read()])
        print(text, file=sys.stderr, flush=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank-{self.rank}.txt").write_text(text)
        except OSError:                                                # stderr has it
            pass

    def _ask(self, mine: dict[str, Any], others: list[str]) -> None:
        for rank in range(self.world):
            if rank == self.rank:
                continue
            if not self.store.check([str(rank)]):
                others.append(f"rank {rank}: never heard of")
                continue
            theirs = json.loads(self.store.get(str(rank)))
            silent = time.time() - theirs["time"]
            note = f", SILENT for {silent:.0f} s: stopped or dead" if silent > 3 * self.every else ""
            ahead = theirs["collectives"] - mine["collectives"]
            note += f", {'AHEAD' if ahead > 0 else 'BEHIND'} by {abs(ahead)} collectives" if ahead else ""
            others.append(f"rank {rank}: done: {theirs['done']}; collective number {theirs['collectives']}, "
                          f"{theirs['last']}{note}")
