"""Persistent pools of real processes: `pool(4).run(fn, *args)` calls a function on four ranks in milliseconds."""
import atexit
import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from xtf.testing import late as late_group
from xtf.testing._gloo import share_device

# What the server that all ranks are forked from imports once, before the first of them; more may be added until then.
# dynamo: the first custom operator or checkpoint imports it, a second of each rank's.
PRELOAD = ["xtf.testing._pool", "xtf.testing", "torch._dynamo"]


class Pool:
    """`size` processes, each a rank of one group, alive until closed: of gloo, or of `xtf.testing.late`.

    A function that raises on any rank kills the pool (its peers may be waiting in a collective); the next `run` starts
    another.
    """

    def __init__(self, size: int, timeout: float = 300.0, late: bool = False):
        self.size, self.timeout, self.late = size, timeout, late
        self.workers: list[tuple[Any, Any]] = []
        self.folder = ""

    def run(self, fn: Callable, *args: Any) -> list[Any]:
        """`fn(*args)` on every rank; the results by rank. Functions and arguments travel by cloudpickle.

        Raises ValueError or OSError if a rank raised one, RuntimeError with the remote traceback if it raised anything
        else or died, or did not answer within `timeout` seconds. With `late`, RuntimeError too where what a collective
        reads died or was overwritten before it was sent.
        """
        if not self.workers:
            self._start()
        message = cloudpickle.dumps((fn, args))
        try:
            for conn, _ in self.workers:
                conn.send_bytes(message)
        except OSError as e:
            self.close()
            raise RuntimeError(f"a rank of {self.size} died before it was asked anything ({e}); a script must start "
                               "its work under "
                               'if __name__ == "__main__":') from e
        results: list[Any] = [None] * self.size
        waiting = {conn: rank for rank, (conn, _) in enumerate(self.workers)}
        deadline = time.monotonic() + self.timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise RuntimeError(f"ranks {sorted(waiting.values())} of {self.size} did not answer within "
                                   f"{self.timeout:.0f} s: a collective that not all ranks entered?")
            for conn in ready:
                rank = waiting.pop(conn)  # pyright: ignore
                try:
                    ok, value = cloudpickle.loads(conn.recv_bytes())  # pyright: ignore
                except (EOFError, OSError):
                    ok, value = False, (RuntimeError, "the process died")
                if not ok:
                    self.close()
                    kind, text = value
                    raise kind(f"{text} (rank {rank} of {self.size})")
                results[rank] = value
        return results

    def close(self) -> None:
        """End the processes."""
        for _, process in self.workers:
            process.kill()
        for conn, process in self.workers:
            process.join()
            conn.close()
        self.workers = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # imports torch once, then forks: a pool is up in a second
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.mkdtemp(prefix="xtf-pool-")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, daemon=True,
                                      args=(there, rank, self.size, self.folder, list(sys.path), self.late))
            process.start()
            there.close()
            self.workers.append((here, process))


def _serve(conn: Any, rank: int, size: int, folder: str, path: list[str], late: bool) -> None:
    sys.path[:] = path
    os.environ["OMP_NUM_THREADS"] = "1"                              # inductor's generated code reads it
    torch.set_num_threads(1)
    share_device()
    backend = late_group.register() if late else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    while True:
        try:
            message = conn.recv_bytes()
        except EOFError:                                             # the parent is gone
            return
        try:
            fn, args = cloudpickle.loads(message)
            answer = True, fn(*args)
        except (ValueError, OSError) as e:                           # what a user can mend arrives as what it is
            answer = False, (ValueError if isinstance(e, ValueError) else OSError, str(e))
        except BaseException:
            answer = False, (RuntimeError, traceback.format_exc())
        if found := late_group.faults():                             # whatever else went wrong may come of it
            more = "" if answer[0] else f"\n{answer[1][1]}"
            answer = False, (RuntimeError, "memory of collectives: " + "; ".join(dict.fromkeys(found)) + more)
        conn.send_bytes(cloudpickle.dumps(answer))


@functools.cache
def pool(size: int, late: bool = False) -> Pool:
    """The pool of this size, shared by everybody in this process and closed at its end.

    `late`: its collectives run as late as they may, see `xtf.testing.late`.
    """
    made = Pool(size, late=late)
    atexit.register(made.close)
    return made
