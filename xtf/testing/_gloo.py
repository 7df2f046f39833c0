"""Gloo for pools of ranks that live long: all groups of a process on one device.

Each group of torch's makes a device of its own, whose thread wakes up a hundred times a second for ever; ranks that
have seen the meshes of a whole suite (800 groups on two cores) then do little else.
"""
import functools
from typing import Any

import torch.distributed as dist


class Gloo(dist.ProcessGroupGloo):
    """Torch's group, on this process's device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any):
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices, options._timeout = [_device()], timeout
        super().__init__(store, rank, size, options)  # pyright: ignore[reportArgumentType]


@functools.cache
def _device() -> Any:
    return dist.ProcessGroupGloo.create_default_device()


def share_device() -> None:
    """From now on every gloo group of this process is a `Gloo`."""
    dist.distributed_c10d.ProcessGroupGloo = Gloo  # pyright: ignore[reportPrivateImportUsage]
