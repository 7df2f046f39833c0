"""Parts of a benchmark, run one after the other; what each case found is printed and on disk as soon as it ends."""
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xtf import device


class LeftOut(Exception):
    """Raised by a case that cannot be had here, for the reason that it says."""


class Case(NamedTuple):
    """One row of the report. `run()` returns its figures: numbers and words are printed, "text" below them, lists are
    for the file alone; "ok", where it is there, says whether they are as they should be.

    `decides`: the exit status says so if it fails."""
    name: str
    run: Callable[[], dict[str, Any]]
    decides: bool = True


class Part(NamedTuple):
    """Cases of one kind; `about` says how to read their figures."""
    title: str
    cases: Sequence[Case]
    about: str = ""


class Reported:
    """A report in a file: `head`, with the "seed" that every case starts from, and for each part a row a case. With
    `again`, it goes on with the report that is there: cases that it has are not run again, and the minutes that they
    took are spent."""

    def __init__(self, path: Path, head: dict[str, Any], minutes: float, again: bool = False):
        self.path, self.minutes = path, minutes
        self.report: dict[str, Any] = {**head, "minutes": minutes, "seconds": 0.0, "parts": {}}
        if again:
            self.report = json.loads(path.read_text())
        self.start = time.monotonic() - self.report["seconds"]

    def write(self) -> None:
        """Whole or not at all: a kill leaves the report before or the one after."""
        self.report["seconds"] = time.monotonic() - self.start
        self.path.parent.mkdir(parents=True, exist_ok=True)
        work = self.path.with_name(self.path.name + ".part")
        work.write_text(json.dumps(self.report, indent=1))
        os.replace(work, self.path)

    def run(self, parts: Sequence[Part], lost: Callable[[], None]) -> int:
        """Run what there is no row of yet. Returns the exit status: 1 if a case that decides failed, else 0.

        `lost()` is called after a failure that left the device useless to this process, as an assertion in a kernel
        does.
        """
        gc.freeze()                                      # what imports made is not looked through after every case
        for part in parts:
            found = self.report["parts"].setdefault(part.title, {"about": part.about, "cases": []})
            print(f"\n== {part.title}" + f"\n   {part.about}" * bool(part.about), flush=True)
            for case in part.cases[len(found["cases"]):]:
                found["cases"].append(row := {"case": case.name, "decides": case.decides})
                if time.monotonic() - self.start >= 60 * self.minutes:
                    row["left_out"] = f"the {self.minutes:g} minutes were spent"
                else:
                    row["failed"] = "did not end: the process was killed, or this is still running"
                    self.write()
                    device.seed(self.report["seed"])
                    row |= measured(case)
                    if row["failed"] is None:
                        del row["failed"]
                self.write()
                print(line(row), flush=True)
                if "failed" in row and not usable():
                    print("   the device answers no more; a new process goes on", flush=True)
                    lost()
        gc.unfreeze()
        rows = [(title, row) for title, part in self.report["parts"].items() for row in part["cases"]]
        wrong = [f"{title}: {row['case']}" for title, row in rows if failed(row)]
        decisive = [row for _, row in rows if failed(row) and row["decides"]]
        left_out = [f"{title}: {row['case']}" for title, row in rows if "left_out" in row]
        self.report |= {"failed": wrong, "left_out": left_out}
        self.write()
        print(f"\n{len(rows)} cases in {self.report['seconds']:.0f} s: {len(wrong)} failed, {len(left_out)} left out",
              *wrong, self.path, sep="\n  ", flush=True)
        return int(bool(decisive))


def measured(case: Case) -> dict[str, Any]:
    """What the case found, how long it took, and what it raised ("failed", None if nothing)."""
    start, found, wrong = time.monotonic(), {}, None
    try:
        found = case.run()
    except LeftOut as e:
        found = {"left_out": str(e)}
    except Exception as e:
        traceback.print_exc()
        wrong = reason(e)
    try:
        free()
    except RuntimeError as e:  # a device that is lost says so at the first thing that it is asked
        wrong = wrong or reason(e)
    return found | {"failed": wrong, "took": round(time.monotonic() - start, 2)}


def failed(row: dict[str, Any]) -> bool:
    return "failed" in row or row.get("ok") is False


def reason(e: BaseException) -> str:
    """One line: what was raised, and the last place in our own code that it came through."""
    ours = [f"{place(f.filename)}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if place(f.filename)]
    first = next((text for text in str(e).splitlines() if text.strip()), "")
    return f"{type(e).__name__}: {first[:200]}" + f" (at {ours[-1]})" * (len(ours) > 1)


def place(file: str) -> str:
    """A file of ours by its name from the repository's root on; nothing for any other.

    >>> place("/somewhere/xtf/kernels/experts.py"), place("/usr/lib/python3/json.py")
    ('xtf/kernels/experts.py', '')
    """
    path = Path(file)
    folder = next((folder for folder in path.parents if folder.name in ("xtf", "benchmarks")), None)
    return "" if folder is None or "site-packages" in path.parts else str(path.relative_to(folder.parent))


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    word = "left out" if "left_out" in row else "FAILED" if failed(row) else "ok" if "ok" in row else ""
    said = [row.get("left_out", ""), row.get("failed", "")]
    said += [f"{name} {shown(x)}" for name, x in row.items()
             if name not in ("case", "decides", "ok", "failed", "left_out", "text", "took")
             and isinstance(x, int | float | str)]
    took = [f"[{row['took']:.1f} s]"] if "took" in row else []
    text = [row["text"]] if "text" in row else []
    return "\n".join(["  ".join(filter(None, [f"{row['case']:<44}", f"{word:<8}", *said, *took])), *text])


def shown(x: Any) -> str:
    """
    >>> shown(0.000123456), shown(16384.0), shown(123.456), shown(7), shown("dk")
    ('0.000123', '16,384', '123', '7', 'dk')
    """
    return (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}") if isinstance(x, float) and math.isfinite(x) else str(x)


def usable() -> bool:
    """Whether the device still computes."""
    try:
        device.synchronize()
        return torch.zeros(1, device=device.device()).add_(1).item() == 1
    except RuntimeError:
        return False


def free() -> None:
    """Let go of what the case before held: memory, compiled code."""
    gc.collect()
    torch.compiler.reset()
    if device.device().type != "cpu":
        torch.accelerator.empty_cache()
