"""Steps that should not be taken: `guard` finds them on the device, without waiting; the optimizer leaves them out."""
from collections.abc import Mapping
from typing import Any

import torch

from xtf import device, tree

ENOUGH = 32                                              # values of a window from which its spread is believed
LEAST_SIGMA = 1e-3  # of the mean: a curve that has come to rest is not made of spikes


class Guard:
    """Says for each step whether to take it: see `guard`."""

    def __init__(self, window: int, sigma: float, patience: int):
        if window < ENOUGH or sigma <= 0 or patience < 1:
            raise ValueError(f"guard: window must be at least {ENOUGH}, sigma positive and patience at least 1; "
                             f"got window={window}, sigma={sigma}, patience={patience}")
        self.window, self.sigma, self.patience = window, sigma, patience

    def init(self, where: torch.device | str | None = None) -> tree.Tree:
        """The state before the first step, on the device `where` (without it on the accelerator, else the CPU)."""
        where = device.device() if where is None else where
        number = lambda: torch.zeros((), dtype=torch.int64, device=where)
        return {"taken": number(), "skipped": number(), "in_a_row": number(),
                "window": torch.zeros(2, self.window, dtype=torch.float64, device=where),
                "refused": torch.zeros(2, dtype=torch.float64, device=where)}

    @torch.no_grad()
    def check(self, state: tree.Tree, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, tree.Tree]:
        """(ok, new state) for a step's global loss and gradient norm, scalar tensors, the same on every rank."""
        now = torch.stack([loss.double(), norm.double()])
        taken, window = state["taken"], state["window"]
        place = torch.arange(self.window, device=window.device)
        seen = place < taken
        n = taken.clamp(1, self.window)
        mean = (window * seen).sum(1) / n
        spread = (((window - mean[:, None]) * seen).square().sum(1) / n).sqrt()
        limit = mean + self.sigma * torch.maximum(spread, LEAST_SIGMA * mean.abs())
        ok = now.isfinite().all() & ((now <= limit) | (taken < ENOUGH)).all()
        return ok, {"taken": taken + ok, "skipped": state["skipped"] + ~ok, "in_a_row": (state["in_a_row"] + 1) * ~ok,
                    "window": torch.where(ok & (place == taken % self.window), now[:, None], window),
                    "refused": torch.where(ok, state["refused"], now)}

    def metrics(self, state: tree.Tree) -> dict[str, torch.Tensor]:
        """What to log of a state: `skipped` in all, and `in_a_row` up to this step."""
        return {"skipped": state["skipped"], "in_a_row": state["in_a_row"]}

    def advice(self, seen: Mapping[str, Any]) -> str | None:
        """Why to stop, once `patience` steps in a row were not taken, else None.

        `seen` is a state, or the metrics that the host has read of one: reading a tensor here waits for its step.
        """
        if (row := int(seen["in_a_row"])) < self.patience:
            return None
        last = ""
        if "refused" in seen:
            last = " The last of them had loss {:.6g} and gradient norm {:.6g}.".format(*seen["refused"].tolist())
        return (f"{row} steps in a row were skipped: their loss or gradient norm was not finite, or more than "
                f"{self.sigma:g} standard deviations above those of the last {self.window} steps taken.{last} The "
                "parameters are those before them. Go on from an earlier checkpoint (--resume OUT/checkpoints/N with "
                "another --out) with a lower learning rate or a longer warm-up; look at the batches of these steps; "
                "if the losses are NaN from the first step on, look for an overflow in the model.")


def guard(window: int = 128, sigma: float = 6.0, patience: int = 10) -> Guard:
    """Leave out steps whose loss or gradient norm is not finite, or a spike above those before.

    With the mean and the standard deviation of x, the loss or the norm, over the steps last taken, a step is `ok` if
    for both, once there are 32 such steps,

        x <= mean + sigma max(deviation, |mean| / 1000)

    Give `ok` to the optimizer's `update`; log `metrics`, and stop when `advice` says so.

    Args:
        window: how many of the steps last taken the mean and the deviation are of, at least 32.
        sigma: how many standard deviations above the mean are a spike.
        patience: after how many steps in a row that were left out `advice` says to stop.

    Returns: a `Guard`. Its state is a tree of tensors for `TrainState.extra`: `taken`, `skipped`, `in_a_row` (int64
    scalars), `window` (float64 [2, window], losses and norms, a ring) and `refused` (float64 [2], the last step that
    was left out).

    Raises: ValueError for a window below 32, or a sigma or patience that is not positive.

    >>> watch = guard(patience=1)
    >>> ok, state = watch.check(watch.init("cpu"), loss=torch.tensor(2.0), norm=torch.tensor(float("nan")))
    >>> ok.item(), watch.metrics(state)["skipped"].item(), watch.advice(state)[:40]
    (False, 1, '1 steps in a row were skipped: their los')
    """
    return Guard(window, sigma, patience)
