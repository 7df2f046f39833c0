"""The recipes end to end on a tiny real checkpoint: one curve on every layout, the curve of a plain transformers loop,
files that transformers loads, and what they say to wrong flags."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from xtf import cli, hf
from xtf.data import Loader, read_samples, stdlib_qa
from xtf.models import llama
from xtf.optim import schedules
from xtf.testing import pool

ROOT = Path(__file__).parents[2]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
STEPS, SEQ_LEN, BATCH = 20, 64, 256


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer(texts, path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400,
                                                     special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                     show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Real chats from the standard library, and tiny checkpoints of both recipes' families (vocabulary larger than the
    tokenizer's)."""
    folder = tmp_path_factory.mktemp("sft")
    train, held_out = stdlib_qa.records()
    for name, rows in (("train", train[:60]), ("heldout", held_out[:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    size = {"vocab_size": 416, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 2,
            "pad_token_id": 0, "max_position_embeddings": 64}
    for name, config in (("qwen3", Qwen3Config(**size, tie_word_embeddings=True)), ("llama", LlamaConfig(**size))):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        make_tokenizer([m["content"] for r in train[:300] for m in r["messages"]], folder / name)
    return folder


def argv(files, out, family="qwen3", *more):
    return ["--model", str(files / family), "--data", str(files / "train.jsonl"), "--eval-data",
            str(files / "heldout.jsonl"), "--steps", str(STEPS), "--seq-len", str(SEQ_LEN), "--batch-tokens",
            str(BATCH), "--lr", "3e-3", "--warmup", "0.1", "--out", str(out), "--cache", str(files / "cache"), *more]


def train(name, args):
    recipe(name).main(args)


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def curve(out):
    return [r["loss"] for r in rows(out) if "loss" in r]


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one")
    train("qwen3_sft", argv(files, out))
    return out


def test_the_curve_is_that_of_a_plain_transformers_loop(files, one):
    """fp32, 20 steps, one seed, the same packs and schedule; each document alone, as packing is invisible."""
    tokenizer = AutoTokenizer.from_pretrained(files / "qwen3")
    model = AutoModelForCausalLM.from_pretrained(files / "qwen3", dtype=torch.float32, attn_implementation="sdpa")
    groups = [{"params": [p for n, p in model.named_parameters() if ("norm" in n) == norms], "weight_decay": decay}
              for norms, decay in ((False, 0.1), (True, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    schedule = schedules.cosine(3e-3, STEPS, 0.1)
    samples, _ = read_samples(files / "train.jsonl", tokenizer, SEQ_LEN)
    loader, losses, norms = Loader(samples, SEQ_LEN, BATCH // SEQ_LEN, seed=0), [], []
    for i in range(STEPS):
        batch, loss = loader.step(i), 0.0
        for ids, labels, mask, segments in zip(batch.input_ids, batch.labels, batch.loss_mask, batch.segments,
                                               strict=True):
            for a, b in zip(segments[:-1].tolist(), segments[1:].tolist(), strict=True):
                if mask[a:b].any():
                    logits = model(ids[None, a:b]).logits[0]
                    loss = loss + (torch.nn.functional.cross_entropy(logits, labels[a:b], reduction="none")
                                   * mask[a:b]).sum()
        loss = loss / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(torch.tensor(i)))
        optimizer.step()
        losses.append(loss.item())
    ours = curve(one)
    assert max(abs(a / b - 1) for a, b in zip(ours, losses, strict=True)) < 1e-4
    assert max(abs(r["grad_norm"] / n - 1)
               for r, n in zip([r for r in rows(one) if "loss" in r], norms, strict=True)) < 1e-3
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name, more", [("qwen3_sft", ()), ("qwen3_pretrain", ("--optimizer", "muon"))])
def test_the_logged_rate_is_the_one_that_is_applied(files, tmp_path, monkeypatch, name, more):
    """Also after steps that were skipped, which the optimizer does not count. The first step that AdamW takes moves
    each number by the rate, whatever the gradient, so the rate is read off the updates; those after it are the
    schedule's, from its start."""
    largest, make = [], cli.optimizer

    def optimizer(*args):
        tx, schedule, watch = make(*args)
        check, seen = watch.check, []

        def skipping(state, loss, norm):
            seen.append(loss)
            return check(state, loss * (float("nan") if len(seen) <= 3 else 1), norm)

        def update(grads, state, params, ops, **extra):
            updates, state = tx.update(grads, state, params, ops, **extra)
            largest.append(updates["embed"]["weight"].abs().max().item())
            return updates, state
        watch.check = skipping
        return tx._replace(update=update), schedule, watch
    monkeypatch.setattr(cli, "optimizer", optimizer)
    train(name, argv(files, tmp_path, "qwen3", "--steps", "6", "--warmup", "0.5", "--weight-decay", "0", *more))
    steps = [r for r in rows(tmp_path) if "loss" in r]
    assert [r["skipped"] for r in steps] == [1, 2, 3, 3, 3, 3] and largest[:3] == [0, 0, 0]
    assert steps[3]["lr"] == pytest.approx(largest[3], rel=1e-5)
    assert [r["lr"] for r in steps] == pytest.approx([3e-3 * n / 4 for n in (1, 1, 1, 1, 2, 3)], rel=1e-12)


def test_what_a_run_leaves(files, one):
    steps = [r for r in rows(one) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_gb"} <= steps[0].keys()
    assert (one / "loss.png").read_bytes()[:4] == b"\x89PNG"
    first, last = [r["eval_loss"] for r in rows(one) if "eval_loss" in r]
    assert last < first
    model = AutoModelForCausalLM.from_pretrained(one / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(one / "hf")
    nll, tokens = 0.0, 0
    for s in read_samples(files / "heldout.jsonl", tokenizer, SEQ_LEN)[0]:
        ids, mask = torch.as_tensor(s.ids), torch.as_tensor(s.mask)[1:].bool()
        nll += torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1][mask].double(), ids[1:][mask],
                                                 reduction="sum").item()
        tokens += int(mask.sum())
    assert abs(nll / tokens / last - 1) < 1e-4  # the loss that transformers computes from the directory is ours
    written, given = ({k: v[1:] for k, v in hf.tensors(path).items()} for path in (one / "hf", files / "qwen3"))
    assert written == given


SLOW = [pytest.param(mesh, (), marks=pytest.mark.slow) for mesh in ("dp=2", "dp=2,sp=2")]
LAYOUTS = [*SLOW, ("dp=4", ()), ("sp=2", ()), ("sp=2,dp=2", ("--remat",)), ("replicate=2,dp=2", ()), ("ep=2,dp=2", ()),
           ("", ("--remat",)), ("dp=2", ("--compile",))]


@pytest.mark.parametrize("mesh, more", LAYOUTS)
def test_one_curve_on_every_layout(files, one, tmp_path, mesh, more):
    """To 1e-5 over 20 steps; dp=1 has four micro-batches, dp=4 one."""
    args = argv(files, tmp_path, "qwen3", "--mesh", mesh, *more)
    ranks = 4 if mesh.count("=") == 2 or "4" in mesh else 2 if mesh else 1
    if ranks > 1:
        pool(ranks).run(train, "qwen3_sft", args)
    else:
        train("qwen3_sft", args)
    assert max(abs(a / b - 1) for a, b in zip(curve(tmp_path), curve(one), strict=True)) < 1e-5


def test_llama_under_torchrun(files, tmp_path):
    """The command that users type, on two real ranks, against one process; an untied head."""
    train("llama_sft", argv(files, tmp_path / "one", "llama", "--steps", "4"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               str(ROOT / "recipes" / "llama_sft.py")]
    args = argv(files, tmp_path / "two", "llama", "--steps", "4", "--mesh", "dp=2", "--threads", "1")
    done = subprocess.run([*command, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(abs(a / b - 1) for a, b in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True)) < 1e-5
    assert "held-out loss" in done.stdout


def test_bf16_is_close_to_fp32(files, one, tmp_path):
    """bf16 products round to 8 bits; the first loss, before any update, is within that of fp32's."""
    train("qwen3_sft", argv(files, tmp_path, "qwen3", "--dtype", "bf16", "--steps", "2"))
    assert abs(curve(tmp_path)[0] / curve(one)[0] - 1) < 2 ** -8


def test_dry_run_prints_the_layout_and_stops(files, tmp_path, capsys):
    train("qwen3_sft", argv(files, tmp_path / "out", "qwen3", "--dry-run"))
    out = capsys.readouterr().out
    assert "layers.*.q.weight" in out and "bytes per rank" in out and not (tmp_path / "out").exists()


def test_show_batch_prints_what_is_trained_and_stops(files, tmp_path, capsys):
    train("qwen3_sft", argv(files, tmp_path / "out", "qwen3", "--show-batch"))
    out = capsys.readouterr().out
    assert "Explain" in out and "<|im_end|>" in out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, message", [
    (("--dtype", "fp8"), "--dtype fp8: not supported yet; use fp32 or bf16"),
    (("--dtype=fp8",), "--dtype fp8: not supported yet; use fp32 or bf16"),
    (("--keep", "0"), "--keep 0: must be at least 1"),
    (("--keep-best", "--eval-data"), "--keep-best: needs a held-out loss"),
    (("--batch-tokens", "100"), "--batch-tokens 100: must be a multiple of --seq-len 64"),
    (("--model", "nowhere"), "--model nowhere: no such directory, and not a hub id"),
    (("--steps", "0"), "--steps 0: must be at least 1"),
])
def test_flags_that_are_refused_by_name(files, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        cli.parse(cli.Flags, argv(files, tmp_path, "qwen3", *more))


@pytest.mark.parametrize("more, message", [
    (("--mesh", "tp=2"), r"--mesh: 'tp=2' is not one of replicate=N, dp=N"),
    (("--mesh", "dp=2"), "dp=2 needs 2 ranks"),
])
def test_meshes_that_do_not_fit(files, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train("qwen3_sft", argv(files, tmp_path, "qwen3", *more))


def test_heads_that_do_not_divide_are_refused_before_anything_is_read(files, tmp_path):
    """From the config, since specs do not always tell how many heads there are."""
    flags = cli.parse(cli.Flags, argv(files, tmp_path, "llama", "--mesh", "sp=3"))
    with pytest.raises(ValueError, match="--mesh sp=3: sp=3 does not divide the 4 query heads of --model"):
        cli.model(flags, llama, other="")


def test_held_out_data_without_loss_is_refused(files, tmp_path):
    (tmp_path / "no.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Nobody answers."}]})
                                       + "\n")
    with pytest.raises(ValueError, match=r"--eval-data .*no\.jsonl: no sample in it has a token that carries loss"):
        train("qwen3_sft", [*argv(files, tmp_path / "out"), "--eval-data", str(tmp_path / "no.jsonl")])


def test_another_family_is_sent_to_its_recipe(files, tmp_path):
    with pytest.raises(ValueError, match=r"use recipes/llama_sft.py"):
        train("qwen3_sft", argv(files, tmp_path, "llama"))


def test_an_error_is_one_line_and_exit_status_1(files, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "recipes" / "qwen3_sft.py"), *argv(files, tmp_path, "llama")],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --model")


def test_pretraining_with_muon_and_all_that_flags_turn_on(files, tmp_path):
    """Two weighted sources, 8-bit moments, muon, length grouping, a profile: on two ranks the curve of one."""
    for name, rows_ in (("web", stdlib_qa.records()[0][:40]), ("code", stdlib_qa.records()[0][40:60])):
        (tmp_path
         / f"{name}.jsonl").write_text("".join(json.dumps({"text": r["messages"][1]["content"]}) + "\n" for r in rows_))
    args = [*argv(files, tmp_path / "one"), "--data", f"{tmp_path}/web.jsonl=0.75", f"{tmp_path}/code.jsonl=0.25",
            "--steps", "8", "--from-scratch", "--optimizer", "muon", "--moments", "int8", "--group-by-length",
            "--decay", "0.5", "--profile", "3:4"]
    train("qwen3_pretrain", args)
    pool(2).run(train, "qwen3_pretrain", [*args, "--out", str(tmp_path / "two"), "--mesh", "dp=2"])
    assert max(abs(a / b - 1) for a, b in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True)) < 1e-5
    steps = [r for r in rows(tmp_path / "one") if "loss" in r]
    mix = [[r[f"mix/{tmp_path}/{name}.jsonl"] for name in ("web", "code")] for r in steps]
    assert [sum(m) for m in mix] == [r["tokens"] for r in steps] and all(map(sum, zip(*mix, strict=True)))
    assert steps[-1]["lr"] < steps[2]["lr"]
    assert {p.name for p in (tmp_path / "two" / "profile").iterdir()} >= {"trace-rank0.json.gz", "trace-rank1.json.gz"}
