"""`python -m xtf.parity DIR`: how far a checkpoint's logits and gradients are from transformers', tensor by tensor."""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from xtf import models
from xtf.models.deepseek_v3 import KIMI_K2
from xtf.testing import logits_and_grads
from xtf.testing.parity import as_layout

BOUND = {"fp32": 1e-5, "fp64": 1e-5, "bf16": 5e-2}  # transformers keeps float32 inside, so fp64 proves no more


def reference(path: str, sequences: list[list[int]],
              dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The same by transformers: each sequence alone, sdpa attention (eager where a model has none). Gradients by their
    names in the files, tied ones once. Quantised directories are dequantised, for which transformers wants the
    accelerate package."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion
    settings = json.loads(Path(path, "config.json").read_text())
    family = settings.pop("model_type")
    if family == "kimi_k2":  # the same model with other defaults; its own code is remote
        family, settings = "deepseek_v3", KIMI_K2 | settings
    config = AutoConfig.for_model(family, **settings)
    how = {"attn_implementation": "eager" if family == "gpt_oss" else "sdpa"}
    how |= {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **how)
    model._weight_conversions = None  # those of the family alone: gradients are not quantised again
    logits, loss = [], torch.zeros((), dtype=dtype)
    for s in sequences:
        # a dynamic one remembers the longest sequence it met
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        out = model(torch.tensor([s])).logits[0]
        logits.append(out.detach())
        if len(s) > 1:
            wide = out[:-1].to(torch.promote_types(dtype, torch.float32))
            loss = loss + torch.nn.functional.cross_entropy(wide, torch.tensor(s[1:]), reduction="sum")
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits, revert_weight_conversion(model, grads)


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value.

    >>> deviation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    0.2
    """
    value = ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)).item()
    return value if math.isfinite(value) else math.inf


def main(argv: list[str] | None = None) -> int:
    """Print a table; 1 if anything is beyond the bound, or has no counterpart."""
    parser = argparse.ArgumentParser(prog="python -m xtf.parity", description=__doc__)
    parser.add_argument("dir", help="a Hugging Face checkpoint directory")
    parser.add_argument("--mesh", default="", help="e.g. dp=2,sp=2: run ours on that many local ranks")
    parser.add_argument("--dtype", default="fp32", choices=list(BOUND))
    parser.add_argument("--bound", type=float, help=f"largest relative deviation (default by dtype: {BOUND})")
    parser.add_argument("--lengths", default="17,5,29,1,8", help="lengths of the random sequences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    bound = BOUND[args.dtype] if args.bound is None else args.bound
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}[args.dtype]
    try:
        layout = as_layout(args.mesh)
        _, cfg = models.from_hf(args.dir)
        g = torch.Generator().manual_seed(args.seed)
        sequences = [torch.randint(cfg.vocab_size, (int(n),), generator=g).tolist() for n in args.lengths.split(",")]
        logits, grads = logits_and_grads(args.dir, sequences, dtype, layout)
        their_logits, their_grads = reference(args.dir, sequences, dtype)
    except (ValueError, OSError, ImportError) as e:
        print(f"xtf.parity: {e}", file=sys.stderr)
        return 1
    rows = [("logits", max(deviation(a, b) for a, b in zip(logits, their_logits, strict=True)))]
    rows += [(name, deviation(grads[name], g) if name in grads else float("inf")) for name, g in their_grads.items()]
    # MTP modules have no counterpart
    rows += [(name, float("inf")) for name, g in grads.items() if name not in their_grads and g.any()]
    for name, value in rows:
        print(f"{value:9.2e}  {'' if value <= bound else 'BEYOND  '}{name}")
    worst = max(value for _, value in rows)
    print(f"largest deviation {worst:.2e} of {len(rows)} tensors, bound {bound:g}: "
          f"{'ok' if worst <= bound else 'FAILED'}")
    return 0 if worst <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
