"""Mesh transforms, and the only code that moves data between ranks."""
from xtf.parallel._ep import Overflow, ep, exact, settle, static
from xtf.parallel._fsdp import fsdp
from xtf.parallel._mesh import is_main, mesh
from xtf.parallel._ulysses import ulysses

__all__ = ["Overflow", "ep", "exact", "fsdp", "is_main", "mesh", "settle", "static", "ulysses"]
