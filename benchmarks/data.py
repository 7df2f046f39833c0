"""A file of text tokenised, packed and streamed, beside `datasets` with TRL's packing: time, memory over time, how full
the packs are.

    python benchmarks/data.py --mb 1000 --peer PYTHON_WITH_DATASETS_AND_TRL --out FILE.json
    python benchmarks/data.py --small                     # seconds, ours alone

The text is the standard library's own: pieces of its sources, drawn with other beginnings and ends each time they come,
until the file is long enough. The tokenizer is a byte-level BPE trained on it. Each side is a process of its own (with
`--workers` more to tokenise) that says when a phase ends; what it and its children hold is read from /proc meanwhile.
Both stream the same steps: [packs, seq_len] int64 tensors of ids, labels, positions and loss masks.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def write_text(path: Path, mb: float, seed: int = 0) -> int:
    """JSONL of {"text"}: whole functions and classes, or stretches of lines, of the standard library. Returns the
    number of lines."""
    sources = [f.read_text(errors="ignore").splitlines(keepends=True)
               for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    rng, size, count = random.Random(seed), 0, 0
    with open(path, "w") as out:
        while size < mb * 1e6:
            lines = rng.choice(sources)
            start = rng.randrange(len(lines))
            stop = start + 1 + int(rng.lognormvariate(3.2, 1.1))
            text = json.dumps({"text": f"# piece {count}, {rng.randrange(10**6)}\n"
                               + "".join(lines[start:stop])}) + "\n"
            size, count = size + len(text), count + 1
            out.write(text)
    return count


def train_tokenizer(path: Path, folder: Path, vocab: int = 8192) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    with open(path) as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(5000), strict=False)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<eos>"],
                                                        initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)


# -- the two sides, each in a process of its own

def told(phase: str, **figures: Any) -> None:
    print(json.dumps({"phase": phase, **figures}), flush=True)


def ours(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from xtf.data import Encoder, Loader, tokenized

    encoder = Encoder(AutoTokenizer.from_pretrained(args.work / "tokenizer"))
    told("import")
    data = tokenized(str(args.work / "data.jsonl"), encoder, folder=args.work / "ours",
                     workers=args.workers).at(args.seq_len)
    told("tokenise", tokens=data.stats.tokens)
    data = tokenized(str(args.work / "data.jsonl"), encoder, folder=args.work / "ours").at(args.seq_len)
    told("open again", tokens=data.stats.tokens)
    loader, tokens, i = Loader(data, args.seq_len, args.packs), 0, 0
    batches = loader.stream()
    while loader.cursor(i)["epoch"] == 0:
        next(batches)
        tokens += sum(loader.documents(i))
        i += 1
    told("pack and stream", tokens=tokens, efficiency=tokens / (i * args.packs * args.seq_len), steps=i)


def peer(args: argparse.Namespace) -> None:
    os.environ["HF_HOME"] = str(args.work / "peer")
    import datasets
    import torch
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    told("import", versions={"datasets": datasets.__version__, "trl": trl.__version__})
    found: Any = datasets.load_dataset("json", data_files=str(args.work / "data.jsonl"), split="train",
                                       cache_dir=str(args.work / "peer"))
    eos = tokenizer.eos_token_id
    found = found.map(lambda rows: {"input_ids": [[*ids, eos] for ids in tokenizer(rows["text"])["input_ids"]]},
                      batched=True, num_proc=args.workers if args.workers > 1 else None, remove_columns=["text"])
    told("tokenise",
         tokens=sum(len(x) for batch in found.with_format("arrow").iter(10_000) for x in batch["input_ids"]))
    packed = trl.pack_dataset(found.shuffle(seed=0), args.seq_len, strategy="bfd_split")
    told("pack")
    packed, tokens, steps = packed.with_format("numpy"), 0, 0
    for rows in packed.iter(args.packs):
        shape = args.packs, args.seq_len
        ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100)
        for r, (row, lengths) in enumerate(zip(rows["input_ids"], rows["seq_lengths"], strict=True)):
            ids[r, :len(row)] = torch.from_numpy(row)
            labels[r, :len(row)] = ids[r, :len(row)]
            place = 0
            for n in lengths:
                positions[r, place:place + n] = torch.arange(n)
                labels[r, place] = -100
                place += n
        mask = (labels != -100).float()
        assert mask.any()
        tokens, steps = tokens + sum(map(len, rows["input_ids"])), steps + 1
    told("stream", tokens=tokens, efficiency=tokens / (len(packed) * args.seq_len), steps=steps)


# -- watching them

def held(pid: int) -> tuple[float, float]:
    """(MB, of those not a file's) that a process and its descendants hold: proportional set sizes, in which shared
    pages count once."""
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents.setdefault(int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]),
                               []).append(int(entry))
        except (OSError, IndexError):
            continue
    todo, total, anonymous = [pid], 0.0, 0.0
    while todo:
        at = todo.pop()
        todo += parents.get(at, [])
        try:
            lines = Path(f"/proc/{at}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:                                            # it has just ended
            continue
        kb = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
        total, anonymous = total + kb["Pss"] / 1e3, anonymous + kb["Pss_Anon"] / 1e3
    return total, anonymous


def watch(role: str, python: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a side; for each phase its seconds, its figures, and samples of memory: [seconds, MB, not a file's MB]."""
    command = [python, str(HERE), "--role", role, "--work", str(args.work), "--workers", str(args.workers), "--seq-len",
               str(args.seq_len), "--packs", str(args.packs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)})
    samples: list[list[float]] = []
    begun = time.monotonic()

    def sample() -> None:
        while process.poll() is None:
            samples.append([round(time.monotonic() - begun, 2), *(round(x, 1) for x in held(process.pid))])
            time.sleep(args.every)
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    phases, before = [], 0.0
    assert process.stdout
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        now = time.monotonic() - begun
        mine = [s for s in samples if before <= s[0] <= now]
        thin = mine[::max(1, len(mine) // 60)]
        quarter = max(1, len(mine) // 4)
        peak = lambda of, column: max((s[column] for s in of), default=0.0)
        phases.append({**json.loads(line), "seconds": round(now - before, 2), "peak_mb": peak(mine, 1),
                       "peak_anonymous_mb": peak(mine, 2), "second_quarter_peak_mb": peak(mine[quarter:2 * quarter], 1),
                       "last_quarter_peak_mb": peak(mine[-quarter:], 1),
                       "memory": thin})
        before = now
    if process.wait():
        raise SystemExit(f"{role} failed with status {process.returncode}")
    thread.join()
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=1000)
    parser.add_argument("--small", action="store_true", help="2 MB")
    parser.add_argument("--peer", help="a Python that has datasets, trl and transformers")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--packs", type=int, default=16)
    parser.add_argument("--every", type=float, default=0.25, help="seconds between samples of memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--role", choices=["ours", "peer"])
    args = parser.parse_args()
    if args.role:
        return {"ours": ours, "peer": peer}[args.role](args)
    if args.small:
        args.mb, args.every, args.seq_len = 2, 0.05, 1024
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        args.work = Path(work)
        documents = write_text(args.work / "data.jsonl", args.mb)
        train_tokenizer(args.work / "data.jsonl", args.work / "tokenizer")
        report: dict[str, Any] = {"mb": args.mb, "documents": documents, "workers": args.workers,
                                  "seq_len": args.seq_len, "packs": args.packs,
                                  "ours": watch("ours", sys.executable, args)}
        if args.peer:
            report["peer"] = watch("peer", args.peer, args)
    for side in ("ours", "peer"):
        for p in report.get(side, [])[1:]:
            rate = f"{p['tokens'] / p['seconds']:>12,.0f} tokens/s" if "tokens" in p else " " * 21
            full = f", {100 * p['efficiency']:.2f}% of positions used" if "efficiency" in p else ""
            memory = (f"peak {p['peak_mb']:7,.0f} MB (second quarter {p['second_quarter_peak_mb']:,.0f}, "
                      f"last {p['last_quarter_peak_mb']:,.0f})")
            print(f"{side:5} {p['phase']:16} {p['seconds']:8.1f} s {rate}  {memory}{full}")
    if args.out:
        args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
