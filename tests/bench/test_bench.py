"""The benchmarks run, and both sides of them compute the same thing. Times are not tested."""
import gzip
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xtf.kernels.swiglu import swiglu

ROOT = Path(__file__).parents[2]


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"benchmarks/{script}.py", *map(str, flags)], cwd=ROOT, capture_output=True,
                          text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def check_cpu(report: dict) -> None:
    assert report["capability"] and {"fp32", "host time"} <= {g["group"] for g in report["groups"]}
    for group in report["groups"]:
        assert group["peak_flops_per_s"] > 0
        assert {r["who"] for r in group["rows"]} == {"xtf", "transformers"}
        for r in group["rows"]:
            assert "failed" not in r, r
            assert len(r["seconds"]) == len(r["cpu_seconds"]) and min(r["seconds"]) > 0 and 0 < r["of_peak"] < 1
        # One set of weights, one batch: what float32 sums in any order agrees to 1e-6 or so, what bf16 rounds to its
        # eps of 2^-8.
        assert group["loss_spread"] < (1e-5 if group["rows"][0]["dtype"] == "fp32" else 2 ** -8)
        assert group["compared"] and all(math.isfinite(c["speed"]) and c["speed"] > 0
                                         for c in group["compared"].values())
        assert group["rows"][0]["first_loss"] == pytest.approx(math.log(group["shape"]["vocab"]), rel=0.1)
    assert all(r["memory"]["tensors"] > 0 for r in report["groups"][0]["rows"])


def test_cpu(tmp_path):
    done = run("cpu", "--quick", "--toy", "--rounds", 2, "--warmup", 1, "--profile", "--out", tmp_path / "cpu.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cpu.json").read_text())
    check_cpu(report)
    ours = next(r for r in report["groups"][0]["rows"] if r["who"] == "xtf")
    assert sum(share for _, _, share in ours["profile"]) <= 1 + 1e-9 and ours["profile"][0][2] > 0
    assert "product peak" in done.stdout and "times as fast" in done.stdout


