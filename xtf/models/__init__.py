"""Models: one module per family, with `Config`, `config`, `specs`, `names`, `hidden`, `forward`, `loss`, `token_losses`, `flops`."""
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from xtf.models import llama, qwen2, qwen3

__all__ = ["from_hf", "llama", "qwen2", "qwen3"]

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}                  # config.json's model_type


def from_hf(path: str | Path) -> tuple[ModuleType, Any]:
    """The family's module and the decoded config of a Hugging Face directory.

    Raises FileNotFoundError if the directory has no config.json, and ValueError naming the file and the field if the family is not
    one of ours or a field is unknown or not supported.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = Path(path, "config.json").write_text('{"model_type": "qwen3", "hidden_size": 64}')
    ...     module, cfg = from_hf(path)
    >>> module.__name__, cfg.hidden_size
    ('xtf.models.qwen3', 64)
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; pass a Hugging Face directory, the one that holds config.json")
    try:
        hf = json.loads(file.read_text())
    except ValueError as e:
        raise ValueError(f"{file}: not JSON: {e}") from None
    family = hf.get("model_type") if isinstance(hf, dict) else None
    if family not in FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    module = FAMILIES[family]
    try:
        return module, module.config(hf)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
