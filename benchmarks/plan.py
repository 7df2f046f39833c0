"""The rows of docs/plan.md: headline layouts, and published runs beside what `xtf.plan` predicts for them.

    python benchmarks/plan.py            # minutes; prints the two tables of docs/plan.md in markdown
"""
import math
from pathlib import Path

from xtf.plan import Flags, Report, report
from xtf.plan.ledger import KINDS

CONFIGS = Path(__file__).parent.parent / "docs" / "configs"

# (model, mesh, tokens of a pack, machine)
HEADLINES = [
    ("Qwen3-235B-A22B", {"dp": 256}, 4096, "h100"),
    ("Qwen3-235B-A22B", {"dp": 256}, 65536, "h100"),
    ("Qwen3-235B-A22B", {"dp": 64, "sp": 4}, 65536, "h100"),
    ("DeepSeek-V3", {"dp": 32, "ep": 8}, 4096, "h100"),
    ("Kimi-K2-Instruct", {"dp": 32, "ep": 32}, 4096, "h100"),
    ("Kimi-K2-Instruct", {"dp": 4, "ep": 32, "sp": 8}, 65536, "h100"),
]
# ... and the tokens a second and device that were reported. The reports do not say how long packs were: two lengths, of
# documents of 4,096 tokens.
PUBLISHED = [
    ("Qwen3-235B-A22B", {"dp": 256}, 8192, "h800", 2000),
    ("Qwen3-235B-A22B", {"dp": 256}, 32768, "h800", 2000),
    ("Qwen3-30B-A3B", {"dp": 8}, 8192, "h100", 12040),
    ("Qwen3-30B-A3B", {"dp": 8}, 32768, "h100", 12040),
]


def row(model: str, mesh: dict[str, int], seq_len: int, machine: str, documents: int) -> Report:
    return report(Flags(model=str(CONFIGS / model), world=math.prod(mesh.values()), seq_len=seq_len,
                        documents=documents,
                        machine=machine), mesh, True)  # pyright: ignore


def line(cells: list) -> None:
    """One row of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    before = ["model", "ranks", "mesh", "tokens a pack", "peak, GB"]
    for rows, after in ((HEADLINES, [*KINDS, "fits", "tokens/s a device"]),
                        (PUBLISHED, ["reported", "predicted", "predicted over reported"])):
        line([*before, *after])
        line(["---"] * len([*before, *after]))
        for model, mesh, seq_len, machine, *reported in rows:
            r = row(model, mesh, seq_len, machine, seq_len // 4096 if reported else 1)
            rate = r.tokens_per_second_per_device
            cells = [model, f"{r.world} {machine}", " ".join(f"{axis}={n}" for axis, n in mesh.items()), f"{seq_len:,}",
                     f"{r.peak / 1e9:.1f}"]
            if reported:
                line([*cells, f"{reported[0]:,}", f"{rate:,.0f}", f"{rate / reported[0]:.2f}"])
            else:
                line([*cells, *(f"{held / 1e9:.1f}" for held in r.memory.values()), "yes" if r.fits else "**no**",
                      f"{rate:,.0f}"])
        print(flush=True)


if __name__ == "__main__":
    main()
