"""`guard` beside a loop over lists, and `ema` beside its formula."""
import math
import statistics
from dataclasses import replace

import pytest
import torch

from xtf.ops import LOCAL
from xtf.optim import averaged, ema, guard


def reference(losses, norms, window, sigma):
    """Which steps are taken, by the rule in plain Python."""
    kept, out = [], []
    for pair in zip(losses, norms, strict=True):
        ok = all(map(math.isfinite, pair))
        recent = kept[-window:]
        if ok and len(kept) >= 32:
            for value, past in zip(pair, zip(*recent, strict=True), strict=True):
                mean = statistics.fmean(past)
                ok &= value <= mean + sigma * max(statistics.pstdev(past), 1e-3 * abs(mean))
        out.append(ok)
        kept += [pair] if ok else []
    return out


def series(seed, steps=300):
    """A falling loss with spikes, NaN and inf here and there, early ones too."""
    g = torch.Generator().manual_seed(seed)
    loss = 3 + torch.exp(-torch.arange(steps) / 50) + 0.05 * torch.randn(steps, generator=g)
    norm = 1 + 0.1 * torch.rand(steps, generator=g)
    kind = torch.rand(steps, generator=g)
    loss = torch.where(kind < 0.02, loss * 3, loss)
    norm = torch.where((kind > 0.1) & (kind < 0.13), norm * 20, norm)
    loss = torch.where((kind > 0.2) & (kind < 0.21), torch.nan, loss)
    norm = torch.where((kind > 0.3) & (kind < 0.32), torch.inf, norm)
    return loss, norm


@pytest.mark.parametrize("window, sigma", [(32, 6.0), (128, 6.0), (40, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_guard_is_the_loop(window, sigma, seed):
    loss, norm = series(seed)
    want = reference(loss.tolist(), norm.tolist(), window, sigma)
    watch = guard(window, sigma)
    state, row = watch.init("cpu"), 0
    for i, ok in enumerate(want):
        if i == 150:                                                          # through what a checkpoint keeps
            state = {k: torch.tensor(x.tolist(), dtype=x.dtype) for k, x in state.items()}
        got, state = watch.check(state, loss[i], norm[i])
        row = 0 if ok else row + 1
        assert got.item() == ok and got.dtype is torch.bool
        skipped, taken = (want[:i + 1].count(kind) for kind in (False, True))
        assert state["in_a_row"] == row and state["skipped"] == skipped and state["taken"] == taken
    assert 5 < want.count(False) < 100


def test_what_is_no_spike():
    """A curve at rest, a fall however steep, and anything finite before there are 32 values."""
    watch = guard(window=32)
    state = watch.init("cpu")
    for loss in [1.0, 1e6, 1e-3] + [2.0] * 60 + [2.01, 1.0, 1e-6]:
        ok, state = watch.check(state, torch.tensor(loss), torch.tensor(1.0))
        assert ok, loss
    assert not watch.check(state, torch.tensor(100.0), torch.tensor(1.0))[0]
    assert not watch.check(state, torch.tensor(1.0), torch.tensor(1.02))[0]


def test_advice_after_patience():
    watch = guard(patience=3)
    state = watch.init("cpu")
    for i in range(5):
        assert (watch.advice(state) is None) == (i < 3)
        _, state = watch.check(state, torch.tensor(float("nan")), torch.tensor(7.0))
    text = watch.advice(state)
    assert text is not None and text.startswith("5 steps in a row were skipped")
    assert "loss nan and gradient norm 7." in text and "learning rate" in text
    logged = {k: float(x) for k, x in watch.metrics(state).items()}
    assert logged == {"skipped": 5, "in_a_row": 5} and "5 steps in a row" in (watch.advice(logged) or "")
    _, state = watch.check(state, torch.tensor(1.0), torch.tensor(1.0))
    assert watch.advice(state) is None and state["skipped"] == 5
    for wrong in ({"window": 31}, {"sigma": 0}, {"patience": 0}):
        with pytest.raises(ValueError, match="guard: window must be at least 32"):
            guard(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_ema_by_formula(dtype, donate):
    decay, ops = 0.9, replace(LOCAL, donate=donate)
    draw = lambda i: torch.randn(5, 3, generator=torch.Generator().manual_seed(i),
                                 dtype=torch.float64).to(dtype).requires_grad_()
    frozen = torch.ones(2)
    tx, params = ema(decay), {"w": draw(0), "frozen": frozen}
    average, want = tx.init(params), draw(0).double().detach()
    assert average["frozen"] is None and average["w"].data_ptr() != params["w"].data_ptr()
    assert not average["w"].requires_grad
    for i in range(1, 30):
        params = {"w": draw(i), "frozen": frozen}
        ok = i % 3 != 0
        want = decay * want + (1 - decay) * params["w"].double().detach() if ok else want
        old, where = average["w"].clone(), average["w"].data_ptr()
        average = tx.update(average, params, ops, ok=torch.tensor(ok))
        assert ok or torch.equal(average["w"], old)
        assert (average["w"].data_ptr() == where) == donate
    wide = torch.promote_types(dtype, torch.float32)
    assert average["w"].dtype is wide
    torch.testing.assert_close(average["w"].double(), want, rtol=0, atol=30 * 4 * torch.finfo(wide).eps)
    used = averaged(average, params)
    assert used["w"].dtype is dtype and used["w"].requires_grad and used["frozen"] is frozen
    assert torch.equal(used["w"], average["w"].to(dtype))
    with pytest.raises(ValueError, match=r"ema: decay must be in \[0, 1\)"):
        ema(1.0)
