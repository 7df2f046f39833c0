"""`Exporter`: Hugging Face directories written in the background."""
import datetime
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from xtf import hf, tree
from xtf.checkpoint import tensorstore as arrays
from xtf.checkpoint.checkpoints import leave
from xtf.layout import Place, local
from xtf.parallel.peers import Peers


class Exporter:
    """Writes Hugging Face directories in the background: `hf.save` of a copy of the parameters, over process groups of
    its own, in which a rank that is silent for `timeout` seconds fails the others.

    The copy takes as much host memory as this rank's part of the parameters, kept for the next one. Every rank calls
    every method, in one order.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/hf"
    >>> with Exporter() as exporter:
    ...     exporter.save(path, {"norm": {"weight": torch.ones(3)}}, {"norm.weight": "model.norm.weight"})
    >>> [file.name for file in Path(path).iterdir()]
    ['model.safetensors']
    """

    def __init__(self, timeout: float = 1800.0):
        self.timeout, self._peers = datetime.timedelta(seconds=timeout), Peers(timeout=timeout)
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, path: str | Path, params: tree.Tree, names: Mapping[str, str], like: str | Path | None = None,
             quantise: Literal["fp8"] | None = None) -> None:
        """Start `hf.save(path, params, names, like, quantise=quantise)`; returns when the parameters are copied.

        Raises what the previous one raised.
        """
        self.wait()
        copied = tree.map_with_path(self._copy, params)
        if any(local(x).device.type != "cpu" for x in tree.leaves(params)):
            torch.accelerator.synchronize()

        def work() -> None:
            try:
                hf.save(path, copied, names, like, quantise=quantise, peers=self._peers)
            except BaseException as e:
                self._error = e
        self._thread = threading.Thread(target=work, name="export")
        self._thread.start()

    def wait(self) -> None:
        """Return when the directory is written; raises what `hf.save` did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, and let go of the other ranks; raises what `wait` does."""
        try:
            self.wait()
        finally:
            self._peers.close()

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        leave(self, kind)

    def _copy(self, name: str, x: torch.Tensor) -> torch.Tensor:
        host = arrays.on_host(self._buffers, name, local(x).detach())
        if not isinstance(x, DTensor):
            return host
        mesh = x.device_mesh
        if mesh not in self._meshes:
            groups = []
            for i in range(mesh.ndim):
                for ranks in mesh.mesh.movedim(i, -1).reshape(-1, mesh.size(i)).tolist():
                    group = dist.new_group(ranks, timeout=self.timeout, backend="gloo")
                    if dist.get_rank() in ranks:
                        groups.append(group)
            self._meshes[mesh] = DeviceMesh.from_group(groups, "cpu", mesh=mesh.mesh,
                                                       mesh_dim_names=mesh.mesh_dim_names)
        return Place(self._meshes[mesh], x.placements).from_local(host, tuple(x.shape))
