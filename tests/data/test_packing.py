"""Packing loses nothing, keeps its budgets, and is as tight as best-fit-decreasing done the slow way."""
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xtf
from tests import outsider
from xtf.data import Sample, best_fit, cut, efficiency, pack, stack


def slow_best_fit(lengths, seq_len, max_documents):
    """Each pack's tokens, by looking at all packs for each sample."""
    packs = []
    for n in sorted(lengths, reverse=True):
        fits = [p for p in packs if sum(p) + n <= seq_len and len(p) < max_documents - 1]
        if not fits:
            packs.append(fits := [])
            fits.append(n)
        else:
            max(fits, key=sum).append(n)
    return packs


PROBLEMS = st.integers(2, 40).flatmap(lambda t: st.tuples(st.lists(st.integers(1, t), max_size=60), st.just(t),
                                                          st.sampled_from([2, 3, 5, 9, 99])))


@settings(max_examples=200, deadline=None)
@given(PROBLEMS)
def test_best_fit(problem):
    lengths, seq_len, max_documents = problem
    packs = best_fit(lengths, seq_len, max_documents)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(p and len(p) < max_documents and sum(lengths[i] for i in p) <= seq_len for p in packs)
    if max_documents == 99:  # where packs never run out of documents, ties do not matter to how full they get
        assert sorted(sum(lengths[i] for i in p)
                      for p in packs) == sorted(map(sum, slow_best_fit(lengths, seq_len, max_documents)))
    for a, b in itertools.combinations(packs, 2):
        room_for_both = len(a) + len(b) < max_documents
        assert not room_for_both or sum(lengths[i] for i in a + b) > seq_len  # two packs that fit into one never remain


@settings(max_examples=100, deadline=None)
@given(PROBLEMS, st.randoms(use_true_random=False))
def test_every_document_can_be_read_back_from_its_pack(problem, random):
    lengths, seq_len, max_documents = problem
    draw = lambda n, values: torch.tensor(random.choices(values, k=n))
    samples = [Sample(draw(n, range(1, 99)), draw(n, [False, True])) for n in lengths]
    packs = best_fit(lengths, seq_len, max_documents)
    for indices in packs:
        batch = pack([samples[i] for i in indices], seq_len, max_documents)
        fields = batch.input_ids, batch.labels, batch.loss_mask, batch.positions, batch.segments
        assert [x.dtype for x in fields] == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]
        ids, labels, mask, positions, segments = (x[0] for x in fields)
        assert len(segments) == max_documents + 1 and segments[0] == 0 and segments[-1] == seq_len
        assert (segments.diff() >= 0).all()
        bounds = segments.unique().tolist()
        documents = list(itertools.pairwise(bounds))
        assert len(documents) == len(indices) + (sum(lengths[i] for i in indices) < seq_len)
        for (start, end), i in zip(documents, indices, strict=False):
            assert torch.equal(ids[start:end], samples[i].ids)
            assert torch.equal(labels[start:end - 1], samples[i].ids[1:])
            assert torch.equal(mask[start:end - 1], samples[i].mask[1:].float())
            assert mask[end - 1] == 0
        assert all(positions[start:end].tolist() == list(range(end - start)) for start, end in documents)
        assert mask[documents[len(indices) - 1][1]:].sum() == 0


def test_pack_refuses_what_does_not_fit():
    one = Sample([1, 2, 3], [0, 1, 1])
    for samples, message in [([one, one], "do not fit"), ([Sample([1], [1])] * 4, "max_documents=3"),
                             ([one, Sample([], [])], "sample 1"), ([Sample([1, 2], [1])], "shape")]:
        with pytest.raises(ValueError, match=message):
            pack(samples, 5, 3)
    for lengths, documents, message in [([6], 4, "sample 0 has 6 tokens"), ([0], 4, "outside"),
                                        ([1], 1, "max_documents=1")]:
        with pytest.raises(ValueError, match=message):
            best_fit(lengths, 5, documents)


def test_a_pack_of_nothing_is_padding():
    batch = stack([pack([], 6, 2), pack([Sample([1, 2, 3, 4, 5, 6], [1] * 6)], 6, 2)])
    assert batch.segments.tolist() == [[0, 6, 6], [0, 6, 6]] and batch.loss_mask.sum(1).tolist() == [0, 5]
    assert cut(batch, None) is batch


def test_weights_that_sum_to_less_than_one_are_divided_by_their_sum():
    """The loss is their weighted mean, whatever they sum to; only of no weight at all is it 0."""
    ids, mask = [5, 6, 7, 8, 9], [0, 0.03, 0.01, 0.0, 0.02]
    params = xtf.init(outsider.specs(torch.float64), seed=0)
    state = xtf.TrainState.create(params, outsider.opt.init(params))
    nll = outsider.nll(params, pack([Sample(ids, mask)], 6, 2), xtf.LOCAL)[0, :4]
    want = (nll * torch.tensor(mask[1:])).sum() / sum(mask)
    for scale in (1.0, 1e-6, 1e3):
        batch = pack([Sample(ids, np.array(mask) * scale)], 6, 2)
        torch.testing.assert_close(outsider.step(state, batch)[1]["loss"], want, rtol=1e-6, atol=0, check_dtype=False)
    assert outsider.step(state, pack([Sample(ids, [0] * 5)], 6, 2))[1]["loss"] == 0


def test_large_and_tight():
    """100,000 conversations of log-normal length (median 400 tokens): under 2 s of processor time, over 99% of
    positions used."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.9, 100_000), 2, 4096).astype(int).tolist()
    start = time.process_time()
    packs = best_fit(lengths, 4096, 256)
    assert time.process_time() - start < 2
    assert efficiency(packs, lengths, 4096) > 0.99
