"""What a recipe is: a script for one model, read alone, with the step written out; all else is called, so that one more
flag of the optimizer or of evaluation is a change to one file of xtf/cli."""
import ast
import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from tests.recipes.test_sft import ROOT, recipe
from xtf import cli, device
from xtf.cli._optimizer import OptimizerFlags, PretrainOptimizerFlags
from xtf.cli.evaluation import EvaluationFlags
from xtf.spec import Param

RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.py") if "def train(" in p.read_text())
ELSEWHERE = ("optim", "schedules", "adamw(", "muon(", "guard(", "clip_by_global_norm", "eval_batches", "eval_step",
             "no_grad", "dry_run", "show_batch", "from_scratch", "safetensors")


def test_there_are_seven():
    assert len(RECIPES) == 7


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_the_step_and_the_loop_are_written_out_and_the_rest_is_called(file):
    source = file.read_text()
    code = ast.unparse(ast.parse(source.replace("cli.optimizer(flags, model.specs(cfg))", "called")))
    assert "def train_step(state, batch, ops=xtf.LOCAL):" in code and "for i, batch in run.steps():" in code
    assert "num_tokens = batch.loss_tokens(ops)" in code and "schedule(state.taken)" in code
    assert "value_and_grad(share)" in code and "tx.update(grads" in code and "state.apply(" in code
    body = code.split('"""', 2)[2]                                         # the docstring speaks of flags
    assert not [word for word in ELSEWHERE if word in body]
    own = {field.name for kind in (PretrainOptimizerFlags, EvaluationFlags) for field in dataclasses.fields(kind)}
    assert not [name for name in own if f"flags.{name}" in body]
    assert len(source.splitlines()) < 150


def test_the_optimizer_needs_no_flag_of_another_file():
    make = lambda trained: {"layers": [{"q": {"weight": torch.ones(4, 4, requires_grad=trained)}}],
                            "norm": torch.ones(4, requires_grad=trained)}
    params, grads = make(True), make(False)
    specs = {"layers": [{"q": {"weight": Param((4, 4), torch.float32, ("heads", "embed"))}}],
             "norm": Param((4,), torch.float32, ("embed",))}
    for flags in (OptimizerFlags(warmup=0.0), PretrainOptimizerFlags(warmup=0.0, optimizer="muon")):
        tx, schedule, watch = cli.optimizer(flags, specs)
        tx.update(grads, tx.init(params), params)
        assert float(schedule(torch.tensor(0))) == flags.lr and watch.patience == flags.max_skipped


def test_pretraining_has_its_own_rate_with_experts_too():
    """Of two bases the first that a class names is to have the last word, which dataclasses forget."""
    for name, lr in (("qwen3_moe_sft", 1e-5), ("qwen3_pretrain", 3e-4), ("deepseek_v3_pretrain", 3e-4)):
        assert recipe(name).Flags(model="", data=(), out="").lr == lr


def test_fp8_is_not_offered(capsys):
    with pytest.raises(SystemExit):
        cli.parse(cli.Flags, ["--help"])
    assert "--dtype {fp32,bf16,fp64}" in capsys.readouterr().out


def test_bf16_is_the_default_of_an_accelerator_and_a_resumed_run_keeps_its_own(tmp_path, monkeypatch):
    parse = lambda *more: cli.parse(cli.Flags, ["--model", ".", "--data", ".", "--out", str(tmp_path), *more]).dtype
    assert parse() == parse("--resume", "auto") == "fp32"
    for kind in ("xpu", "cuda"):
        monkeypatch.setattr(device, "device", lambda kind=kind: torch.device(kind, 0))
        assert parse() == parse("--resume", "auto") == "bf16" and parse("--dtype", "fp32") == "fp32"
    # of the runs that are recorded the last one counts
    record = {"runs": [{"flags": {"dtype": "fp64"}}, {"flags": {"dtype": "fp32"}}], "finished": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert parse("--resume", "auto") == parse("--resume", str(tmp_path / "checkpoints" / "7")) == "fp32"
    assert parse("--resume", "auto", "--dtype", "bf16") == parse("--resume", "auto", "--dtype=bf16") == "bf16"
    assert parse() == "bf16"                                         # begins anew
    for broken in ("{", "[]", '{"runs": []}', '{"runs": [{"flags": {"dtype": "fp7"}}]}'):
        (tmp_path / "run.json").write_text(broken)
        assert parse("--resume", "auto") == "bf16"                   # `Run` says what is wrong with it


def test_no_flag_is_said_with_a_line_break():
    """Which --help would show."""
    for file in (*RECIPES, *(ROOT / "xtf" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for a, b in pairwise(node.body) if isinstance(node, ast.ClassDef) else ():
                if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant):
                    assert "\n" not in b.value.value, f"{file}:{b.lineno}"
