"""Schedules: functions from the number of steps done (int64 scalar tensor) to the learning rate (float64 scalar).

With t steps done and W = warmup × steps (rounded), all rise linearly over the first W steps, which take
peak (t + 1) / (W + 1): no step is without effect. Then they fall from `peak` at step W towards `final * peak` at step
`steps`, as functions of their progress

    s = (t - W) / (steps - W), within [0, 1]

and stay there.
"""
import math
from collections.abc import Callable
from typing import Literal

import torch

Schedule = Callable[[torch.Tensor], torch.Tensor]


def cosine(peak: float, steps: int, warmup: float = 0.0, final: float = 0.1) -> Schedule:
    """Half a cosine from `peak` down to `final * peak`.

    With the progress s as above:

        lr = peak (final + (1 - final) (1 + cos(pi s)) / 2)

    Args:
        peak: the highest learning rate.
        steps: the number of the step from which on it is `final * peak`.
        warmup: the fraction of `steps` that rise, in [0, 1]; by default none do.
        final: the last learning rate as a fraction of `peak`.

    Returns: the schedule.

    Raises: ValueError if `steps` is less than 1 or `warmup` no fraction.

    Reference: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.

    >>> lr = cosine(1.0, steps=10, warmup=0.2, final=0.0)
    >>> [round(float(lr(torch.tensor(t))), 3) for t in (0, 1, 2, 6, 10)]
    [0.333, 0.667, 1.0, 0.5, 0.0]
    """
    return _schedule("cosine", peak, steps, warmup, lambda s: final + (1 - final) * (1 + torch.cos(math.pi * s)) / 2)


def linear(peak: float, steps: int, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """A straight line from `peak` down to `final * peak`.

    With the progress s as above:

        lr = peak (1 - (1 - final) s)

    Args:
        peak: the highest learning rate.
        steps: the number of the step from which on it is `final * peak`.
        warmup: the fraction of `steps` that rise, in [0, 1]; by default none do.
        final: the last learning rate as a fraction of `peak`.

    Returns: the schedule.

    Raises: ValueError if `steps` is less than 1 or `warmup` no fraction.

    >>> lr = linear(1.0, steps=4)
    >>> [float(lr(torch.tensor(t))) for t in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _schedule("linear", peak, steps, warmup, lambda s: 1 - (1 - final) * s)


def constant(peak: float, steps: int = 1, warmup: float = 0.0) -> Schedule:
    """Always `peak`, after a warm-up if there is one.

    Args:
        peak: the learning rate.
        steps: of which `warmup` is a fraction; nothing else depends on it.
        warmup: the fraction of `steps` that rise, in [0, 1]; by default none do.

    Returns: the schedule.

    Raises: ValueError if `steps` is less than 1 or `warmup` no fraction.

    >>> float(constant(0.5)(torch.tensor(7)))
    0.5
    """
    return _schedule("constant", peak, steps, warmup, torch.ones_like)


def wsd(peak: float, steps: int, warmup: float = 0.0, decay: float = 0.1, final: float = 0.0,
        shape: Literal["1-sqrt", "linear"] = "1-sqrt") -> Schedule:
    """Warm-up, stable, decay: `peak` until the last steps, which go down to `final * peak`.

    With the progress r in [0, 1] through the last D = decay × steps (rounded) steps, r = 0 before:

        lr = peak (1 - (1 - final) sqrt(r)), or with "linear" peak (1 - (1 - final) r)

    A run can go on from any step of its stable part with a larger `steps`.

    Args:
        peak: the highest learning rate.
        steps: the number of the step from which on it is `final * peak`.
        warmup: the fraction of `steps` that rise, in [0, 1]; by default none do.
        decay: the fraction of `steps`, at their end, that fall, in [0, 1].
        final: the last learning rate as a fraction of `peak`.
        shape: the fall, "1-sqrt" or "linear".

    Returns: the schedule.

    Raises: ValueError if `steps` is less than 1, `warmup` or `decay` no fraction, their sum above 1, or `shape`
    unknown.

    Reference: Hu et al., MiniCPM, 2024; the root: Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations, 2024, section 3.

    >>> lr = wsd(1.0, steps=10, warmup=0.1, decay=0.4)
    >>> [round(float(lr(torch.tensor(t))), 3) for t in (0, 1, 6, 7, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if shape not in ("1-sqrt", "linear") or not 0 <= decay <= 1 or 1 < warmup + decay <= 1 + decay:
        raise ValueError('wsd: decay must be a fraction of the steps that leaves room for warmup, and shape "1-sqrt" '
                         f'or "linear"; got warmup={warmup}, decay={decay}, shape={shape!r}')
    rise, last = round(warmup * steps), round(decay * steps)

    def fall(s: torch.Tensor) -> torch.Tensor:
        done = s * max(steps - rise, 1) - (steps - rise - last)  # steps of the decay, from those after the warm-up
        r = (done / max(last, 1)).clamp(0, 1) if last else (s >= 1).double()
        return 1 - (1 - final) * (r.sqrt() if shape == "1-sqrt" else r)
    return _schedule("wsd", peak, steps, warmup, fall)


def _schedule(name: str, peak: float, steps: int, warmup: float,
              fall: Callable[[torch.Tensor], torch.Tensor]) -> Schedule:
    if steps < 1 or not 0 <= warmup <= 1:
        raise ValueError(f"{name}: steps must be at least 1 and warmup a fraction of them in [0, 1]; got "
                         f"steps={steps}, warmup={warmup}")
    rise = round(warmup * steps)

    def schedule(step: torch.Tensor) -> torch.Tensor:
        t = step.double()
        s = ((t - rise) / max(steps - rise, 1)).clamp(0, 1)
        return peak * ((t + 1) / (rise + 1)).clamp(max=1) * fall(s)
    return schedule
