"""The log read back: every file that it writes, and the figures in it by formula."""
import json
import sys
import time
from types import SimpleNamespace

import msgspec
import pytest
import torch

from xtf import device
from xtf.run import log as log_module
from xtf.run.log import Log

COLUMNS = ["loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_gb"]
MODEL = SimpleNamespace(flops=lambda cfg, lengths, specs: cfg * specs["times"] * sum(n * n for n in lengths))
SPECS = {"times": 3}


@pytest.fixture
def flags(tmp_path):
    return SimpleNamespace(out=str(tmp_path / "run"), steps=3, dtype="fp32")


def rows(flags):
    with open(f"{flags.out}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def metrics(loss):
    return {"loss": torch.tensor(loss, dtype=torch.float64), "grad_norm": torch.tensor(2.0), "lr": 1e-3,
            "balance": torch.tensor(0.5)}


def events(flags, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(f"{flags.out}/tensorboard").Reload()
    return [(e.step, e.value) for e in board.Scalars(tag)]


def test_rows_are_what_was_logged(flags, monkeypatch):
    peak, clock = device.peak_flops(torch.float32), [100.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: clock[0])
    losses = [2.0 + 1e-15, 1.0 / 3.0, 0.25]
    with Log(flags, MODEL, 7.0, SPECS) as log:
        clock[0] += 1000.0                                                 # an evaluation, which no step has to pay for
        log.evaluation(0, 4.5)
        for i, loss in enumerate(losses):
            clock[0] += 0.5
            log.step(i + 1, metrics(loss), [3, 5])
            assert len(rows(flags)) == i + 2, "flushed with each step"
        log.evaluation(3, 0.125)
    first, *steps, last = rows(flags)
    assert first == {"step": 0, "eval_loss": 4.5} and last == {"step": 3, "eval_loss": 0.125}
    assert [row["loss"] for row in steps] == losses, "unrounded"
    for i, row in enumerate(steps):
        assert sorted(row) == sorted(["step", "balance", *COLUMNS])
        assert (row["step"], row["grad_norm"], row["lr"], row["balance"], row["tokens"]) == (i + 1, 2.0, 1e-3, 0.5, 8)
        assert row["tokens_per_s"] == 16.0
        assert row["mfu"] == pytest.approx(3 * 7.0 * (9 + 25) / 0.5 / peak, rel=1e-12)
        assert 0.01 < row["memory_gb"] < 1000
    assert events(flags, "loss") == [(i + 1, pytest.approx(loss)) for i, loss in enumerate(losses)]
    assert events(flags, "eval_loss") == [(0, 4.5), (3, 0.125)]


def test_time_is_real(flags):
    with Log(flags, MODEL, 1.0, SPECS) as log:
        time.sleep(0.05)
        log.step(1, metrics(1.0), [100])
    assert 100 / 1.0 < rows(flags)[0]["tokens_per_s"] <= 100 / 0.05


def test_the_curve_shows_both_losses(flags, tmp_path):
    from matplotlib.image import imread
    with Log(flags, MODEL, 1.0, SPECS) as log:
        log.evaluation(0, 3.0)
        log.step(1, metrics(2.0), [4])
        log.step(2, metrics(1.0), [4])
        log.evaluation(2, 1.5)
    image = imread(f"{flags.out}/loss.png")[..., :3]
    colours = [(31, 119, 180), (255, 127, 14)]                              # matplotlib's first and second
    seen = [bool((abs(image * 255 - torch.tensor(c).numpy()).max(-1) < 1).sum() > 50) for c in colours]
    assert image.shape[0] > 300 and seen == [True, True]


def test_a_run_that_fails_keeps_what_it_had_and_the_next_one_starts_anew(flags):
    with pytest.raises(RuntimeError, match="out of luck"), Log(flags, MODEL, 1.0, SPECS) as log:
        log.step(1, metrics(2.0), [4])
        raise RuntimeError("out of luck")
    assert len(rows(flags)) == 1 and (log.out / "loss.png").exists()
    with Log(flags, MODEL, 1.0, SPECS) as log:
        log.step(1, metrics(5.0), [4])
    assert [row["loss"] for row in rows(flags)] == [5.0]
    assert events(flags, "loss") == [(1, 5.0)]


def test_plain_lines_where_there_is_no_terminal(flags, capsys):
    flags.steps = 1000
    with Log(flags, MODEL, 1.0, SPECS) as log:
        for i in range(20):
            log.step(i + 1, metrics(2.0), [4])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "10/1000", "20/1000"]
    assert "loss 2.0000" in lines[0] and "tokens/s" in lines[0] and "MFU" in lines[0] and "GB" in lines[0]


def test_a_bar_on_a_terminal(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with Log(flags, MODEL, 1.0, SPECS) as log:
        for i in range(3):
            log.step(i + 1, metrics(2.0), [4])
    out = capsys.readouterr().out
    assert "3/3" in out and "loss 2.0000" in out and "step 3/3" not in out


def test_other_ranks_are_silent(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(log_module, "is_main", lambda: False)
    with Log(flags, MODEL, 1.0, SPECS) as log:
        log.evaluation(0, 1.0)
        log.step(1, metrics(2.0), [4])
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_resumed_run_cuts_back_to_its_checkpoint(flags):
    flags.steps = 6
    with Log(flags, MODEL, 1.0, SPECS) as log:
        log.evaluation(0, 9.0)
        for i in range(5):
            log.step(i + 1, metrics(float(i)), [4])
        log.evaluation(3, 8.0)
    with open(f"{flags.out}/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')                                       # killed in the middle of a row
    with Log(flags, MODEL, 1.0, SPECS, first=3) as log:
        assert [row["step"] for row in rows(flags)] == [0, 1, 2, 3, 3]
        for i in range(3, 6):
            log.step(i + 1, metrics(10.0 + i), [4])
    losses = [(row["step"], row["loss"]) for row in rows(flags) if "loss" in row]
    assert losses == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 13.0), (5, 14.0), (6, 15.0)]
    assert log.curves["loss"] == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 13.0), (5, 14.0),
                                  (6, 15.0)] and log.curves["eval_loss"] == [(0, 9.0), (3, 8.0)]
    assert events(flags, "loss") == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 13.0), (5, 14.0), (6, 15.0)]


