"""Hugging Face directories in and out: every rank reads its own slices, all ranks write one set of files together."""
from xtf.hf.directory import IGNORE, TIED, check, load, save, tensors
from xtf.hf.names import Transposed, file_tensors

__all__ = ["IGNORE", "TIED", "Transposed", "check", "file_tensors", "load", "save", "tensors"]
