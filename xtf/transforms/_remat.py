"""`remat`: recompute instead of keeping.

It does no more than pass `around` to `scan`: the block, and under fsdp the gather before it, run inside torch's
checkpoint.
"""
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from xtf.ops import Ops
from xtf.transform import Env, Stage, Transform


def remat(*keep: str) -> Transform:
    """Keep each block's inputs alone and recompute it in backward; results of calls in `keep` (`"attn_out"`) stay.

    Names are those that models give with `ops.name(fn, label)`. A label that no call has keeps nothing. What is
    labelled "routes" (the choice of experts and the exchange of counts: integers) is always kept, so that a token
    cannot choose otherwise the second time.

    Source: Chen et al., arXiv 1604.06174.

    >>> remat("attn_out").name
    'remat'
    """
    def wrap(ops: Ops, env: Env) -> Ops:
        inside: list[bool] = []                                            # whether a kept call is running

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if inside else CheckpointPolicy.PREFER_RECOMPUTE

        running: list[Any] = []  # of each block that runs: the list it fills, or reads again

        def kept(fn: Callable, *args: Any) -> Any:
            if not running or torch.compiler.is_compiling():
                return fn(*args)
            if not isinstance(running[-1], list):
                return next(running[-1])
            # Selective checkpoint numbers an operator's calls, and these will not be made again: it must not see them
            # the first time.
            counted = isinstance(_get_current_dispatch_mode(), _CachingTorchDispatchMode)
            with _pop_mode_temporarily() if counted else nullcontext():
                running[-1].append(fn(*args))
            return running[-1][-1]

        def name(fn: Callable, label: str) -> Callable:
            if label == "routes":
                return partial(kept, ops.name(fn, label))

            def run(*args: Any, **kwargs: Any) -> Any:
                inside.append(True)
                try:
                    return fn(*args, **kwargs)
                finally:
                    inside.pop()
            return run if label in keep else ops.name(fn, label)

        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if keep else {}

        def around(fn: Callable) -> Callable:
            routes: list[Any] = []
            again: list[bool] = []

            def run(*args: Any) -> Any:
                running.append(iter(routes) if again else routes)
                again.append(True)
                try:
                    return fn(*args)
                finally:
                    running.pop()
            return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False, **contexts)

        return replace(ops, scan=partial(ops.scan, around=around), name=name)

    return Transform("remat", Stage.REMAT, wrap)
