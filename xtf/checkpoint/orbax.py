"""What Orbax has to be told: who writes the arrays, and that a checkpoint is on disk before it gets its name.

Importing this imports JAX. It relies on public names of orbax-checkpoint 0.12.8 alone;
tests/core/test_checkpoint_contract.py says on which.
"""
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from xtf.checkpoint.tensorstore import Leaf

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: the accelerators are torch's
import jax
import orbax.checkpoint as ocp


class _Handler(ocp.type_handlers.NumpyHandler):
    """To a reader these are numpy arrays, as NumpyHandler wrote them."""

    def __init__(self, write: Callable[[Path], Awaitable[None]]):
        super().__init__()
        self._write = write

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
        await self._write(Path(infos[0].parent_dir))
        return []


def handler(write: Callable[[Path], Awaitable[None]]) -> Any:
    """The handler of a tree of `Leaf`: calls `write(folder)` where Orbax would write the arrays, and merges them."""
    registry = ocp.type_handlers.create_type_handler_registry((Leaf, _Handler(write)),
                                                              (jax.Array, ocp.type_handlers.ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)


def durable() -> type:
    """The temporary directory, with its contents on disk before it is renamed and the new name on disk after it.

    tensorstore syncs what it writes; Orbax syncs neither its JSON nor the rename. Retired steps are removed after this
    returns.
    """
    return _Durable


class _Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    async def finalize(self) -> None:
        for root, _, files in os.walk(self.get(), topdown=False):
            for name in files:
                _sync(os.path.join(root, name))
            _sync(root)
        await super().finalize()  # adds two small files that nobody needs, and renames
        _sync(self.get_final().parent)


def _sync(path: str | os.PathLike) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
