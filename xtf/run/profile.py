"""`--profile FROM:TO`: what a few steps spend their time and memory on, rank by rank.

    with profile.steps(flags.profile, flags.out) as profiled:
        for i in ...:
            profiled.step(i)                    # step i starts here
            state, metrics = step(state, batch)

OUT/profile/ then holds for each rank N: trace-rankN.json.gz, which ui.perfetto.dev opens; operators-rankN.txt, the
operators by the memory that they took; and on CUDA memory-rankN.pickle, which pytorch.org/memory_viz opens.
"""
import contextlib
import gzip
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xtf import device

HISTORY = 1_000_000                          # allocations that the CUDA snapshot goes back, about 1 GB of host memory


class Profile:
    """A context in which the steps of `window` are recorded; without a window nothing is, and `step` returns at once.

    What was recorded is written when the window ends, and also where the run ends or fails within it: memory that ran
    out is what one wants to see. Steps in the window run slower than others.
    """

    def __init__(self, window: range | None, out: str | Path):
        self.window, self.folder = window, Path(out) / "profile"
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.profiler: Any = None
        self.mark = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        return self

    def step(self, i: int) -> None:
        """Step number `i` starts here, and the one before has ended."""
        if self.window is None:
            return
        self.mark.close()
        if i in self.window:                                 # a run that goes on may begin within it
            self.profiler = self.profiler or self._started()
            # the name by which viewers know steps
            self.mark.enter_context(torch.profiler.record_function(f"ProfilerStep#{i}"))
        elif self.profiler is not None:
            self._write()

    def __exit__(self, *error: Any) -> None:
        self.mark.close()
        if self.profiler is not None:
            self._write()
        elif self.window is not None and self.rank == 0:
            print(f"--profile {self.window.start}:{self.window.stop}: none of these steps was run", flush=True)

    def _started(self) -> Any:
        device.synchronize()
        if device.device().type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY, stacks="python")
        profiler = torch.profiler.profile(activities=torch.profiler.supported_activities(), profile_memory=True,
                                          record_shapes=True)
        profiler.start()
        return profiler

    def _write(self) -> None:
        device.synchronize()
        self.profiler.stop()
        profiler, self.profiler, self.window = self.profiler, None, None
        self.folder.mkdir(parents=True, exist_ok=True)
        if device.device().type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        work = self.folder / f".trace-rank{self.rank}.json"
        profiler.export_chrome_trace(str(work))
        trace = json.loads(work.read_text())
        (self.folder / f"operators-rank{self.rank}.txt").write_text(operators(trace))
        work.write_bytes(gzip.compress(json.dumps(readable(trace, self.rank)).encode(), compresslevel=3))
        os.replace(work, self.folder / f"trace-rank{self.rank}.json.gz")
        if self.rank == 0:
            print(f"{self.folder}: each rank's trace for ui.perfetto.dev, and its operators by memory", flush=True)


def readable(trace: dict[str, Any], rank: int) -> dict[str, Any]:
    """The trace with its processes named by rank, and each device's curve of allocated memory, from single events.

    >>> event = {"name": "process_name", "ph": "M", "pid": 7, "args": {"name": "python"}}
    >>> readable({"traceEvents": [event]}, 3)["traceEvents"][0]["args"]["name"]
    'rank 3: python'
    """
    curves = []
    for event in trace["traceEvents"]:
        if event["name"] == "process_name":
            event["args"]["name"] = f"rank {rank}: {event['args']['name']}"
        elif event["name"] == "[memory]":
            point = {"MB": event["args"]["Total Allocated"] / 1e6}
            curves.append({"ph": "C", "name": f"allocated on {_where(event)}", "pid": event["pid"], "ts": event["ts"],
                           "args": point})
    return trace | {"traceEvents": trace["traceEvents"] + curves}


def operators(trace: dict[str, Any]) -> str:
    """A table of the operators by the memory that each allocated itself (freed or not), with calls and CPU time.

    It says what `key_averages` of torch does, in a tenth of the time.
    """
    calls, time, allocated = Counter(), Counter(), Counter()
    threads = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "cpu_op" or event["name"] == "[memory]":
            threads[event["tid"]].append(event)
    for events in threads.values():
        within: list[dict[str, Any]] = []                    # the operators that are running, outermost first
        for event in sorted(events, key=lambda e: (e["ts"], -e.get("dur", 0))):
            while within and within[-1]["ts"] + within[-1]["dur"] < event["ts"]:
                within.pop()
            inner = within[-1]["name"] if within else "(no operator)"
            if event["name"] == "[memory]":
                allocated[_where(event), inner] += max(event["args"]["Bytes"], 0)
                continue
            calls[event["name"]] += inner != event["name"]       # one overload that calls another is one call
            time[event["name"]] += event["dur"]
            time[inner] -= event["dur"] if within else 0
            within.append(event)
    places = sorted({where for where, _ in allocated})
    names = sorted(calls | {name: 0 for _, name in allocated},
                   key=lambda name: (-sum(allocated[p, name] for p in places), -time[name]))
    lines = [f"{'calls':>8} {'CPU ms':>10} " + " ".join(f"{'MB on ' + p:>14}" for p in places) + "  operator"]
    lines += [f"{calls[n]:8} {time[n] / 1e3:10.3f} " + " ".join(f"{allocated[p, n] / 1e6:14.3f}" for p in places)
              + f"  {n}" for n in names]
    return "\n".join(lines) + "\n"


def _where(event: dict[str, Any]) -> str:
    return "CPU" if event["args"]["Device Id"] < 0 else f"device {event['args']['Device Id']}"


def steps(window: str | None, out: str | Path) -> Profile:
    """The profile of steps FROM up to, without, TO, as numbered in metrics.jsonl, of a run that writes to `out`.

    `window` is "FROM:TO" or None; the first steps compile and allocate, so begin with the third or so. Raises
    ValueError, naming --profile, if it is anything else.

    >>> steps("3:6", "runs/a").window
    range(3, 6)
    """
    if window is None:
        return Profile(None, out)
    first, _, end = window.partition(":")
    if not first.isdecimal() or not end.isdecimal() or not 1 <= int(first) < int(end):
        raise ValueError(f"--profile {window}: give FROM:TO, the first step to record (from 1) and the first not to "
                         "record, like 3:6")
    return Profile(range(int(first), int(end)), out)
