"""The cache: made once whoever asks, never half there, never believed when damaged, the same whoever makes it."""
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from xtf.data import BadLine, Encoder, Loader, open_data, split_off, tokenized
from xtf.data import cache as cache_module
from xtf.data.cache import FILES
from xtf.data.chat import Encoded
from xtf.testing import _pool, pool


@pytest.fixture(scope="module")
def encoder(make_tokenizer):
    return Encoder(make_tokenizer("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% "
                                  "endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"))


@pytest.fixture
def file(tmp_path, docstrings):
    """Text and conversations, about 150 KB."""
    rows = [{"text": r["messages"][1]["content"]} if i % 3 else r for i, r in enumerate(docstrings[0][:600])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "data.jsonl"


def caches(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir())


def contents(folder):
    """The bytes of the only cache in a folder."""
    place, = caches(folder)
    return {name: (place / name).read_bytes() for name in FILES}


def untouched(monkeypatch):
    """From here on, tokenising anything fails."""
    monkeypatch.setattr(Encoder, "many", lambda *_: pytest.fail("tokenised again"))


def test_a_cache_holds_what_the_encoder_gives(tmp_path, file, encoder, monkeypatch):
    said = []
    data = tokenized(str(file), encoder, folder=tmp_path / "c", say=said.append)
    wanted = [sample for line in file.read_bytes().splitlines() for sample in encoder(line)]
    assert len(data) == len(wanted) == data.stats.samples and data.stats.lines == 600 and "tokens/s" in said[-1]
    for i, (ids, mask, _) in enumerate(wanted):
        assert data[i].ids.tolist() == ids.tolist() and data[i].mask.tolist() == mask.tolist() and data[i].source == i
    assert data.stats.tokens == sum(len(s.ids) for s in wanted)
    assert data.stats.loss_tokens == sum(int(s.mask.sum()) for s in wanted)
    untouched(monkeypatch)
    again = tokenized(str(file), encoder, folder=tmp_path / "c", workers=3)
    assert again.fingerprint == data.fingerprint and str(again.stats) == str(data.stats)
    assert again[5].ids.tolist() == data[5].ids.tolist()


def test_processes_and_chunks_do_not_matter(tmp_path, file, encoder):
    alone = tokenized(str(file), encoder, folder=tmp_path / "a")
    together = tokenized(str(file), encoder, folder=tmp_path / "b", workers=2, chunk_bytes=4000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and alone.fingerprint == together.fingerprint
    assert not list((tmp_path / "b").glob("*partial*"))


def test_what_changed_is_made_anew(tmp_path, file, encoder, make_tokenizer, monkeypatch):
    folder = tmp_path / "c"
    make = lambda e=encoder: tokenized(str(file), e, folder=folder).fingerprint
    first = make()
    again = lambda: len(caches(folder))
    assert again() == 1
    other_template = Encoder(make_tokenizer("{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"))
    for count, (e, changed) in enumerate([(other_template, "template"),
                                          (Encoder(encoder.tokenizer, train_on_everything=True), "options")], 2):
        now = make(e)
        assert again() == count and now[changed] != first[changed]
    lines = file.read_bytes().splitlines(keepends=True)
    at = next(i for i in range(len(lines) // 2, len(lines)) if b" the " in lines[i])
    lines[at] = lines[at].replace(b" the ", b" tha ", 1)                      # as long as before, within the first MB
    file.write_bytes(b"".join(lines))
    assert make()["data"] != first["data"] and again() == 4
    file.write_bytes(file.read_bytes() + lines[0])
    make()
    assert again() == 5
    os.utime(file, ns=(1, 1))  # what a change in the middle of a large file leaves behind
    make()
    assert again() == 6
    untouched(monkeypatch)
    make()


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_a_damaged_cache_is_named_and_made_anew(tmp_path, file, encoder, name, harm):
    folder = tmp_path / "c"
    tokenized(str(file), encoder, folder=folder)
    whole, (place,) = contents(folder), caches(folder)
    data = bytearray((place / name).read_bytes())
    if harm == "flipped":
        data[len(data) * 2 // 3] ^= 4
    (place / name).unlink()
    if harm != "missing":
        (place / name).write_bytes(data[:-1] if harm == "truncated" else data)
    said = []
    tokenized(str(file), encoder, folder=folder, say=said.append)
    assert contents(folder) == whole and str(place) in said[0] and "made anew" in said[0] and name in said[0]


def test_a_recent_check_is_trusted_and_an_old_one_is_not(tmp_path, file, encoder, monkeypatch):
    tokenized(str(file), encoder, folder=tmp_path / "c")
    stamp = caches(tmp_path / "c")[0] / "checked.json"
    checks = []
    monkeypatch.setattr(cache_module, "_crc", lambda place, *part: checks.append(part) or (*part[:2], part[3], part[3]))
    tokenized(str(file), encoder, folder=tmp_path / "c")
    assert not checks
    os.utime(stamp, (time.time() - 7200, time.time() - 7200))
    tokenized(str(file), encoder, folder=tmp_path / "c")
    assert {c[0] for c in checks} == set(FILES)


def test_bad_lines(tmp_path, encoder, monkeypatch):
    good = '{"text": "a line that can be read"}\n'
    lines = [good] * 40
    lines[3], lines[30], lines[31] = '{"text": 5}\n', "{broken\n", "\n"
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(good * 7 if name == "a" else "".join(lines))
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    for workers in (1, 2):
        with pytest.raises(BadLine, match=r"b\.jsonl:4: ") as e:
            tokenized(both, encoder, folder=tmp_path / f"c{workers}", workers=workers, chunk_bytes=300)
        assert e.value.line == 4 and not caches(tmp_path / f"c{workers}")
    data = tokenized(both, encoder, folder=tmp_path / "c", on_bad="skip", chunk_bytes=300, workers=2)
    assert [(b.file[-7:], b.line) for b in data.stats.bad_lines] == [("b.jsonl", 4), ("b.jsonl", 31), ("b.jsonl", 32)]
    assert data.stats.bad == 3 and data.stats.lines == 47 and len(data) == 44 == data.num_records
    untouched(monkeypatch)
    with pytest.raises(BadLine, match=r"b\.jsonl:4: "):  # a cache made with "skip" does not hide them
        tokenized(both, encoder, folder=tmp_path / "c")
    with pytest.raises(ValueError, match="neither"):
        tokenized(both, encoder, folder=tmp_path / "c", on_bad="ignore")


def test_errors_of_a_worker_arrive(tmp_path, file, make_tokenizer):
    no_template = Encoder(make_tokenizer(None))
    for workers in (1, 2):
        with pytest.raises(ValueError, match="needs a chat template"):
            tokenized(str(file), no_template, folder=tmp_path / "c", workers=workers, chunk_bytes=20_000)
    assert not list((tmp_path / "c").glob("*partial*"))


def test_conversations_of_several_samples_stay_together(tmp_path):
    class Thrice(Encoder):
        def many(self, batch):
            return [[Encoded(np.array([10 * k + t for t in range(4)], np.int32), np.array([t > 1 for t in range(4)]),
                             False)] * 3
                    for k in range(len(batch))]
    (tmp_path / "data.jsonl").write_text("{}\n" * 30)
    data = tokenized(str(tmp_path / "data.jsonl"), Thrice(None), folder=tmp_path, chunk_bytes=30, workers=1)
    assert len(data) == 90 and data.num_records == 30
    assert [data[i].source for i in range(90)] == [i // 3 for i in range(90)]
    rest, held = split_off(data, 0.2)
    assert len(rest) == 72 and len(held) == 18
    assert {rest[i].source for i in range(72)}.isdisjoint({held[i].source for i in range(18)})


def test_ranks_that_ask_together_build_once(tmp_path, file, encoder):
    def rank(path, folder, encoder):
        said = []
        data = tokenized(path, encoder, folder=folder, say=said.append, chunk_bytes=4000)
        return data.fingerprint, str(data.stats), sum("tokenised" in s and "waiting" not in s for s in said)
    out = pool(4).run(rank, str(file), str(tmp_path / "c"), encoder)
    assert len({str(o[:2]) for o in out}) == 1 and sum(o[2] > 0 for o in out) == 1 and len(caches(tmp_path / "c")) == 1


def test_who_waits_says_what_for(tmp_path, file, encoder):
    tokenized(str(file), encoder, folder=tmp_path / "c")
    said, waiter = [], None
    with cache_module._locked(caches(tmp_path / "c")[0], print) as note:
        note("tokenised 3 of 9 chunks")
        waiter = threading.Thread(target=tokenized, args=(str(file), encoder),
                                  kwargs=dict(folder=tmp_path / "c", say=said.append))
        waiter.start()
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    waiter.join()
    assert said == ["waiting for another process (tokenised 3 of 9 chunks)"]


def descendants(pid):
    """Processes below one, by /proc."""
    out, parents = [pid], {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry)] = int(parent)
    for at in out:
        out += [p for p, parent in parents.items() if parent == at]
    return out


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_builder_that_is_killed_leaves_nothing_half(tmp_path, file, encoder):
    """SIGKILL at random moments: what is there afterwards is whole or not there, its workers go, the next one
    builds."""
    file.write_bytes(file.read_bytes() * 4)
    wanted = tokenized(str(file), encoder, folder=tmp_path / "whole").fingerprint
    context, moments, finished = multiprocessing.get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(_pool.PRELOAD)
    folder, told = tmp_path / "c", []
    for workers in (1, 2, 2):
        build = partial(tokenized, str(file), encoder, folder=str(folder), workers=workers, chunk_bytes=3000)
        process = context.Process(target=build)
        process.start()
        begun = time.monotonic()
        while time.monotonic() - begun < 20 and process.is_alive() and not list(folder.glob("*partial*/part-*")):
            time.sleep(0.005)
        time.sleep(moments.random() * 0.4)
        family = descendants(process.pid)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        finished += process.exitcode == 0
        deadline = time.monotonic() + 20
        while (left := [p for p in family if alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left
        assert all((p / "meta.json").exists() for p in caches(folder) if "partial" not in p.name)
    assert finished < 3
    data = tokenized(str(file), encoder, folder=folder, say=told.append, chunk_bytes=3000)
    assert data.fingerprint == wanted and len(caches(folder)) == 1 and not any("made anew" in t for t in told)


def test_folders_that_cannot_be_used(tmp_path, file, encoder):
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(OSError, match=r"occupied: tokenised data cannot be kept there .* give another folder"):
        tokenized(str(file), encoder, folder=tmp_path / "occupied")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    # a disk on which no more than 20 KB fit into a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1][1]))
    try:
        with pytest.raises(OSError, match=r"cannot be kept there .* make room"):
            tokenized(str(file), encoder, folder=tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert not caches(tmp_path / "c")
    assert len(tokenized(str(file), encoder, folder=tmp_path / "c"))
    with pytest.raises((ValueError, OSError), match="nowhere"):
        tokenized(str(tmp_path / "nowhere.jsonl"), encoder, folder=tmp_path / "c")


def test_open_data(tmp_path, file, encoder):
    half = tmp_path / "half"
    half.mkdir()
    (half / "x.jsonl").write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:100]))
    said = []
    read = partial(open_data, encoder=encoder, seq_len=64, folder=tmp_path / "c", say=said.append)
    train, held = read([str(file), str(half)])
    assert len(train) >= 700 and held == [] and Loader(train, 64, 4).sources(0) == {}
    assert any("samples of 700 lines" in s for s in said)
    mixed, held = read([f"{file}=0.8", f"{half}=0.2"], eval_fraction=0.1, seed=3)
    loader = Loader(mixed, 64, 8)
    assert set(loader.sources(0)) == {str(file), str(half)} and [s.weight for s in mixed] == [0.8, 0.2]
    assert sum(len(s.data) for s in held) and all(s.data.part.held_out for s in held)
    tokens = [sum(loader.sources(i)[str(file)] for i in range(30)),
              sum(sum(loader.sources(i).values()) for i in range(30))]
    assert abs(tokens[0] / tokens[1] - 0.8) < 0.03
    train, held = read([str(half)], eval_data=[str(file)])
    assert len(held) >= 600
    with pytest.raises(ValueError, match="no sample to train on"):
        (tmp_path / "empty.jsonl").write_text('{"input_ids": [3]}\n')
        read([str(tmp_path / "empty.jsonl")])
    cursor = loader.cursor(7)
    with pytest.raises(ValueError, match=r"options of .* train_on_everything=True"):
        Loader(open_data([f"{file}=0.8", f"{half}=0.2"], Encoder(encoder.tokenizer, train_on_everything=True), 64,
                         eval_fraction=0.1, seed=3, folder=tmp_path / "c")[0], 64, 8).seek(cursor)


MEMORY = """
import json, os, sys
from xtf.data import Encoder, Loader, dataset, tokenized
dataset.FORGET = 1 << 20
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
def measure(path, folder):
    data = tokenized(path, Encoder(None), folder=folder, workers=1, chunk_bytes=1 << 18)
    built = peak()
    loader = Loader(data, 512, 16, window=512)
    i = 0
    while loader.cursor(i)["epoch"] == 0:
        loader.step(i)
        i += 1
    print(json.dumps([built, peak(), data.stats.tokens * 4 / 2**20]), flush=True)
for path in sys.argv[2:]:                              # each in a process of its own, which begins at the same size
    if os.fork() == 0:
        measure(path, sys.argv[1])
        os._exit(0)
    os.wait()
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Built and streamed: 10 times the data, whose cache is over 24 MB larger, in at most 8 MB more at the peak."""
    words = [str(k) for k in range(1400)]
    for n in (3_000, 30_000):
        with open(tmp_path / f"{n}.jsonl", "w") as out:
            for i in range(n):
                ids = words[i % 900:i % 900 + 20 + i * 7919 % 400]
                out.write('{"input_ids": [' + ", ".join(ids) + "]}\n")
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "c", tmp_path / "3000.jsonl",
                           tmp_path / "30000.jsonl"], check=True, capture_output=True, text=True)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    (built_small, streamed_small, mb_small), (built_large, streamed_large, mb_large) = measured
    assert mb_large - mb_small > 20, measured
    assert built_large - built_small < 8 and streamed_large - streamed_small < 8, measured
