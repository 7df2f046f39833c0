"""Documents in memory-mapped files, against plain lists: what is split, cut off, left out, held out and counted."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtf import tree
from xtf.data import Encoder, Loader, Sample, eval_batches, split_off, tokenized

DOCUMENTS = st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.integers(0, 59)), min_size=1, max_size=150)


def write(tmp, documents, name="data.jsonl"):
    """Documents (length, splittable, first position with loss) as pre-tokenised lines; ids tell the document and
    position."""
    ids = np.cumsum([0] + [n for n, _, _ in documents]).tolist()
    rows = []
    for (n, splittable, first), at in zip(documents, ids, strict=False):
        tokens = list(range(at, at + n))
        labels = {} if splittable else {"labels": [-100] * min(first, n) + tokens[first:]}
        rows.append(json.dumps({"input_ids": tokens, **labels}))
    (tmp / name).write_text("\n".join(rows))
    return str(tmp / name)


def expected(documents, seq_len):
    """(ids, mask) of the samples, by slicing lists."""
    out, at = [], 0
    for n, splittable, first in documents:
        ids = list(range(at, at + n))
        mask = [i > 0 and (splittable or i >= first) for i in range(n)]
        if splittable:
            out += [(ids[a:a + seq_len], [False, *mask[a + 1:a + seq_len]]) for a in range(0, n - 1, seq_len - 1)]
        else:
            out.append((ids[:seq_len], mask[:seq_len]))
        at += n
    return [(ids, mask) for ids, mask in out if any(mask)]


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 70))
def test_samples_are_those_of_plain_lists(tmp_path_factory, documents, seq_len):
    tmp = tmp_path_factory.mktemp("data")
    whole = tokenized(write(tmp, documents), Encoder(None), folder=tmp)
    data = whole.at(seq_len)
    wanted = expected(documents, seq_len)
    assert [(s.ids.tolist(), s.mask.tolist()) for s in (data[i] for i in range(len(data)))] == wanted
    assert data.lengths.tolist() == [len(ids) for ids, _ in wanted] and data.tokens == sum(data.lengths)
    assert [len(whole[i].ids) for i in range(len(whole))] == [len(ids) for ids, _ in expected(documents, 100)]
    stats = data.stats
    predicted = [ids[i] for ids, mask in wanted for i in range(len(ids)) if mask[i]]
    assert len(set(predicted)) == len(predicted) == stats.loss_tokens                         # each token at most once
    ends = np.cumsum([n for n, _, _ in documents])
    once = {t for (n, splittable, _), end in zip(documents, ends, strict=True) if splittable
            for t in range(end - n + 1, end)}
    assert once <= set(predicted)  # of texts, each but the first
    assert stats.samples == len(wanted) and stats.tokens == len({t for ids, _ in wanted for t in ids})
    chats = [(n, first) for n, splittable, first in documents if not splittable]
    kept_chats = [(n, first) for n, first in chats if max(first, 1) < min(n, seq_len)]
    assert stats.truncated == sum(n > seq_len for n, _ in kept_chats)
    assert stats.tokens_dropped == sum(max(0, n - seq_len) for n, _ in kept_chats)
    words = sum(n == 1 for n, splittable, _ in documents if splittable)
    assert stats.without_loss == len(chats) - len(kept_chats) + words
    assert stats.lines == len(documents)


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS.filter(lambda d: len(expected(d, 20)) > 3), st.integers(0, 3), st.integers(1, 9))
def test_loader_and_evaluation_of_a_dataset_are_those_of_its_samples(tmp_path_factory, documents, seed, packs):
    tmp = tmp_path_factory.mktemp("data")
    data = tokenized(write(tmp, documents), Encoder(None), folder=tmp)
    listed = [Sample(torch.tensor(ids), torch.tensor(mask)) for ids, mask in expected(documents, 20)]
    a, b = Loader(data, 20, packs, seed), Loader(listed, 20, packs, seed)
    for i in (0, 1, 5, 2):
        for x, y in zip(tree.leaves(a.step(i)), tree.leaves(b.step(i)), strict=True):
            assert torch.equal(x, y)
        assert a.documents(i) == b.documents(i)
    for x, y in zip(eval_batches(data, 20, packs), eval_batches(listed, 20, packs), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(tree.leaves(x), tree.leaves(y), strict=True))
    loss = torch.cat([b.labels[b.loss_mask > 0] for b in eval_batches(data, 20, packs, window=7)]).tolist()
    assert sorted(loss) == sorted(t for ids, mask in expected(documents, 20) for t, m in zip(ids, mask, strict=True)
                                  if m)


def test_a_split_document_is_predicted_once_in_an_epoch(tmp_path):
    """Through the loader's batches: one document of 10,007 tokens and two short ones, at seq_len 64."""
    data = tokenized(write(tmp_path, [(5, True, 0), (10_007, True, 0), (3, True, 0)]), Encoder(None), folder=tmp_path)
    loader, seen, i = Loader(data, 64, 1), [], 0
    while loader.cursor(i)["epoch"] == 0:
        batch = loader.step(i)
        seen += batch.labels[batch.loss_mask > 0].tolist()
        context = batch.input_ids[batch.loss_mask > 0]
        assert (batch.labels[batch.loss_mask > 0] == context + 1).all()  # what is predicted follows what is read
        i += 1
    assert sorted(seen) == [t for t in range(5 + 10_007 + 3) if t not in (0, 5, 10_012)]


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS.filter(lambda d: len(expected(d, 30)) > 5), st.floats(0.05, 0.8), st.integers(0, 3))
def test_a_split_loses_nothing_and_keeps_documents_together(tmp_path_factory, documents, fraction, seed):
    tmp = tmp_path_factory.mktemp("data")
    data = tokenized(write(tmp, documents), Encoder(None), folder=tmp).at(30)
    if round(fraction * data.num_records) >= data.num_records:
        return
    rest, held = split_off(data, fraction, seed)
    sides = [[(s.ids.tolist(), s.mask.tolist()) for s in (side[i] for i in range(len(side)))] for side in (rest, held)]
    assert sorted(sides[0] + sides[1]) == sorted(expected(documents, 30))
    records = [{side[i].source for i in range(len(side))} for side in (rest, held)]
    assert not records[0] & records[1] and len(records[1]) <= max(1, round(fraction * data.num_records))
    again = split_off(data, fraction, seed)
    assert all([again[k][i].ids.tolist() for i in range(len(again[k]))] == [ids for ids, _ in sides[k]] for k in (0, 1))
    assert rest.fingerprint != held.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match="already"):
        split_off(rest, 0.5)


def test_what_no_view_can_do(tmp_path):
    data = tokenized(write(tmp_path, [(5, True, 0)]), Encoder(None), folder=tmp_path)
    assert data.at(3).at(100)[0].ids.tolist() == [0, 1, 2, 3, 4] and data.at(3).at(3).seq_len == 3
    for call in (lambda: data.at(1), lambda: split_off(data, 1.0), lambda: split_off(data, 0.5)):
        with pytest.raises(ValueError, match=r"at least 2|not in|leaves none"):
            call()
    with pytest.raises(IndexError):
        data[1]
