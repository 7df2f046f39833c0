"""A deep model's plan from two shallow ones: layers of one kind cost the same, so the rest is arithmetic.

Bytes, FLOPs, messages and seconds are each a + b × layers, but for the peak of memory: the moment at which it comes may
be another one in a deep model. Within a half of a phase of the step (a forward, a backward, the update) what is alive
grows or shrinks by the same for each layer, so that its most stands at an end of it: every half has its own straight
line, and the peak is the highest.
"""
import math
from collections import Counter
from types import ModuleType
from typing import Any

import msgspec

from xtf.nn import ModelConfig
from xtf.plan.step import Measured, Message, measure

# Times that the pattern comes in the first shallow model, once more in the second: with fewer, not all the buffers are
# there that are in flight at once.
FEW = 4


def pattern(model: ModuleType, cfg: ModelConfig) -> tuple[int, int]:
    """(layers before, layers of the pattern that then repeats itself to the end), the shortest of both together.

    >>> from xtf.models import gpt_oss
    >>> pattern(gpt_oss, gpt_oss.config({"num_hidden_layers": 7}))      # windows in every other layer
    (0, 2)
    """
    windows = getattr(cfg, "windows", None) or (None,) * cfg.num_hidden_layers
    kinds = list(zip(map(str, model.specs(cfg)["layers"]), windows, strict=True))
    found = [(before, period) for period in range(1, len(kinds) + 1) for before in range(len(kinds) - period + 1)
             if kinds[before:-period] == kinds[before + period:]]
    return min(found, key=lambda f: (f[0] + f[1], f[1]))


def shallow(cfg: Any, layers: int) -> Any:
    """The config, a `ModelConfig` of msgspec's, with its first layers alone."""
    types = getattr(cfg, "layer_types", None)
    return msgspec.structs.replace(cfg, num_hidden_layers=layers,
                                   **({"layer_types": types[:layers]} if types is not None else {}))


def estimate(model: ModuleType, cfg: ModelConfig, sizes: dict[str, int], *, limit: float = math.inf,
             **options: Any) -> Measured:
    """As `measure`, of a model whose layers are alike in a fraction of its time; a shallow one is measured whole.

    Raises as `measure` does.
    """
    before, period = pattern(model, cfg)
    rest = (cfg.num_hidden_layers - before) % period
    few, more = (before + rest + n * period for n in (FEW, FEW + 1))
    if more >= cfg.num_hidden_layers or options.get("shares") is not None:
        return measure(model, cfg, sizes, limit=limit, **options)
    a, b = (measure(model, shallow(cfg, n), sizes, limit=limit, **options) for n in (few, more))
    on = lambda x, y: x + (y - x) * (cfg.num_hidden_layers - few) // period
    moments = [{kind: on(x[kind], y[kind]) for kind in x} for x, y in zip(a.moments, b.moments, strict=True)]
    memory = max(moments, key=lambda held: sum(held.values()))
    if (peak := sum(memory.values())) > limit:
        raise MemoryError(f"{peak:,} bytes are alive at once, the limit is {limit:,.0f}")
    work = Counter({key: on(a.work[key], b.work[key]) for key in {*a.work, *b.work}})
    flops = {kind: on(n, b.flops[kind]) for kind, n in a.flops.items()}
    messages = [Message(x.kind, x.axes, x.ranks, on(x.count, y.count), on(x.bytes, y.bytes))
                for x, y in zip(a.messages, b.messages, strict=True)]
    return Measured(peak, memory, messages, flops, a.tokens, on(a.parameters, b.parameters), work, moments)
