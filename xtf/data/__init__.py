"""From files to packed batches, in an order that no layout changes."""
from xtf.data.batch import Batch, Sample, cut, pack, stack
from xtf.data.chat import BadLine, Stats, read_samples
from xtf.data.loader import Loader, epoch_packs, eval_batches, split_off
from xtf.data.packing import best_fit, efficiency

__all__ = ["BadLine", "Batch", "Loader", "Sample", "Stats", "best_fit", "cut", "efficiency", "epoch_packs", "eval_batches", "pack", "read_samples",
           "split_off", "stack"]
