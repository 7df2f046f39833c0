"""Transforms that need no mesh."""
from xtf.transforms.jit import jit
from xtf.transforms.lora import lora
from xtf.transforms.overlap import overlap
from xtf.transforms.precision import bf16, fp64
from xtf.transforms.remat import remat

__all__ = ["bf16", "fp64", "jit", "lora", "overlap", "remat"]