def test_gpu_rehearsal(tmp_path):
    done = run("gpu", "--rehearse", "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == []
    parts = {title: {r["case"]: r for r in part["cases"]} for title, part in report["parts"].items()}
    assert list(parts) == ["kernels against float64", "parity with transformers",
                           "no host synchronisation within a step", "slots for documents", "training Qwen3-0.6B",
                           "training Qwen3-4B", "training Qwen3-30B-A3B cut to 6 layers",
                           "training Qwen3-0.6B, other ways of transformers"]
    found = {title: {case: r for case, r in rows.items() if "left_out" not in r} for title, rows in parts.items()}
    left_out = [case for title, rows in parts.items() for case in rows if case not in found[title]]
    assert all("compile" in case or "Liger" in case for case in left_out)    # and that is all that was left out

    kernels = found["kernels against float64"]
    assert len(kernels) == len(parts["kernels against float64"]) > 50 and all(r["ok"] for r in kernels.values())
    rounded = [r["error"] for case, r in kernels.items() if " bf16" in case and "none" not in case and "error" in r]
    assert len(rounded) > 25 and min(rounded) > 5e-4                 # bf16 rounds: not both sides were float64

    distance = found["parity with transformers"]
    assert set(distance) == {f"{family} {products}" for family in ("qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3")
                             for products in ("fp32", "bf16")}
    for case, r in distance.items():
        # A float32 product is off by about 6e-8 times the square root of its terms, a dozen follow each other; bf16
        # rounds 2^16 times as much.
        low, high = (0, 1e-5) if "fp32" in case else (5e-4, 1e-1)
        assert r["ok"] and all(low < r[f"{what}, ours"] < high for what in ("logits", "gradients")), r

    assert len(found["no host synchronisation within a step"]) == 4
    assert all("32 slots" in " ".join(r) for r in found["slots for documents"].values())
    curves = [r["losses"] for title, rows in found.items() for r in rows.values()
              if title.startswith("training Qwen3-0.6B")]
    assert len(curves) >= 4 and all(len(c) == len(curves[0]) >= 5 for c in curves)
    # a dozen steps at 1e-4 move each weight by 1e-3 or so; bf16 rounds losses to 2^-9
    for step in zip(*curves, strict=True):
        assert max(step) - min(step) < 2 ** -8 * max(step)
    (profiled,) = found["training Qwen3-30B-A3B cut to 6 layers"].values()
    assert len(profiled["kernels"]) == 15 and profiled["kernels"][0]["kernel"] in done.stdout
    assert json.loads(gzip.decompress((tmp_path / profiled["trace"]).read_bytes()))["traceEvents"]


@pytest.fixture
def gpu(monkeypatch):
    """The modules of the command and of its report, as on a machine without an accelerator."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module, reported = (importlib.import_module(name) for name in ("gpu", "reported"))
    monkeypatch.setattr(module.device, "device", lambda: torch.device("cpu"))
    return module, reported


def report_of(gpu, monkeypatch, path, *cases, flags=()):
    """The exit status and the rows of a report of these cases (name, function, whether it decides)."""
    module, reported = gpu
    half = len(cases) // 2
    monkeypatch.setattr(module, "parts", lambda args, out: [
        reported.Part(title, [reported.Case(*case) for case in some])
        for title, some in (("first", cases[:half]), ("second", cases[half:]))])
    status = module.main(["--rehearse", "--out", str(path), *flags])
    report = json.loads(path.read_text())
    return status, report, {r["case"]: r for part in report["parts"].values() for r in part["cases"]}


def broken():
    swiglu(torch.ones(1), torch.ones(2))


def test_what_raises_is_reported_and_the_others_go_on(gpu, monkeypatch, tmp_path, capsys):
    path, seen = tmp_path / "gpu.json", []

    def look():
        """What a kill would leave at this moment."""
        seen.append({r["case"]: r for part in json.loads(path.read_text())["parts"].values() for r in part["cases"]})
        return {"ms": 1.5}
    cases = ("a", broken, True), ("b", look, True), ("c", lambda: {"ok": False}, True), ("d", look, True)
    status, report, rows = report_of(gpu, monkeypatch, path, *cases)
    assert status == 1 and report["failed"] == ["first: a", "second: c"]
    said = rows["a"]["failed"]
    assert re.fullmatch(r"ValueError: swiglu: gate .* must be alike \(at xtf/kernels/swiglu.py:\d+\)", said)
    assert rows["b"]["ms"] == rows["d"]["ms"] == 1.5 and "failed" not in rows["d"]
    assert "failed" in seen[0]["a"] and "did not end" in seen[0]["b"]["failed"] and set(seen[1]) == set("abcd")
    out = capsys.readouterr().out
    assert out.index("must be alike") < out.index("ms 1.5") and "2 failed, 0 left out" in out


def test_the_status_is_that_of_the_cases_that_decide(gpu, monkeypatch, tmp_path):
    cases = ("theirs", broken, False), ("ours", lambda: {"ok": True}, True)
    status, report, _ = report_of(gpu, monkeypatch, tmp_path / "gpu.json", *cases)
    assert status == 0 and report["failed"] == ["first: theirs"]


def test_nothing_starts_when_the_minutes_are_spent(gpu, monkeypatch, tmp_path):
    status, report, rows = report_of(gpu, monkeypatch, tmp_path / "gpu.json", ("a", broken, True), ("b", broken, True),
                                     flags=("--minutes", "0"))
    assert status == 0 and report["left_out"] == ["first: a", "second: b"]
    assert rows["a"]["left_out"] == "the 0 minutes were spent"


def test_a_lost_device_costs_one_case(gpu, monkeypatch, tmp_path):
    """An assertion in a kernel leaves a device that this process cannot use: another one goes on."""
    class Replaced(BaseException):
        pass

    def replaced(program, command):
        commands.append(command)
        raise Replaced
    path, commands, ran = tmp_path / "gpu.json", [], []
    cases = [("a", lambda: {"ok": bool(ran.append("a")) or True}, True), ("b", broken, True),
             ("c", lambda: {"ok": bool(ran.append("c")) or True}, True)]
    monkeypatch.setattr(gpu[1], "usable", lambda: False)
    monkeypatch.setattr(gpu[0].os, "execv", replaced)
    with pytest.raises(Replaced):
        report_of(gpu, monkeypatch, path, *cases)
    assert ran == ["a"] and commands[0][-3:] == ["--out", str(path), "--resume"]
    status, report, rows = report_of(gpu, monkeypatch, path, *cases, flags=("--resume",))
    assert status == 1 and ran == ["a", "c"] and list(rows) == ["a", "b", "c"] and report["failed"] == ["second: b"]


def test_gpu_without_one():
    done = run("gpu")
    assert done.returncode == 2 and "--rehearse" in done.stderr


@pytest.mark.slow
def test_everything_compiles(tmp_path):
    done = run("cpu", "--toy", "--rounds", 2, "--out", tmp_path / "cpu.json")
    assert done.returncode == 0, done.stderr
    check_cpu(json.loads((tmp_path / "cpu.json").read_text()))
