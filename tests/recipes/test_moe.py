"""The recipes of the families with experts, from tiny checkpoints that the script makes: one curve on every layout,
files that transformers loads."""
import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.test_sft import ROOT, curve, recipe, rows, train
from xtf import cli, hf, models, parity
from xtf.data import Sample, pack, stdlib_qa
from xtf.testing import Pool, pool

RECIPES = {"qwen3_moe": "qwen3_moe_sft", "gpt_oss": "gpt_oss_sft", "deepseek_v3": "deepseek_v3_pretrain",
           "kimi_k2": "kimi_k2_sft"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
STEPS, SEQ_LEN, BATCH = 6, 64, 512


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    records, _ = stdlib_qa.records()
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:60]))
    changes = {"gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]}}
    make = recipe("tiny_checkpoint").write
    for family in RECIPES:
        make(family, folder / family, SMALL | changes.get(family, {}),
             like=folder / "qwen3_moe" if family != "qwen3_moe" else None)
    return folder


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """A run of one process of each family, when it is asked for."""
    made = {}

    def run(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("one")
            train(RECIPES[family], argv(files, family, made[family]))
        return made[family]
    return run


def argv(files, family, out, *more):
    return ["--model", str(files / family), "--data", str(files / "chats.jsonl"), "--eval-fraction", "0.1", "--steps",
            str(STEPS), "--seq-len", str(SEQ_LEN), "--batch-tokens", str(BATCH), "--lr", "3e-3", "--out", str(out),
            "--cache", str(files / "cache"), *more]


def apart(a, b):
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family, mesh, more", [
    ("qwen3_moe", "dp=2,ep=2", ("--overlap", "--remat")),
    ("qwen3_moe", "sp=2", ("--experts-on", "sp", "--balance-over", "batch", "--balance", "0.1", "--z-loss", "0.01")),
    ("gpt_oss", "ep=2", ("--expert-rows", "300", "--expert-pairs", "600")),
    ("deepseek_v3", "ep=2,sp=2", ()),
    ("kimi_k2", "ep=2", ("--overlap", "--bias-rate", "0.01")),
])
def test_one_curve_on_every_layout(files, one, tmp_path, family, mesh, more):
    """All that is logged of the router too."""
    single = tmp_path / "single"
    change = [w for w in more if w not in ("--overlap", "--remat", "--experts-on", "sp", "--expert-rows", "300",
                                           "--expert-pairs", "600")]
    if change:
        train(RECIPES[family], argv(files, family, single, *change))
    else:
        single = one(family)
    pool(4 if "," in mesh else 2).run(train, RECIPES[family],
                                      argv(files, family, tmp_path / "many", "--mesh", mesh, *more))
    assert apart(curve(tmp_path / "many"), curve(single)) < 1e-5
    for a, b in zip([r for r in rows(tmp_path / "many") if "loss" in r], [r for r in rows(single) if "loss" in r],
                    strict=True):
        assert a["dropped"] == b["dropped"] == 0 and a["router_entropy"] == pytest.approx(b["router_entropy"], rel=1e-4)
    held = [r["eval_loss"] for r in rows(single) if "eval_loss" in r]
    assert held[1] < held[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_a_run_leaves_is_transformers_model(files, one, family):
    """Names, dtypes and the held-out loss, by transformers on the files; corrections moved."""
    out = one(family)
    assert hf.tensors(out / "hf").keys() == hf.tensors(files / family).keys()
    model = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    ids = tokenizer.encode("os.path.join joins path components")
    ours, cfg = models.from_hf(out / "hf")
    params = hf.load(out / "hf", ours.specs(cfg), ours.names(cfg))
    with torch.no_grad():
        mine = ours.forward(params, pack([Sample(ids, [1] * len(ids))], len(ids), 1), cfg)[0]
        torch.testing.assert_close(mine, model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)
    if family == "deepseek_v3":
        before = hf.load(files / family, ours.specs(cfg), ours.names(cfg))
        moved = [(a["correction"]["bias"] - b["correction"]["bias"]).abs().max()
                 for a, b in zip(params["layers"], before["layers"], strict=True)
                 if "correction" in a]
        assert moved and all(m > 0 for m in moved)


def test_adapters_alone_are_what_was_trained(files, tmp_path):
    """With --lora the routers' biases stay, so that the base and OUT/adapter are OUT/hf."""
    train("kimi_k2_sft", argv(files, "kimi_k2", tmp_path, "--lora", "4", "--steps", "2", "--bias-rate", "0.1"))
    name = next(n for n in hf.tensors(files / "kimi_k2") if n.endswith("e_score_correction_bias"))
    read = lambda folder: safe_open(next(Path(folder).glob("*.safetensors")), "pt").get_tensor(name)
    assert torch.equal(read(tmp_path / "hf"), read(files / "kimi_k2"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="--lora-alpha 64"):
        train("kimi_k2_sft", argv(files, "kimi_k2", tmp_path / "b", "--lora", "4", "--steps", "2", "--save-every", "2"))
        train("kimi_k2_sft", argv(files, "kimi_k2", tmp_path / "b", "--lora", "4", "--steps", "3", "--lora-alpha", "64",
                                  "--resume", "auto"))


def test_a_format_that_cannot_be_written_is_refused_before_the_first_step(files, tmp_path):
    with pytest.raises(ValueError, match="without --export-fp8"):
        train("gpt_oss_sft", argv(files, "gpt_oss", tmp_path, "--export-fp8"))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_parity_of_a_kimi(files, capsys):
    """Whose code transformers has not: by DeepSeek V3's, with Kimi K2's defaults."""
    assert parity.main([str(files / "kimi_k2")]) == 0, capsys.readouterr().out


def test_a_model_without_experts_is_refused(files, tmp_path):
    recipe("tiny_checkpoint").write("qwen3_moe", tmp_path / "m", SMALL | {"mlp_only_layers": [0, 1]},
                                    like=files / "qwen3_moe")
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        train("qwen3_moe_sft", [*argv(files, "qwen3_moe", tmp_path / "o"), "--model", str(tmp_path / "m")])


def as_a_script(name, args):
    """On a rank: the recipe as `python recipes/NAME.py` runs it. Its exit status, stdout and stderr."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.MonkeyPatch.context() as mp:
        mp.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: recipe(name).main(args))
    return end.value.code, out.getvalue(), error.getvalue()


def test_too_little_room_stops_the_run_in_one_line(files, tmp_path):
    ranks = Pool(2)
    try:
        done = ranks.run(as_a_script, "qwen3_moe_sft",
                         argv(files, "qwen3_moe", tmp_path / "o", "--mesh", "ep=2", "--threads", "1", "--expert-rows",
                              "9", "--expert-pairs", "900"))
    finally:
        ranks.close()
    for code, out, error in done:
        assert code == 1 and "step 1/" not in out and "Traceback" not in error
        last = error.splitlines()[-1]
        assert "error: ep: static(rows=9, pairs=900) is too little: the last step needed rows=" in last


@pytest.mark.parametrize("flags, message", [
    (["--expert-rows", "8"], "give both, or neither"),
    (["--lora", "-1"], "a rank is positive"),
    (["--balance", "nan"], "have to be finite"),
    (["--overlap", "--batch-tokens", "64"], "--overlap: a rank has 1 packs a step, an odd number"),
])
def test_wrong_flags_are_named(files, tmp_path, flags, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        recipe("qwen3_moe_sft").main(argv(files, "qwen3_moe", tmp_path, *flags))


def test_a_recipe_refuses_another_family(files, tmp_path):
    for family, other in (("gpt_oss", "qwen3_moe_sft"), ("qwen3_moe", "gpt_oss_sft"),
                          ("qwen3_moe", "deepseek_v3_pretrain"), ("gpt_oss", "kimi_k2_sft")):
        with pytest.raises(ValueError, match="use the recipe of its family"):
            recipe(other).main(argv(files, family, tmp_path))


def test_the_script_makes_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny_checkpoint.py", "qwen3", str(tmp_path / "m"), "--config",
                                      '{"hidden_size": 32}'])
    runpy.run_path(str(ROOT / "recipes" / "tiny_checkpoint.py"), run_name="__main__")
    assert json.loads(Path(tmp_path / "m" / "config.json").read_text())["hidden_size"] == 32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.hidden_size == 32