def test_what_is_not_finite_is_null_and_the_mix_has_columns(flags):
    with Log(flags, MODEL, 1.0, SPECS) as log:
        log.step(1, metrics(float("nan")) | {"skipped": 1}, [4], {"web": 3, "code": 1})
    assert rows(flags)[0]["loss"] is None and (rows(flags)[0]["mix/web"], rows(flags)[0]["mix/code"]) == (3, 1)


def test_wandb_gets_the_rows_and_a_resumed_run_its_curve(flags, monkeypatch):
    seen = []
    run = SimpleNamespace(log=lambda row, step: seen.append((step, row["loss"])),
                          finish=lambda exit_code: seen.append(exit_code))
    stub = SimpleNamespace(init=lambda **kw: seen.append((kw["project"], kw["id"], kw["resume"])) or run,
                           util=SimpleNamespace(generate_id=lambda: f"id{len(seen)}"))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    flags = msgspec.defstruct("Flags", [("out", str), ("steps", int), ("dtype", str),
                                        ("wandb", str)])(flags.out, 3, "fp32", "project")
    for first in (0, 1):
        with Log(flags, MODEL, 1.0, SPECS, first=first) as log:
            log.step(first + 1, metrics(2.0), [4])
    assert seen == [("project", "id0", "allow"), (1, 2.0), 0, ("project", "id0", "allow"), (2, 2.0), 0]
    monkeypatch.setitem(sys.modules, "wandb", None)                         # not installed
    with pytest.raises(ValueError, match=r"--wandb: .* pip install 'xtf\[wandb\]'"):
        Log(flags, MODEL, 1.0, SPECS)
