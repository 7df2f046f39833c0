"""Schedules against torch's and the formula."""
import math

import pytest
import torch

from xtf.optim import schedules


def rates(schedule, steps):
    return [float(schedule(torch.tensor(t))) for t in range(steps)]


def torchs(make, steps, lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = make(optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_cosine_and_linear_are_torchs():
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
    ours = rates(schedules.cosine(3e-4, steps=20, final=0.1), 21)
    assert ours == pytest.approx(torchs(lambda o: CosineAnnealingLR(o, 20, eta_min=3e-5), 21, 3e-4), rel=1e-12)
    ours = rates(schedules.linear(3e-4, steps=20, final=0.25), 30)
    assert ours == pytest.approx(torchs(lambda o: LinearLR(o, 1.0, 0.25, 20), 30, 3e-4), rel=1e-12)


@pytest.mark.parametrize("steps, warmup", [(1, 0.0), (1, 1.0), (10, 0.0), (10, 0.3), (7, 0.5), (10, 1.0)])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_warm_up_and_fall_by_formula(steps, warmup, final):
    peak, rise = 2.0, round(warmup * steps)
    s = lambda t: min(1.0, max(0.0, (t - rise) / max(steps - rise, 1)))
    up = lambda t: min(1.0, (t + 1) / (rise + 1))
    falls = {schedules.cosine(peak, steps, warmup, final): lambda t: final + (1 - final) * 0.5
             * (1 + math.cos(math.pi * s(t))),
             schedules.linear(peak, steps, warmup, final): lambda t: 1 - (1 - final) * s(t),
             schedules.constant(peak, steps, warmup): lambda t: 1.0}
    for schedule, fall in falls.items():
        assert rates(schedule, steps + 3) == pytest.approx([peak * up(t) * fall(t) for t in range(steps + 3)],
                                                           rel=1e-13, abs=1e-15)
        assert schedule(torch.tensor(0)).shape == () and schedule(torch.tensor(0)) > 0
        assert float(schedule(torch.tensor(rise))) == peak


@pytest.mark.parametrize("shape", ["1-sqrt", "linear"])
@pytest.mark.parametrize("steps, warmup, decay",
                         [(20, 0.1, 0.2), (20, 0.0, 1.0), (10, 0.5, 0.5), (1, 0.0, 0.1), (10, 0.3, 0.0)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_wsd_by_formula(shape, steps, warmup, decay, final):
    peak, rise, last = 3.0, round(warmup * steps), round(decay * steps)

    def rate(t):
        if t < rise:
            return peak * (t + 1) / (rise + 1)
        if t < steps - last:
            return peak
        r = min(1.0, (t - (steps - last)) / last) if last else 1.0
        return peak * (1 - (1 - final) * (math.sqrt(r) if shape == "1-sqrt" else r))
    ours = rates(schedules.wsd(peak, steps, warmup, decay, final, shape), steps + 3)
    # a root near 0 magnifies rounding
    assert ours == pytest.approx([rate(t) for t in range(steps + 3)], rel=1e-12, abs=1e-7 * peak)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"decay": -0.1}, {"warmup": 0.6, "decay": 0.5}, {"shape": "cosine"}])
def test_wsd_names_bad_arguments(wrong):
    with pytest.raises(ValueError, match="wsd: decay must be a fraction"):
        schedules.wsd(1.0, 10, **wrong)


@pytest.mark.parametrize("make", [schedules.cosine, schedules.linear, schedules.constant, schedules.wsd])
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 5, "warmup": 1.5}, {"steps": 5, "warmup": -0.1}])
def test_bad_arguments_are_named(make, wrong):
    with pytest.raises(ValueError, match=f"{make.__name__}: steps must be at least 1 and warmup a fraction"):
        make(1.0, **wrong)
