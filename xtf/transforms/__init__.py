"""Transforms that need no mesh."""
from xtf.transforms._jit import jit
from xtf.transforms._lora import Lora, lora, merge
from xtf.transforms._overlap import overlap
from xtf.transforms._remat import remat
from xtf.transforms.precision import bf16, fp64

__all__ = ["Lora", "bf16", "fp64", "jit", "lora", "merge", "overlap", "remat"]
