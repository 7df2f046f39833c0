"""`jit`: compile each block once, and let the optimizer overwrite the state it was given."""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from xtf.ops import Ops
from xtf.shard import Env, Transform
from xtf.state import TrainState


def jit(compile: bool = True, donate: bool = True) -> Transform:
    """Compile the blocks that `scan` runs (fullgraph, static shapes), and donate the state.

    Donated: parameters and moments are updated in place, which halves the optimizer's peak; the state that was passed in is
    poisoned, and touching it raises RuntimeError.

    >>> jit(compile=False).name
    'jit'
    """
    def wrap(ops: Ops, env: Env) -> Ops:
        compiled: dict[Any, Callable] = {}

        def scan(block: Callable, *args: Any, **kwargs: Any) -> tuple[Any, list]:
            key = (block.func, block.args, tuple(block.keywords.items())) if isinstance(block, partial) else block
            if key not in compiled:
                compiled[key] = torch.compile(block, fullgraph=True, dynamic=False)
            return ops.scan(compiled[key], *args, **kwargs)

        return replace(ops, scan=scan if compile else ops.scan, donate=donate)

    return Transform("jit", 50, wrap, step=_donating if donate else lambda run: run)


def _donating(run: Callable) -> Callable:
    def donated(state: TrainState, batch: Any) -> Any:
        new, metrics = run(replace(state, donated=True), batch)
        state.poison()
        return replace(new, donated=False), metrics
    return donated
