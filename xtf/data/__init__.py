"""From files to packed batches, in an order that no layout changes."""
from xtf.data.batch import Batch, Sample, cut, pack, pack_rows, stack
from xtf.data.cache import tokenized
from xtf.data.chat import BadLine, Encoder, Stats, read_samples
from xtf.data.dataset import Dataset
from xtf.data.loader import Loader, eval_batches, split_off
from xtf.data.mix import Source
from xtf.data.packing import best_fit, efficiency
from xtf.data.sources import open_data, parse_sources

__all__ = ["BadLine", "Batch", "Dataset", "Encoder", "Loader", "Sample", "Source", "Stats", "best_fit", "cut",
           "efficiency", "eval_batches", "open_data", "pack", "pack_rows", "parse_sources", "read_samples", "split_off",
           "stack", "tokenized"]
