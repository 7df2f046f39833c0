"""What recipes share that is not training: flags, starting up, and reading data. The step itself stands in the
recipe."""
from xtf.cli.flags import ExpertFlags, Flags, parse
from xtf.cli.setup import adapter, data, load, micro_packs, on_device, run, say, show, start, tokenizer, transforms

__all__ = ["ExpertFlags", "Flags", "adapter", "data", "load", "micro_packs", "on_device", "parse", "run", "say", "show",
           "start", "tokenizer", "transforms"]
