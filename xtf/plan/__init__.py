"""What a layout costs before it is run: memory, messages, work, time, as values or `python -m xtf.plan`'s table."""
from xtf.plan._report import Flags, Report, report, table, this_cpu
from xtf.plan._search import meshes, search
from xtf.plan.command import main
from xtf.plan.layers import estimate
from xtf.plan.machines import EFFICIENCY, MACHINES, Machine
from xtf.plan.step import Balanced, Measured, Message, measure, ordered, ranks, training_step, transforms

__all__ = ["EFFICIENCY", "MACHINES", "Balanced", "Flags", "Machine", "Measured", "Message", "Report", "estimate",
           "main", "measure", "meshes", "ordered", "ranks", "report", "search", "table", "this_cpu", "training_step",
           "transforms"]
