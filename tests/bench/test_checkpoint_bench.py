"""The comparison with torch.distributed.checkpoint runs, and restores on both sides what was saved (it asserts that
itself)."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_small(tmp_path):
    flags = ["--small", "--rounds", "2", "--ranks", "2", "--folder", tmp_path, "--out", tmp_path / "out.json"]
    done = subprocess.run([sys.executable, "benchmarks/checkpoint.py", *map(str, flags)], cwd=ROOT, capture_output=True,
                          text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(r["ranks"], r["what"]) for r in report["rows"]] == [(2, what) for what in ("save", "restore", "stall")]
    for row in report["rows"]:
        if row["what"] == "stall":
            assert row["stall"] > 0 and row["first"] > 0 and row["step"] > 0
        else:
            assert row["ratio"] > 0 and row["paired"] > 0 and len(row["seconds"]) == 2 and row["ours"]["cpu"] > 0
    assert "medians of 2 interleaved rounds" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["out.json"]
