"""The benchmarks run, and both sides of them compute the same thing. Times are not tested."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    distance = {(r["products"], r["what"]): r for r in report["parity"]}
    # A float32 product is off by about 6e-8 times the square root of its terms, a dozen follow each other; bf16 rounds
    # 2^16 times as much.
    assert 0 < distance["fp32", "logits"]["ours"] < 5e-6 and 0 < distance["fp32", "gradients"]["ours"] < 5e-6
    assert 5e-4 < distance["bf16", "logits"]["ours"] < 5e-2
    assert all(r["ok"] for r in report["parity"])
    curves = [r["losses"] for r in report["training"]]
    assert len(curves) >= 4 and all(len(c) == len(curves[0]) for c in curves)
    # 23 steps at 1e-4 move each weight by 2e-3 at most; bf16 rounds losses to 2^-9
    for step in zip(*curves, strict=True):
        assert max(step) - min(step) < 2 ** -8 * max(step)


def test_gpu_without_one():
    done = run("gpu")
    assert done.returncode == 2 and "--rehearse" in done.stderr


@pytest.mark.slow
def test_everything_compiles(tmp_path):
    done = run("cpu", "--toy", "--rounds", 2, "--out", tmp_path / "cpu.json")
    assert done.returncode == 0, done.stderr
    check_cpu(json.loads((tmp_path / "cpu.json").read_text()))
