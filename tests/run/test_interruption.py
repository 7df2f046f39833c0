"""Runs that signals, a full disk or a second start interrupt: the commands that users type, in real processes."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.recipes.test_sft import ROOT, argv, curve, files, rows, train  # noqa: F401
from xtf.testing import pool

STEPS = 20


def start(files, out, *more, ranks=1, options=()):  # noqa: F811
    command = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", *options,
                                                   "--nproc_per_node", str(ranks)]
    return subprocess.Popen([*command, str(ROOT / "recipes" / "qwen3_sft.py"), *argv(files, out), "--resume", "auto",
                             "--save-every", "5", "--threads", "1", *more], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def when(out, steps, run):
    """Wait until so many steps are logged."""
    deadline = time.monotonic() + 120
    file = Path(out) / "metrics.jsonl"
    while not file.exists() or file.read_text().count('"loss"') < steps:
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("whole")
    train("qwen3_sft", [*argv(files, out)])
    return curve(out)


SLURM = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")


@pytest.mark.parametrize("name, ranks, options", [("SIGTERM", 1, ()), ("SIGINT", 1, ()), ("SIGUSR1", 2, SLURM)])
def test_a_signal_saves_and_says_how_to_go_on(files, tmp_path, whole, capsys, name, ranks, options):  # noqa: F811
    more = ("--mesh", "dp=2") if ranks == 2 else ()
    run = start(files, tmp_path, *more, ranks=ranks, options=options)
    when(tmp_path, 7, run)
    run.send_signal(signal.Signals[name])
    said, error = run.communicate(timeout=240)
    assert ranks > 1 or run.returncode == 128 + signal.Signals[name], error
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert 7 <= saved < STEPS
    assert f"{name}: {tmp_path}/checkpoints/{saved} is saved; the same command with --resume auto goes on" in said
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == list(range(1, saved + 1))
    train("qwen3_sft", [*argv(files, tmp_path), "--resume", "auto", "--save-every", "5"])
    assert f"going on after step {saved} of {STEPS}" in capsys.readouterr().out
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == list(range(1, STEPS + 1))
    assert max(abs(a / b - 1) for a, b in zip(curve(tmp_path), whole, strict=True)) < (1e-5 if ranks > 1 else 1e-300)


def contents(out):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(Path(out).rglob("*")) if p.is_file()
            and p.name != ".lock"}


def test_a_finished_run_changes_nothing_and_more_steps_go_on(files, tmp_path, capsys):  # noqa: F811
    args = [*argv(files, tmp_path / "out", "qwen3", "--steps", "6"), "--resume", "auto", "--save-every", "4"]
    train("qwen3_sft", args)
    before = contents(tmp_path / "out")
    train("qwen3_sft", args)
    assert contents(tmp_path / "out") == before and "finished at step 6; nothing to do" in capsys.readouterr().out
    train("qwen3_sft", [*args, "--steps", "8"])
    assert [r["step"] for r in rows(tmp_path / "out") if "loss" in r] == list(range(1, 9))
    assert "going on after step 6 of 8" in (said := capsys.readouterr().out) and "--steps 6 → 8" in said
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] == 8 and [r["flags"]["steps"] for r in record["runs"]] == [6, 8]


def test_a_new_run_does_not_write_over_checkpoints(files, tmp_path):  # noqa: F811
    args = [*argv(files, tmp_path / "out", "qwen3", "--steps", "2"), "--save-every", "2"]
    train("qwen3_sft", args)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"--out .*: holds checkpoints of a run \(steps 2\); --resume auto goes on"):
        train("qwen3_sft", args)
    assert contents(tmp_path / "out") == before


def test_a_changed_tokenizer_is_named(files, tmp_path):  # noqa: F811
    shutil.copytree(files / "qwen3", tmp_path / "model")
    args = [*argv(files, tmp_path / "out"), "--save-every", "2", "--resume", "auto",
            "--model", str(tmp_path / "model")]
    train("qwen3_sft", [*args, "--steps", "2"])
    file = tmp_path / "model" / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="tokenizer"):
        train("qwen3_sft", [*args, "--steps", "4"])


def test_a_checkpoint_of_another_model_is_named(files, tmp_path):  # noqa: F811
    more = ["--save-every", "2"]
    train("qwen3_sft", [*argv(files, tmp_path / "a"), *more, "--steps", "2"])
    with pytest.raises(ValueError, match="head"):
        train("llama_sft", [*argv(files, tmp_path / "b", "llama"), *more, "--steps", "4", "--resume",
                            str(tmp_path / "a" / "checkpoints" / "2")])
    assert os.listdir(tmp_path / "b") in ([".lock"], [".lock", "run.json"])


def test_resume_auto_begins_in_an_empty_folder_and_forks_from_a_checkpoint(files, tmp_path, whole):  # noqa: F811
    train("qwen3_sft", [*argv(files, tmp_path / "a"), "--save-every", "8", "--resume", "auto"])
    assert curve(tmp_path / "a") == whole
    train("qwen3_sft", [*argv(files, tmp_path / "b"), "--resume", str(tmp_path / "a" / "checkpoints" / "8")])
    assert curve(tmp_path / "b") == whole[8:]


def test_exports_on_the_way_are_what_transformers_loads(files, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM
    pool(2).run(train, "qwen3_sft", [*argv(files, tmp_path / "out"), "--export-every", "10", "--mesh", "dp=2"])
    train("qwen3_sft", [*argv(files, tmp_path / "ten"), "--export-every", "10"])
    load = lambda folder: AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).state_dict()
    same = [load(folder) for folder in ("out/hf-10", "ten/hf-10", "ten/hf-20", "ten/hf")]
    near = lambda a, b: max(((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in b)
    assert near(same[0], same[1]) < 1e-4 and near(same[2], same[3]) == 0 and near(same[1], same[3]) > 1e-3


def test_what_resume_says_to_other_steps_and_broken_files(files, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    go = lambda *more: train("qwen3_sft", [*argv(files, out), "--resume", "auto", *more])
    go("--steps", "4")
    with pytest.raises(ValueError, match=r"finished at step 4 and kept no checkpoint to go on from to --steps 6"):
        go("--steps", "6")
    out = tmp_path / "other"
    go("--steps", "4", "--save-every", "2")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"finished": None}))
    with pytest.raises(ValueError, match=r"--steps 3: .*checkpoints is at step 4 already"):
        go("--steps", "3")
    shutil.rmtree(out / "checkpoints" / "4" / "state")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('5\n{}\n[1]\n')
    capsys.readouterr()
    go("--steps", "5")
    said = capsys.readouterr().out
    assert "checkpoints/4: not a whole checkpoint, passed over" in said and "going on after step 2 of 5" in said
    assert said.count("no row of a run, left out") == 3
    assert [r["step"] for r in rows(out) if "loss" in r] == [1, 2, 3, 4, 5]
    assert "flags that changed: --steps 4 → 5, --save-every 2 → 0\n" in said
    (out / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json: broken: KeyError.*move it away"):
        go("--steps", "6")


def test_a_fork_does_not_mix_its_rows_with_others(files, tmp_path):  # noqa: F811
    train("qwen3_sft", [*argv(files, tmp_path / "a"), "--steps", "4", "--save-every", "2"])
    train("qwen3_sft", [*argv(files, tmp_path / "b"), "--steps", "3"])
    train("qwen3_sft",
          [*argv(files, tmp_path / "b"), "--steps", "4", "--resume", str(tmp_path / "a" / "checkpoints" / "2")])
    assert [r["step"] for r in rows(tmp_path / "b") if "loss" in r] == [3, 4]


def test_a_run_of_nothing_but_nan_gives_up_and_keeps_its_checkpoint(files, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file
    shutil.copytree(files / "qwen3", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for steps in ("5", "9"):  # the last step is the limit, and one in the middle
        out = tmp_path / steps
        with pytest.raises(ValueError, match=r"step 5: 5 steps in a row were skipped"):
            train("qwen3_sft", [*argv(files, out), "--model", str(tmp_path / "model"), "--steps", steps,
                                "--max-skipped", "5", "--save-every", "2"])
        assert "4" in os.listdir(out / "checkpoints") and not (out / "hf").exists()
        assert [(r["loss"], r["in_a_row"]) for r in rows(out) if "loss" in r][:5] == [(None, i) for i in range(1, 6)]
