"""A run of a recipe: its folder, its processes, and what it shows."""
from xtf.run.folder import GaveUp, Run, git, versions

__all__ = ["GaveUp", "Run", "git", "versions"]
