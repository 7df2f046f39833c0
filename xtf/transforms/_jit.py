"""`jit`: compile each block once, and let the optimizer overwrite the state it was given."""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from xtf import tree
from xtf.kernels import experts
from xtf.layout import local
from xtf.ops import Ops
from xtf.state import TrainState
from xtf.transform import Env, Stage, Transform


def jit(compile: bool = True, donate: bool = True) -> Transform:
    """Compile the blocks that `scan` runs (fullgraph, static shapes; in pieces around messages), and donate the state.

    Blocks are compiled once for each function (a `functools.partial` by its parts), so define them outside of the step.
    Donated: parameters and moments are updated in place, which halves the optimizer's peak; the state that was passed
    in is poisoned, and touching its fields raises RuntimeError (a leaf taken out before holds the new values). A step
    that raises before its update leaves the state whole; one that raises in the middle of it poisons it.

    >>> jit(compile=False).name
    'jit'
    """
    def wrap(ops: Ops, env: Env) -> Ops:
        compiled: dict[Any, Callable] = {}

        def scan(block: Callable, *args: Any, **kwargs: Any) -> tuple[Any, list]:
            try:  # models make their partial anew each step: the same one by its parts
                key = (block.func, block.args, tuple(block.keywords.items())) if isinstance(block, partial) else block
                known = key in compiled
            except TypeError as e:
                raise TypeError(f"jit: the block's arguments must be hashable ({e}); pass tensors to scan as shared "
                                "arguments") from None
            if not known:
                # kinds of layers × steps × whether gradients are wanted, all of one function: more than the 8 that
                # torch stops at
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
                at_home = ops.announce is experts.announce  # else how many rows there are changes from step to step
                compiled[key] = torch.compile(block, fullgraph=at_home, dynamic=False if at_home else None)
            return ops.scan(compiled[key], *args, **kwargs)

        return replace(ops, scan=scan if compile else ops.scan, donate=donate)

    return Transform("jit", Stage.JIT, wrap, step=_donating if donate else lambda run: run)


def _versions(state: TrainState) -> list[int]:
    """How often each tensor was written in place."""
    return [local(x)._version for x in tree.leaves(state) if isinstance(x, torch.Tensor)]


def _donating(run: Callable) -> Callable:
    def donated(state: TrainState, batch: Any) -> Any:
        before = _versions(state)
        try:
            new, metrics = run(replace(state, donated=True), batch)
        except BaseException:
            if _versions(state) != before:
                state.poison()
            raise
        state.poison()
        return replace(new, donated=False), metrics
    return donated
