"""Batches made ahead in a thread; the same global batches on real ranks, and after a resume on fewer."""
import gc
import itertools
import json
import threading
import time

import pytest
import torch

from xtf import tree
from xtf.data import Encoder, Loader, Sample, Source, tokenized
from xtf.data.prefetch import pinned, prefetch
from xtf.parallel import mesh
from xtf.testing import pool


def threads():
    return [t for t in threading.enumerate() if t.name == "xtf-prefetch"]


def until_gone():
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


def test_items_come_in_order_and_no_more_than_depth_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i
    ahead = prefetch(items, depth=3)
    assert not threads()                                              # nothing begins before it is asked for
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    deadline = time.monotonic() + 10
    while len(made) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == list(range(8))                                     # 5 taken, 3 ahead
    assert list(ahead) == list(range(5, 20)) and until_gone()


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_the_thread_ends_with_its_consumer(end):
    def items():
        for i in itertools.count():
            if end == "error" and i == 3:
                raise OSError("data.jsonl: the disk went away")
            yield i
    ahead = prefetch(items)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    if end == "close":
        ahead.close()
    elif end == "drop":
        del ahead
        gc.collect()
    else:
        with pytest.raises(OSError, match="disk went away"):          # after the items before it
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)
    assert until_gone()


def test_an_error_of_the_loader_is_raised_at_the_consumer():
    loader = Loader([Sample([1, 2, 3], [1, 1, 1])], 8, 2)
    loader.data[0].data.read = lambda *_: (_ for _ in ()).throw(ValueError("sample 0 is gone"))
    with pytest.raises(ValueError, match="sample 0 is gone"):
        next(loader.stream())
    assert until_gone()


def test_batches_go_to_pinned_memory_of_this_rank_s_accelerator(monkeypatch):
    """With a stand-in for the accelerator: the thread chooses the device before it pins."""
    calls = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda i: calls.append(("device", i)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append(("pin", tuple(self.shape))) or self + 1)
    out = next(pinned(iter([{"ids": torch.zeros(2, 3)}]), 5))
    assert calls == [("device", 5), ("pin", (2, 3))] and out["ids"].tolist() == [[1, 1, 1]] * 2
    calls.clear()
    same = {"ids": torch.zeros(1)}
    assert next(pinned(iter([same]), None)) is same and not calls


def data(seed, count=300):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 60, (count,), generator=generator).tolist()
    return [Sample(torch.randint(1, 999, (n,), generator=generator), torch.ones(n, dtype=torch.bool)) for n in lengths]


def make():
    return Loader([Source("a", data(0), 0.7), Source("b", data(1, 50), 0.3)], 64, 8, seed=5, window=100,
                  group_by_length=True)


def test_the_log_may_ask_while_the_thread_is_ahead():
    plain, loader = make(), make()
    for i, batch in zip(range(3, 60), loader.stream(3, depth=4), strict=False):
        assert torch.equal(batch.input_ids, plain.step(i).input_ids)
        assert loader.documents(i) == plain.documents(i) and loader.sources(i) == plain.sources(i)
        assert loader.cursor(i + 1) == plain.cursor(i + 1)


def global_batches(ranks, start, stop, cursor=None):
    """What the ranks of dp=ranks hold at each step, put together: rows are dealt in turn."""
    def rank(cursor):
        loader = make()
        if cursor is not None:
            loader.seek(cursor)
        m = mesh(dp=ranks) if ranks > 1 else None
        batches = list(itertools.islice(loader.stream(start, m), stop - start))
        return [tree.leaves(b) for b in batches], loader.cursor(stop)
    out = pool(ranks).run(rank, cursor)
    assert all(o[1] == out[0][1] for o in out)
    return [[torch.stack(leaf, 1).flatten(0, 1) for leaf in zip(*(o[0][i] for o in out), strict=True)]
            for i in range(stop - start)], out[0][1]


def test_real_ranks_see_the_same_global_batches_and_resume_on_fewer():
    whole, _ = global_batches(1, 0, 30)
    plain = make()
    assert all(torch.equal(a, b) for i in range(30) for a, b in zip(whole[i], tree.leaves(plain.step(i)), strict=True))
    for ranks in (2, 4):
        got, cursor = global_batches(ranks, 0, 17)
        assert all(torch.equal(a, b) for i in range(17) for a, b in zip(got[i], whole[i], strict=True))
    resumed, _ = global_batches(2, 17, 30, json.loads(json.dumps(cursor)))                  # from 4 ranks to 2
    assert all(torch.equal(a, b) for i in range(13) for a, b in zip(resumed[i], whole[17 + i], strict=True))


def test_a_cursor_from_a_cache_that_was_moved_or_made_anew_is_good(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": s.ids.tolist()}) + "\n" for s in data(0)))
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    one, two = (Loader(tokenized(str(tmp_path / f"{n}.jsonl"), Encoder(None), folder=tmp_path / n), 32, 4)
                for n in "ab")
    two.seek(one.cursor(40))
    assert torch.equal(two.step(40).input_ids, one.step(40).input_ids)
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text().replace("[", "[7, ", 1))
    with pytest.raises(ValueError, match=r"changed data .*300 documents"):
        Loader(tokenized(str(tmp_path / "b.jsonl"), Encoder(None), folder=tmp_path / "b"), 32, 4).seek(one.cursor(40))
