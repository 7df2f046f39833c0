"""Moments in bf16 and in 8 bits: errors within what their docstring says, no bias, and training that goes as well."""
import math

import pytest
import torch

from xtf import tree
from xtf.optim import adamw, apply_updates, moments
from xtf.optim.moments import BLOCK, decode, encode

CODES = [torch.int8, torch.uint8, torch.bfloat16]


def values(dtype, rows=16, n=600):
    """Magnitudes over 8 decades within a block, some zeros, one block of zeros; not negative for v."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, n, generator=g) * 10 ** (8 * torch.rand(rows, n, generator=g) - 8)
    x[torch.rand(rows, n, generator=g) < 0.05] = 0
    x[3, :BLOCK] = 0
    return x.abs() if dtype is torch.uint8 else x


def node(dtype, rows, n):
    codes = torch.zeros(rows, n, dtype=dtype)
    return codes if dtype is torch.bfloat16 else {"codes": codes, "scales": torch.zeros(rows, -(-n // BLOCK))}


def there_and_back(x, dtype, step, u=None):
    p = torch.empty_like(x)
    kept = node(dtype, *x.shape)
    by_row, by_column = moments.dither(p, torch.tensor(step))
    encode(kept, x, (by_row[:, None] + by_column) % 1 if u is None else torch.full_like(x, u), 0, p, None)
    return decode(kept, 0, x.shape[1])


def largest_error(x, dtype):
    """The step at |x|: for bf16 2^-7 of it; else (|x| + c s) / 8, s the largest of the block. Float32's own rounding of
    x / s + c is below 2^-22 of these."""
    if dtype is torch.bfloat16:
        return x.abs() * 2**-7
    c = {torch.int8: 2**-15, torch.uint8: 2**-31}[dtype]
    s = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(BLOCK, 1)], 1)
    return (x.abs() + c * s) / 8 * (1 + 2**-20)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_error_is_within_a_step(dtype):
    x = values(dtype)
    for step in range(1, 20):
        assert ((there_and_back(x, dtype, step) - x).abs() <= largest_error(x, dtype)).all()
    # and the bound is no looser than it must be: somewhere it is nearly met
    assert ((there_and_back(x, dtype, 1) - x).abs() > 0.8 * largest_error(x, dtype)).any()


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_rounding_has_no_bias(dtype):
    """The mean over T steps: u's discrepancy is of the order of log T / T, so a few steps over T; v's zero counts as
    its smallest step."""
    x, T = values(dtype), 256
    mean = sum(there_and_back(x, dtype, t).double() for t in range(1, T + 1)) / T
    floor = largest_error(x, dtype) - x / 8 if dtype is torch.uint8 else 0
    error = (mean - x).abs()
    assert (error <= 8 / T * largest_error(x, dtype) + floor).all()
    always_half = sum(there_and_back(x, dtype, t, u=0.5).double() for t in range(1, 5)) / 4
    assert ((always_half - x).abs() > 0.3 * largest_error(x, dtype)).any()  # rounding to nearest is told apart


def test_dither_is_uniform_and_differs_by_element_and_step():
    p = torch.empty(64, 48)
    u = torch.stack([(r[:, None] + c) % 1 for r, c in (moments.dither(p, torch.tensor(t)) for t in range(64))]).double()
    for sample in (u[:, 5, 7], u[3].flatten(), u[3, :, 0], u[3, 0]):
        n = len(sample)
        gap = (sample.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
        assert gap < 4 / n ** 0.75                                           # random numbers would have about n^-0.5
    assert len(u[3].flatten().unique()) > 0.99 * u[3].numel()


def averages_reach_their_value(kind, b2):
    """A gradient that is halved, but for the column that holds each block's scale: averages end within three steps of
    their values."""
    p = {"w": torch.zeros(16, 256, requires_grad=True)}
    g = torch.rand(16, 256, generator=torch.Generator().manual_seed(0)) + 0.5
    g[:, 128:] *= 1e-2
    g[:, 0] = 2.0
    tx = adamw(0.0, b2=b2, moments=kind)
    state = tx.init(p)
    for _ in range(2):
        for _ in range(int(6 / (1 - b2))):
            _, state = tx.update({"w": g.clone()}, state, p)
        g[:, 1:] /= 2
    g[:, 1:] *= 2
    for name, want in (("m", g), ("v", g * g)):
        kept = state[name]["w"]
        got = decode(kept, 0, 256) if kind == "int8" else kept.float()
        step = {"int8": want / 8 + want.amax(1, keepdim=True) * 2**-18, "bf16": want * 2**-7}[kind]
        # 3 times the first half's rest in v, as v was 4 times that
        assert ((got - want).abs() <= 3 * step + 3 * math.exp(-6) * want).all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("b2", [0.95, 0.99])
def test_averages_reach_their_value(kind, b2):
    averages_reach_their_value(kind, b2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_slow_averages_reach_their_value(kind):
    averages_reach_their_value(kind, 0.999)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_rounding_to_nearest_is_caught(kind, monkeypatch):
    """v moves by a hundredth a step: without a dither it stays where it is."""
    dither = moments.dither
    monkeypatch.setattr(moments, "dither", lambda p, step: tuple(torch.full_like(x, 0.25) for x in dither(p, step)))
    with pytest.raises(AssertionError):
        averages_reach_their_value(kind, 0.99)


def test_small_and_flat_leaves_keep_float32_and_bytes_are_as_said():
    params = {"w": torch.zeros(64, 512, requires_grad=True), "small": torch.zeros(8, 8, requires_grad=True),
              "flat": torch.zeros(8192, requires_grad=True), "frozen": torch.zeros(64, 512)}
    for kind in ("bf16", "int8"):
        state = adamw(1e-3, moments=kind).init(params)
        assert state["m"]["small"].dtype is state["v"]["flat"].dtype is torch.float32 and state["m"]["frozen"] is None
    size = lambda x: sum(t.numel() * t.element_size() for t in tree.leaves(x) if t is not None)
    assert size((state["m"]["w"], state["v"]["w"])) == 64 * 512 * 2 + 2 * 64 * 2 * 4
    assert size(adamw(1e-3, moments="bf16").init(params)["m"]["w"]) == 64 * 512 * 2
    with pytest.raises(ValueError, match='moments must be "fp32", "bf16" or "int8", got \'fp8\''):
        adamw(1e-3, moments="fp8")


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_two_steps_are_within_the_bound(kind):
    """The first step's moments are those of float32. In the second m's error is b1 e_m, v's relative error is b2 e_v /
    v': so the update's is (b1 e_m + |m'| b2 e_v / (2 v')) / sqrt(v'), to first order in e_v / v' <= 1/8, which half as
    much again covers."""
    b1, b2, lr = 0.9, 0.95, 1.0
    params = {"w": torch.zeros(16, 512, requires_grad=True)}
    first, second = (torch.randn(16, 512, generator=torch.Generator().manual_seed(i)) for i in range(2))
    updates = {}
    for moments_ in ("fp32", kind):
        tx = adamw(lr, b1, b2, weight_decay=0.0, moments=moments_)
        u1, state = tx.update({"w": first.clone()}, tx.init(params), params)
        u2, _ = tx.update({"w": second.clone()}, state, params)
        updates[moments_] = u1["w"], u2["w"]
    assert torch.equal(updates["fp32"][0], updates[kind][0])
    m1, v1 = (1 - b1) * first, (1 - b2) * first**2
    m, v = b1 * m1 + (1 - b1) * second, b2 * v1 + (1 - b2) * second**2
    e_m, e_v = (largest_error(x, t)
                for x, t in ((m1, torch.int8), (v1, torch.uint8))) if kind == "int8" else (m1.abs() / 128, v1 / 128)
    bound = lr / (1 - b1**2) * (1 - b2**2) ** 0.5 * (b1 * e_m + m.abs() * b2 * e_v / (2 * v)) / v.sqrt()
    error = (updates["fp32"][1] - updates[kind][1]).abs()
    assert (error <= 1.5 * bound + 1e-5).all() and (error > 0.2 * bound).any()


def test_tiny_gradients_beside_large_ones_take_bounded_steps():
    """Where the last bit of m is left and v is not, m / sqrt(v) must not explode."""
    params = {"w": torch.zeros(16, 256, requires_grad=True)}
    tx = adamw(1.0, weight_decay=0.0, moments="int8")
    state = tx.init(params)
    scale = 10.0 ** -torch.arange(256).remainder(12)
    for t in range(60):
        g = torch.randn(16, 256, generator=torch.Generator().manual_seed(t)) * scale
        updates, state = tx.update({"w": g}, state, params)
        assert updates["w"].abs().max() < 10  # float32's own are below (1 - b1) / sqrt(1 - b2) = 0.45 to about 3


def test_a_nan_is_not_lost():
    params = {"w": torch.zeros(16, 256, requires_grad=True)}
    for kind in ("bf16", "int8"):
        tx = adamw(1.0, moments=kind)
        _, state = tx.update({"w": torch.full((16, 256), float("nan"))}, tx.init(params), params)
        updates, _ = tx.update({"w": torch.ones(16, 256)}, state, params)
        assert updates["w"].isnan().all()


def train(kind, seed, steps=200):
    """The last loss of a two-layer network that learns a function of 16 numbers."""
    g = torch.Generator().manual_seed(seed)
    x, teacher = torch.randn(256, 16, generator=g), torch.randn(16, 4, generator=g)
    y = torch.sin(x @ teacher)
    params = {"a": (torch.randn(64, 16, generator=g) / 4).requires_grad_(),
              "b": (torch.randn(64, 64, generator=g) / 8).requires_grad_(),
              "c": (torch.randn(4, 64, generator=g) / 8).requires_grad_()}
    tx = adamw(3e-3, moments=kind)
    state = tx.init(params)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = (torch.tanh(torch.tanh(x @ params["a"].T) @ params["b"].T) @ params["c"].T - y).square().mean()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        updates, state = tx.update(grads, state, params)
        params = apply_updates(params, updates)
    return loss.item()


def test_training_goes_as_well(monkeypatch):
    """Beside float32: the mean of the last losses over seeds is no worse than that plus three of its standard
    errors."""
    monkeypatch.setattr(moments, "LEAST", 32)
    losses = {kind: torch.tensor([train(kind, seed) for seed in range(4)]) for kind in ("fp32", "bf16", "int8")}
    start = train("fp32", 0, steps=1)
    for kind in ("bf16", "int8"):
        ratio = (losses[kind] / losses["fp32"]).log()
        assert ratio.mean() <= 3 * ratio.std() / len(ratio) ** 0.5 + 0.01, (kind, losses)
        assert losses[kind].max() < 0.1 * start
