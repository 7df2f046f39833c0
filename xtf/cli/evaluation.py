"""The held-out loss: its flags, when it is due, and what it is."""
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from xtf import LOCAL, TrainState, Transform, shard
from xtf.cli.ranks import on_device
from xtf.data import Loader, eval_batches
from xtf.grad import parts
from xtf.nn import ModelConfig
from xtf.parallel import settle


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """What is held out, and how often it is looked at."""
    eval_data: tuple[str, ...] = ()
    """Held-out files."""
    eval_fraction: float = 0.0
    """Without --eval-data: the share of --data to hold out."""
    eval_every: int = 0
    """Evaluate every so many steps too, not just before and after."""


class Evaluation:
    """The loss of a model on `held_out` data, whole, whatever the layout: a mean over the tokens that carry loss.

    `flags` is a `cli.Flags`; `loader` that of the training data, of whose steps' size the batches are; `transforms`
    are those of an evaluation, which must not donate its state. At a time a rank sees `packs`, as many as in training:
    there is room for no more.
    """

    def __init__(self, flags: Any, model: ModuleType, cfg: ModelConfig, loader: Loader, held_out: Any,
                 transforms: Sequence[Transform], mesh: DeviceMesh | None, packs: int):
        self.flags, self.loader, self.held_out, self.mesh = flags, loader, held_out, mesh

        def eval_step(state, batch, ops=LOCAL):
            with torch.no_grad():
                nlls = [model.loss(state.params, part, cfg, ops).double()
                        for part in parts(batch, len(batch.input_ids) // packs)]
                return ops.total(torch.stack([torch.stack(nlls).sum(), batch.loss_mask.sum().double()]))
        self.step = shard(eval_step, *transforms, mesh=mesh, specs=model.specs(cfg))

    def due(self, i: int) -> bool:
        """Whether it is wanted after step `i`: before the first, every --eval-every, and after the last."""
        return i in (0, self.flags.steps) or bool(self.flags.eval_every and i % self.flags.eval_every == 0)

    def loss(self, state: TrainState) -> float:
        """The held-out loss of a state, the same on every rank."""
        batches = eval_batches(self.held_out, self.loader.seq_len, self.loader.packs_per_step, self.mesh)
        nll, tokens = torch.stack([self.step(state, on_device(batch)) for batch in batches]).sum(0).tolist()
        settle()
        return nll / (tokens or 1)
