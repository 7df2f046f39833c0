"""Mesh transforms, and the only code that moves data between ranks."""
from xtf.parallel.ep import Overflow, ep, exact, static
from xtf.parallel.fsdp import fsdp
from xtf.parallel.mesh import mesh
from xtf.parallel.ulysses import ulysses

__all__ = ["Overflow", "ep", "exact", "fsdp", "mesh", "static", "ulysses"]
