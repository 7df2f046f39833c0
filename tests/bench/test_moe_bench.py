"""The benchmark of experts runs, and both sides of it compute the same thing. Times are not tested."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*flags):
    return subprocess.run([sys.executable, "benchmarks/moe.py", "--toy", "--rounds", "2", *flags], cwd=ROOT,
                          capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def check(report):
    for group in report["groups"]:
        assert all("failed" not in r for r in group["rows"]), group["rows"]
        if group["group"] != "imbalance":                        # there the routes differ, so losses do
            # one set of weights, one batch: what float32 sums in any order agrees to 1e-6 or so
            assert group["loss_spread"] < 1e-5
            assert {r["who"] for r in group["rows"]} == {"xtf", "transformers"}
    assert set(report["imbalance"]) == {"few", "one"}
    assert all(0 < x < 1 for x in report["layer"]["of_products"]["layer"]) and len(report["adamw"]) == 3


def test_quick(tmp_path):
    done = run("--quick", "--warmup", "1", "--out", str(tmp_path / "moe.json"))
    assert done.returncode == 0, done.stderr
    check(json.loads((tmp_path / "moe.json").read_text()))
    assert "of its products" in done.stdout and "times as fast" in done.stdout


@pytest.mark.slow
def test_everything_compiles(tmp_path):
    done = run("--out", str(tmp_path / "moe.json"))
    assert done.returncode == 0, done.stderr
    check(json.loads((tmp_path / "moe.json").read_text()))
