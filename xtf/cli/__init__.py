"""What recipes share that is not the step: flags, starting up, the optimizer that flags ask for, reading data, and the
held-out loss. The step itself stands in the recipe."""
from xtf.cli._optimizer import guard, optimizer
from xtf.cli.evaluation import Evaluation
from xtf.cli.flags import BiasFlags, ExpertFlags, Flags, PretrainFlags, parse
from xtf.cli.ranks import on_device, run, say
from xtf.cli.setup import adapter, data, load, micro_packs, model, shown, start, step_specs, tokenizer, transforms

__all__ = ["BiasFlags", "Evaluation", "ExpertFlags", "Flags", "PretrainFlags", "adapter", "data", "guard", "load",
           "micro_packs", "model", "on_device", "optimizer", "parse", "run", "say", "shown", "start", "step_specs",
           "tokenizer", "transforms"]
