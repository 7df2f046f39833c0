"""The trace read back as Perfetto would: steps asked for, operators as a dispatch mode counts them, memory by
arithmetic, ranks by name."""
import gzip
import json
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xtf.run import profile
from xtf.testing import pool

MEGABYTES = 8


def work(i):
    """`i` products, and memory of a known size."""
    a = torch.ones(16, 16)
    for _ in range(i):
        a = torch.mm(a, a) / 16
    torch.empty(MEGABYTES * 10**6 // 4)
    time.sleep(0.002)
    return a


def run(out, window, last, fail_at=None):
    with profile.steps(window, out) as profiled:
        for i in range(1, last + 1):
            profiled.step(i)
            work(i)
            if i == fail_at:
                raise MemoryError("no room")


def events(out, rank=0):
    with gzip.open(out / "profile" / f"trace-rank{rank}.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def spans(found):
    """Of each profiled step its number, start and end in µs."""
    steps = [e for e in found if e["name"].startswith("ProfilerStep#")]
    return {int(e["name"].split("#")[1]): (e["ts"], e["ts"] + e["dur"]) for e in steps}


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("window,last,want", [("3:6", 8, [3, 4, 5]), ("1:2", 3, [1]), ("4:9", 5, [4, 5])])
def test_the_steps_asked_for_and_all_that_they_did(tmp_path, window, last, want):
    run(tmp_path, window, last)
    found = events(tmp_path)
    recorded = spans(found)
    assert sorted(recorded) == want
    for i, (start, end) in recorded.items():
        with Counter() as counted:
            work(i)
        inside = [e for e in found if e.get("cat") == "cpu_op" and start <= e["ts"] <= end]
        assert sum(e["name"] == "aten::mm" for e in inside) == counted.products == i
        assert end - start >= 2000                                          # it sleeps 2 ms
    assert sum(e["name"] == "aten::mm" for e in found) == sum(want)          # and nothing of other steps
    assert not list((tmp_path / "profile").glob(".*"))


def test_memory_is_a_curve_and_a_table(tmp_path):
    run(tmp_path, "2:3", 3)
    curve = [e["args"]["MB"] for e in events(tmp_path) if e["name"] == "allocated on CPU" and e["ph"] == "C"]
    assert MEGABYTES <= max(curve) < MEGABYTES + 0.1
    head, largest, *_ = (line.split()
                         for line in (tmp_path / "profile" / "operators-rank0.txt").read_text().splitlines())
    assert head == ["calls", "CPU", "ms", "MB", "on", "CPU", "operator"]
    assert largest[-1] == "aten::empty" and MEGABYTES <= float(largest[2]) < MEGABYTES + 0.1


def test_the_table_is_torchs(tmp_path):
    """Calls, own time and own allocations of each operator, beside `key_averages`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        x = torch.ones(64, 64, requires_grad=True)
        torch.nn.functional.softmax(torch.mm(x, x), -1).sum().backward()         # also on autograd's thread
        kept = torch.empty(1000)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    table = profile.operators(json.loads((tmp_path / "trace.json").read_text()))
    lines = [line.split(None, 3) for line in table.splitlines()[1:] if "(no operator)" not in line]
    ours = {name: [float(word) for word in words] for *words, name in lines}
    theirs = {e.key: e for e in profiler.key_averages() if not e.key.startswith(("[", "Profiler"))}
    assert ours.keys() == theirs.keys() and len(ours) > 8 and kept.numel() == 1000
    for name, (calls, milliseconds, megabytes) in ours.items():
        assert calls == theirs[name].count
        assert milliseconds == pytest.approx(theirs[name].self_cpu_time_total / 1e3, abs=0.002 * calls + 0.001)
        assert megabytes * 1e6 >= theirs[name].self_cpu_memory_usage - 1000  # theirs less what was freed within
    assert ours["aten::mm"][2] * 1e6 == pytest.approx(3 * 64 * 64 * 4, abs=500)  # one product forward, two backward


def profiled_on_rank(out):
    run(out, "2:4", 4)


def test_every_rank_writes_its_own_and_is_named(tmp_path):
    pool(2).run(profiled_on_rank, tmp_path)
    for rank in (0, 1):
        found = events(tmp_path, rank)
        assert sorted(spans(found)) == [2, 3]
        names = [e["args"]["name"] for e in found if e["name"] == "process_name"]
        assert names and all(name.startswith(f"rank {rank}: ") for name in names)
        assert (tmp_path / "profile" / f"operators-rank{rank}.txt").stat().st_size


def test_a_run_that_fails_within_the_window_leaves_what_there_was(tmp_path):
    with pytest.raises(MemoryError):
        run(tmp_path, "2:9", 9, fail_at=3)
    assert sorted(spans(events(tmp_path))) == [2, 3]


def calls(fn):
    """What Python and C functions `fn` enters."""
    seen = []
    sys.setprofile(lambda frame, kind, arg: seen.append(getattr(arg, "__name__", frame.f_code.co_name))
                   if kind in ("call", "c_call") else None)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return seen[:-1]                                                        # the last is sys.setprofile


def test_it_costs_nothing_when_off_and_once_over(tmp_path):
    def loop(profiled):
        for i in range(1000, 2000):
            profiled.step(i)
    with profile.steps(None, tmp_path) as off:
        assert calls(lambda: loop(off))[2:] == ["step"] * 1000              # and nothing below it
    assert not list(tmp_path.iterdir())
    with profile.steps("1:2", tmp_path) as over:
        for i in (1, 2):
            over.step(i)
        assert calls(lambda: loop(over))[2:] == ["step"] * 1000


def test_steps_that_never_came_are_said(tmp_path, capsys):
    run(tmp_path, "30:40", 3)
    assert capsys.readouterr().out == "--profile 30:40: none of these steps was run\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["", "3", "3:", ":3", "3:3", "5:3", "0:3", "-1:3", "a:b", "1:2:3", "1.5:2"])
def test_a_wrong_window_is_refused_by_name(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"--profile .*FROM:TO"):
        profile.steps(wrong, tmp_path)
