"""The row of samples: a true shuffle each epoch, and sources that have their shares of the tokens at every moment."""
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtf.data import Loader, Sample, Source, parse_sources
from xtf.data.mix import SMALL, Progress, draw, permuted


class Lengths:
    """Samples of which only the lengths matter."""

    def __init__(self, lengths):
        self.lengths, self.tokens = np.array(lengths), int(sum(lengths))

    def __len__(self):
        return len(self.lengths)

    def spans(self, indices):
        return indices, self.lengths[indices]


@pytest.mark.parametrize("n", [1, 2, 3, 100, SMALL, SMALL + 1, 200_000, 1 << 18])
def test_a_shuffle_holds_each_number_once(n):
    everything = permuted(np.arange(n), n, 1, 2)
    assert np.array_equal(np.sort(everything), np.arange(n))
    some = np.array([n - 1, 0, n // 2])
    assert np.array_equal(permuted(some, n, 1, 2), everything[some])  # the same, however few are asked for
    assert n < 100 or not np.array_equal(everything, permuted(np.arange(n), n, 1, 3))


def test_large_shuffles_look_like_chance():
    """Against what independent uniform numbers give: places fall evenly, neighbours are unrelated, epochs too; each
    within 5 sigma."""
    n = 300_000
    a, b = (permuted(np.arange(n), n, 0, e) / n for e in (0, 1))
    counts = np.histogram(a[:100_000], bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)  # chi-square of 99 degrees of freedom
    for x, y in ((a[:-1], a[1:]), (a, b), (a, np.arange(n) / n)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(n)


def greedy(sources, seed, count):
    """The rule, word for word: the next sample comes from the source with the fewest tokens for its weight, the first
    of equals."""
    taken, tokens, out = [0] * len(sources), [0] * len(sources), []
    for _ in range(count):
        s = min(range(len(sources)), key=lambda s: (tokens[s] / sources[s].weight, s))
        n = len(sources[s].data)
        epoch, place = divmod(taken[s], n)
        i = int(permuted(np.arange(n), n, seed, s, epoch)[place])
        out.append((s, i))
        taken[s] += 1
        tokens[s] += int(sources[s].data.lengths[i])
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=20),
                          st.sampled_from([0.1, 0.3, 0.5, 1.0, 7.0])), min_size=1, max_size=4),
       st.integers(0, 5), st.integers(1, 40))
def test_windows_follow_the_rule(specs, seed, window):
    sources = [Source(str(i), Lengths(lengths), weight) for i, (lengths, weight) in enumerate(specs)]
    state, out = tuple(Progress() for _ in sources), []
    while len(out) < 150:
        w = draw(sources, state, seed, window)
        assert 1 <= len(w.source) <= window
        out += list(zip(w.source.tolist(), w.start.tolist(), strict=True))
        state = w.after
        counts = Counter(s for s, _ in out)
        for s, (source, p) in enumerate(zip(sources, state, strict=True)):
            assert (p.epoch, p.position) == divmod(counts[s], len(source.data))
            assert p.tokens == sum(int(source.data.lengths[i]) for t, i in out if t == s)
    assert out == greedy(sources, seed, len(out))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=20),
                          st.sampled_from([0.1, 0.3, 0.5, 1.0, 7.0])), min_size=2, max_size=4))
def test_shares_hold_within_one_sample_at_every_moment(specs):
    sources = [Source(str(i), Lengths(lengths), weight) for i, (lengths, weight) in enumerate(specs)]
    state = tuple(Progress() for _ in sources)
    longest_sample = [max(s.data.lengths) / s.weight for s in sources]
    for _ in range(12):
        state = draw(sources, state, 0, 25).after
        ahead = [p.tokens / s.weight for p, s in zip(state, sources, strict=True)]
        assert max(ahead) - min(ahead) <= max(longest_sample) + 1e-9


def test_the_longest_source_ends_the_epoch():
    sources = [Source("small", Lengths([10] * 5), 1.0), Source("large", Lengths([10] * 100), 1.0),
               Source("rare", Lengths([10] * 30), 0.1)]
    state, epochs = tuple(Progress() for _ in sources), []
    for _ in range(12):
        state = draw(sources, state, 0, 64).after
        epochs.append((state[2].epoch, state[2].position))
    assert (1, 0) in epochs                       # 30 samples at a tenth outlast 100 at 1: the window ended there
    assert not any(e and 0 < p < 2 for e, p in epochs[:epochs.index((1, 0)) + 1])


def test_a_mixture_through_the_loader():
    """Tokens by source as the log shows them are those in the batch; shares are kept; each source's samples come once a
    pass."""
    lengths = {"web": [3 + i % 11 for i in range(60)], "code": [5 + i % 7 for i in range(25)]}
    data = {name: [Sample([1000 * (name == "code") + i] * n, [1] * n) for i, n in enumerate(ns)]
            for name, ns in lengths.items()}
    make = lambda: Loader([Source("web", data["web"], 0.7), Source("code", data["code"], 0.3)], 16, 2, seed=4,
                          window=32)
    loader = make()
    total = Counter()
    for i in range(300):
        ids = loader.step(i).input_ids
        real = torch_documents(loader.step(i))
        said = loader.sources(i)
        assert said == {"web": sum(len(d) for d in real if d[0] < 1000),
                        "code": sum(len(d) for d in real if d[0] >= 1000)}
        assert sum(said.values()) == sum(loader.documents(i)) and ids.shape == (2, 16)
        total.update(said)
    assert abs(total["web"] / sum(total.values()) - 0.7) < 0.03 and Loader(data["web"], 16, 2).sources(0) == {}
    cursor = loader.cursor(123)
    resumed = make()
    resumed.seek(cursor)
    assert all((resumed.step(i).input_ids == loader.step(i).input_ids).all() for i in range(123, 140))
    assert len(cursor["sources"]) == 2 and cursor["fingerprint"]["weight of web"] == "0.7"


def torch_documents(batch):
    """The documents of a batch without padding, whose token is 0 and so is that of the first sample: by loss."""
    out = []
    for ids, mask, segments in zip(batch.input_ids.tolist(), batch.loss_mask.tolist(), batch.segments.tolist(),
                                   strict=True):
        for a, b in itertools.pairwise(segments):
            if sum(mask[a:b]):
                out.append(ids[a:b])
    return out


@pytest.mark.parametrize(("data", "message"), [
    (["a=0.5", "b"], "every source a weight"), (["a=0", "b=1"], "above 0"), (["a=-1"], "above 0"),
    (["a=nan"], "above 0"), (["a", "a"], "twice"),
    ([], "names nothing")])
def test_sources_that_make_no_sense(data, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(data)


def test_a_path_that_exists_has_no_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.3").mkdir()
    assert parse_sources(["lr=0.3"]) == [("lr=0.3", None)] and parse_sources(["lr=0.3=0.5"]) == [("lr=0.3", 0.5)]


def test_loader_refuses_a_source_without_weight_or_samples():
    with pytest.raises(ValueError, match="weight 0 of b"):
        Loader([Source("a", [Sample([1, 2], [1, 1])], 1), Source("b", [Sample([1, 2], [1, 1])], 0)], 8, 1)
    with pytest.raises(ValueError, match="no samples to train on in b"):
        Loader([Source("a", [Sample([1, 2], [1, 1])], 1), Source("b", [], 1)], 8, 1)
