"""Nothing in a step waits for the device: no value of a tensor is asked for, and nothing is copied from unpinned
memory."""
import ast
from pathlib import Path

import pytest
import torch

from tests.laws.moe_model import CONFIGS
from xtf import device, models, nn, plan
from xtf.parallel import static

ROOT = Path(__file__).parents[2] / "xtf"
STEP = ["_shard.py", "grad.py", "moe.py", "nn.py", "ops.py", "state.py", "kernels", "models", "optim", "parallel",
        "transforms"]


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def where_made(call: ast.Call) -> str | None:
    """The device that `torch.tensor(..., device=)` names, as source; None where it names none."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == "device"), None)


def test_no_list_is_copied_to_a_device():
    """`torch.tensor(list, device=)` waits, and no mode that looks at operators sees it."""
    files = [f for name in STEP for f in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    assert len(files) > 40
    found = [f"{f.relative_to(ROOT)}:{call.lineno}" for f in files for call in calls(f)
             if call.func.attr in ("tensor", "as_tensor") and ast.unparse(call.func.value) == "torch"
             and where_made(call) not in (None, "'cpu'")]
    assert not found, f"{found} copy from unpinned memory: use numbers, `new_full`, or copy once and keep it"


DENSE = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
FAMILIES = {"qwen3": DENSE, **{name: CONFIGS[name] for name in ("qwen3_moe", "gpt_oss", "deepseek_v3")}}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sizes", [{}, {"dp": 2, "ep": 2}], ids=str)
def test_a_step_asks_for_no_value(name, sizes):
    """On meta, where a value cannot be had: the step of the recipes with clipping, guard and AdamW; on ranks with room
    for experts that is known beforehand, so no wait for counts either."""
    model = models.FAMILIES[name]
    cfg = model.config(FAMILIES[name])
    bounded = static(64, 256) if hasattr(cfg, "router") and sizes else None
    assert plan.measure(model, cfg, sizes, seq_len=32, documents=2, packs=2, strategy=bounded).peak > 0


def test_such_a_step_would_be_caught(monkeypatch):
    monkeypatch.setattr("xtf.optim.core.known", lambda extra, ops: (float(extra["norm"]), None))
    cfg = models.qwen3.config(DENSE)
    with pytest.raises(Exception, match=r"item|_local_scalar_dense|data-dependent"):
        plan.measure(models.qwen3, cfg, {}, seq_len=32)


def test_what_is_read_later_is_what_was():
    loss, skipped = torch.tensor(0.5), torch.tensor(3)
    read = device.read_later({"loss": loss, "skipped": skipped, "lr": 0.25})
    loss.zero_()                                                         # the next step writes into its memory
    assert read() == {"loss": 0.5, "skipped": 3.0, "lr": 0.25} and list(read()) == ["loss", "skipped", "lr"]


def test_frequencies_are_sent_to_a_device_once(monkeypatch):
    made, right = [], nn._tables
    monkeypatch.setattr(nn, "_tables", lambda kind, head_dim: made.append(kind) or right(kind, head_dim))
    nn._tables_on.cache_clear()
    kinds = nn.Rope(), nn.LinearRope(factor=2.0), nn.Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                                original_max_position_embeddings=64)
    sent = [[nn._tables_on(kind, 8, torch.device("cpu"))[0] for kind in kinds] for _ in range(3)]
    assert made == list(kinds) and all(x is y for later in sent for x, y in zip(sent[0], later, strict=True))
    nn._tables_on.cache_clear()
