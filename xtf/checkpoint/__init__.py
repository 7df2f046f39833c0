"""Checkpoints of a run, and models exported while it goes on."""
from xtf.checkpoint.checkpoints import Checkpoints, restore_params, steps
from xtf.checkpoint.exporter import Exporter

__all__ = ["Checkpoints", "Exporter", "restore_params", "steps"]
