"""A training run that is killed and moved to other ranks on its way, beside the same run left alone on one process.

    python benchmarks/interrupted.py OUT [--steps 500] [--threads 2]
    python benchmarks/interrupted.py OUT --family deepseek_v3 --steps 200

Model: a Qwen3 of about 10M parameters from nothing, killed twice and moved from 1 to 4 to 2 ranks; or a tiny Qwen3-MoE
or DeepSeek V3, killed on dp=2,ep=2 and moved to ep=4. Text: the docstrings of Python's standard library. Each start is
the command that users type; the kills are kill -9 of the launcher. Prints how far the two curves and the final weights
are apart.
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from xtf import device
from xtf.data.stdlib_qa import documented
from xtf.layout import parse_mesh

RECIPES = Path(__file__).parents[1] / "recipes"
EXPERTS = ("dp=2,ep=2", 0.5), ("ep=4", 1.0)
FAMILIES = {  # the recipe, and the meshes one after the other, each until which part of the steps
    "qwen3": ("qwen3_pretrain", (("", 0.3), ("dp=4", 0.65), ("dp=2", 1.0))),
    "qwen3_moe": ("qwen3_moe_sft", EXPERTS),
    "deepseek_v3": ("deepseek_v3_pretrain", EXPERTS),
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8}
SMALL = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 7, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64}


def prepare(folder: Path, family: str, small: bool) -> list[str]:
    """The flags of model and data, made in `folder`: a model (of Qwen3 no weights), docstrings of at least 40
    characters, once each."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(dict.fromkeys(doc for _, doc in documented(Path(sysconfig.get_path("stdlib"))) if len(doc) >= 40))
    texts = texts if small else texts[:400]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--model", str(folder / "model"), "--data", str(folder / "text.jsonl"), "--cache", str(folder / "cache")]
    if family != "qwen3":
        subprocess.run([sys.executable, str(RECIPES / "tiny_checkpoint.py"), family, str(folder / "model")], check=True)
        return flags
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    vocab = 4096 if small else 400
    t.train_from_iterator(texts,
                          trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<|endoftext|>"], show_progress=False,
                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>").save_pretrained(folder / "model")
    size = SMALL if small else TINY
    Qwen3Config(vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=1024,
                **size).save_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    return flags


def start(recipe: str, mesh: str, flags: list[str], log: Path) -> subprocess.Popen:
    launcher = [] if not mesh else ["-m", "torch.distributed.run", "--nproc_per_node",
                                    str(math.prod(parse_mesh(mesh).values()))]
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, *launcher, str(RECIPES / f"{recipe}.py"), *flags,
                                 *(["--mesh", mesh] if mesh else [])],
                                stdout=file, stderr=subprocess.STDOUT)


def rows(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=device.processors())
    parser.add_argument("--tiny", action="store_true", help="a toy model and little text, for the tests")
    parser.add_argument("--dtype", default="fp32",
                        help="fp64: where a rounding may send a token to another expert, curves part in fp32")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--move", nargs=2, action="append", metavar=("MESH", "PART"),
                        help="a mesh ('' is one process) and the part of the steps until which it trains, in place of "
                             "the family's; once for each")
    args = parser.parse_args(argv)
    tiny, (recipe, meshes) = args.tiny or args.family != "qwen3", FAMILIES[args.family]
    meshes = [(mesh, float(part)) for mesh, part in args.move] if args.move else meshes
    size = ["--seq-len", "64", "--batch-tokens", "256"] if tiny else ["--seq-len", "256", "--batch-tokens", "1024"]
    flags = [*prepare(args.out, args.family, not tiny), *size, "--steps", str(args.steps), "--dtype", args.dtype,
             "--lr", "1e-3", "--eval-fraction", "0.02", "--warmup", "0.05", "--eval-every", str(args.steps // 5),
             "--save-every", str(max(4, args.steps // 20)),
             "--resume", "auto"]
    whole, broken, begun = args.out / "whole", args.out / "interrupted", time.monotonic()
    if start(recipe, "", [*flags, "--out", str(whole), "--threads", str(args.threads)], args.out / "whole.log").wait():
        raise RuntimeError(f"{args.out}/whole.log: the uninterrupted run failed")
    print(f"uninterrupted: {time.monotonic() - begun:.0f} s", flush=True)
    for mesh, until in meshes:
        threads = max(1, args.threads // math.prod(parse_mesh(mesh).values()))
        run = start(recipe, mesh, [*flags, "--out", str(broken), "--threads", str(threads)],
                    args.out / "interrupted.log")
        while until < 1 and run.poll() is None and max([0, *(r["step"] for r in rows(broken))]) < until * args.steps:
            time.sleep(0.02)
        if until < 1 and run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            print(f"{mesh or 'one process'}: killed after step {rows(broken)[-1]['step']}", flush=True)
        code = run.wait()
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{args.out}/interrupted.log: the run on {mesh or 'one process'} ended with {code}")
    a, b = ([r["loss"] for r in rows(out) if "loss" in r] for out in (whole, broken))
    steps = [r["step"] for r in rows(broken) if "loss" in r]
    if steps != list(range(1, args.steps + 1)):
        raise RuntimeError(f"{broken}/metrics.jsonl: each step should stand there once")
    held = [[r["eval_loss"] for r in rows(out) if "eval_loss" in r] for out in (whole, broken)]
    x, y = (load_file(out / "hf" / "model.safetensors") for out in (whole, broken))
    result = {"loss": max(abs(p / q - 1) for p, q in zip(a, b, strict=True)),
              "eval_loss": max(abs(p / q - 1) for p, q in zip(*held, strict=True)),
              "weights": max(((x[k] - y[k]).abs().max() / x[k].abs().max()).item() for k in x)}
    params = sum(v.numel() for v in x.values())
    print(f"{device.capability()}\n{params:,} parameters, {args.steps} steps, loss {a[0]:.3f} → {a[-1]:.3f}, held-out "
          f"{held[0][0]:.4f} → {held[0][-1]:.4f} ({held[1][-1]:.4f} interrupted); the curves are within "
          f"{result['loss']:.1e} of each other, held-out losses within {result['eval_loss']:.1e}, weights within "
          f"{result['weights']:.1e} of each leaf's largest; {time.monotonic() - begun:.0f} s in all", flush=True)
    return result | {"last": a[-1], "first": a[0]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
