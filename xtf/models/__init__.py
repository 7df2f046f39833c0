"""Models: one module per family, with `Config`, `config`, `specs`, `names`, `hidden`, `forward`, `loss`,
`token_losses`, `flops`, and `loss_and_routing` where there are experts.

What families share is in `dense`, `sparse` (those with experts) and `mla` (latent attention); `config` reads
config.json.
"""
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from xtf.hf import tensors
from xtf.models import deepseek_v3, gpt_oss, llama, qwen2, qwen3, qwen3_moe

__all__ = ["deepseek_v3", "from_hf", "gpt_oss", "llama", "qwen2", "qwen3", "qwen3_moe"]

FAMILIES = {                                                                 # config.json's model_type
    "llama": llama, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "kimi_k2": deepseek_v3,                                                  # the same model with other numbers
}


def from_hf(path: str | Path, say: Callable[[str], Any] = print) -> tuple[ModuleType, Any]:
    """The family's module and the decoded config of a Hugging Face directory.

    Parts that config.json announces and whose tensors are not among the directory's (MTP modules of DeepSeek V3) are
    left out of the config, and `say` is told.

    Raises FileNotFoundError if the directory has no config.json, and ValueError naming the file and the field if the
    family is not one of ours or a field is unknown or not supported.

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
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not JSON: {e}") from None
    family = hf.get("model_type") if isinstance(hf, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    module = FAMILIES[family]
    try:
        cfg = module.config(hf)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    if not hasattr(module, "fit") or not any(file.parent.glob("*.safetensors")):
        return module, cfg
    fitted = module.fit(cfg, tensors(path))
    dropped = [f"{field}={was!r}" for field, was in msgspec.structs.asdict(cfg).items()
               if getattr(fitted, field) != was]
    if dropped:
        say(f"{file}: it announces {', '.join(dropped)}, but the directory has no tensors for that; going on without")
    return module, fitted
