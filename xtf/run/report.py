"""`python -m xtf.report OUT [OUT ...] [--to DIR]`: runs as one picture and one page, report.png and report.html."""
import argparse
import html
import io
import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

# column of metrics.jsonl: title, unit, factor to the unit, whether a smoothed curve is drawn over the raw one
PANELS = {
    "loss": ("Loss", "nats per token", 1, True),
    "grad_norm": ("Gradient norm", "before clipping", 1, True),
    "lr": ("Learning rate", "", 1, False),
    "tokens_per_s": ("Throughput", "tokens/s, no padding", 1, True),
    "mfu": ("MFU", "% of peak", 100, True),
    "memory_gb": ("Memory", "GB, the most so far", 1, False),
}
TAKEN = ("loss", "grad_norm")  # columns in which a skipped step has a value that counts for nothing
ELSEWHERE = {"tokens", "eval_loss", "skipped", "in_a_row"}               # shown, but not in a panel of their own
# read on white and on black
INK, COLORS = "#808080", ("#3d87d9", "#e0762c", "#34a070", "#a06cd5", "#d9538c", "#1fa3ad", "#b3901d", "#8c6d5a")
LAST = 20                                                               # steps whose mean is "the loss at the end"
MFU = """MFU = FLOPs / seconds / (ranks × peak FLOP/s of one device). FLOPs are those of products with weights and of
attention inside each document, forward and backward: 3 × forward where everything is trained, less where leaves are
frozen, whose gradients are not made. Neither padding nor recomputation counts. The peak is that of dense products in
--dtype: the maker's datasheet where there is one, else measured. Tokens/s leaves out padding, and both leave out
evaluations."""


class Run(NamedTuple):
    """What a run left: name, columns of metrics.jsonl as (steps, values), NaN where a value is null, run.json."""
    name: str
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    record: dict[str, Any]

    def __getitem__(self, column: str) -> np.ndarray:
        """The values of a column; empty if there is none."""
        return self.columns[column][1] if column in self.columns else np.empty(0)

    @property
    def skipped(self) -> np.ndarray:
        """Numbers of the steps that were skipped: those at which the total in column `skipped` grew."""
        steps, total = self.columns.get("skipped", (np.empty(0, int), np.empty(0)))
        return steps[np.diff(total, prepend=0) > 0]

    def taken(self, column: str) -> np.ndarray:
        """The values of a column, NaN at skipped steps: what made the model."""
        values = self[column]
        return np.where(np.isin(self.columns[column][0], self.skipped), np.nan, values) if len(values) else values


def read(out: str | Path) -> Run:
    """A run's directory.

    The last row may still be in the making (a live run) and is then left out; run.json may be missing.

    Raises OSError if there is no metrics.jsonl, and ValueError naming file and line where one is no row, or if no step
    is there yet.
    """
    file, record = Path(out) / "metrics.jsonl", Path(out) / "run.json"
    if not file.is_file():
        raise OSError(f"{file}: no such file; pass the --out directory of a run")
    found: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(file.read_text().splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
            cells = {name: float("nan" if value is None else value) for name, value in row.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            if not line.endswith("\n"):
                break
            raise ValueError(f"{file}, line {number}: not a row of metrics ({e!r})") from None
        for name, value in cells.items():
            found.setdefault(name, []).append((step, value))
    if "loss" not in found:
        raise ValueError(f"{file}: no step is there yet")
    columns = {name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]))
               for name, pairs in found.items()}
    try:
        return Run(str(out), columns, json.loads(record.read_text()) if record.is_file() else {})
    except ValueError as e:
        raise ValueError(f"{record}: not JSON ({e})") from None


def smooth(values: np.ndarray) -> np.ndarray:
    """Each value averaged with its neighbours, weighted by nearness (half of it within a hundredth of the curve).

    NaN and infinities weigh nothing. Looking to both sides, unlike a running average, it does not lag behind a curve
    that falls.

    >>> smooth(np.array([2.0, np.nan, 2.0])).tolist()
    [2.0, 2.0, 2.0]
    """
    keep = 0.5 ** (1 / max(1.0, len(values) / 100))

    def past(values: list[float]) -> list[float]:
        total, out = 0.0, []
        for value in values:
            total = total * keep + value
            out.append(total)
        return out
    good = np.isfinite(values)
    both = lambda v: np.array(past(v.tolist())) + np.array(past(v[::-1].tolist()))[::-1] - v
    weight = both(good.astype(float))
    return np.divide(both(np.where(good, values, 0.0)), weight, out=np.full(len(values), np.nan), where=weight > 0)


def thin(x: np.ndarray, y: np.ndarray, bins: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """A curve that looks the same with few points: the lowest and the highest of each of `bins` stretches.

    >>> thin(np.arange(6), np.array([0, 5, 1, 1, 9, 2]), bins=2)[1].tolist()
    [0, 5, 1, 9]
    """
    if len(x) <= 2 * bins:
        return x, y
    ends = np.linspace(0, len(x), bins + 1).astype(int)
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    keep = np.unique([a + f(part[a:b]) for a, b in pairwise(ends) for f, part in ((np.argmin, low), (np.argmax, high))])
    return x[keep], y[keep]


# ---- figures in words ------------------------------------------------------------------------------------------------

def summary(run: Run) -> dict[str, float | None]:
    """The figures of the page's table; None where the run has no such column.

    Losses and norms are those of steps that were not skipped; medians of speed leave out the first step, which compiles
    and warms up.
    """
    def of(fn: Any, column: str, first: int = 0) -> float | None:
        values = run.taken(column) if column in TAKEN else run[column]
        values = values[first:] if len(values) > first else values
        values = values[np.isfinite(values)]
        return float(fn(values)) if len(values) else None
    speed = run["tokens_per_s"]
    timed = len(speed) and len(speed) == len(run["tokens"])
    figures = {
        "last step": float(run.columns["loss"][0][-1]),
        "tokens": of(np.sum, "tokens"),
        "hours in steps": float(np.sum(run["tokens"] / speed) / 3600) if timed else None,
        f"loss, mean of the last {LAST} steps": of(lambda v: v[-LAST:].mean(), "loss"),
        "held-out loss, first": of(lambda v: v[0], "eval_loss"),
        "held-out loss, lowest": of(np.min, "eval_loss"),
        "held-out loss, last": of(lambda v: v[-1], "eval_loss"),
        "gradient norm, median": of(np.median, "grad_norm"),
        "gradient norm, largest": of(np.max, "grad_norm"),
        "tokens/s, median": of(np.median, "tokens_per_s", 1),
        "MFU %, median": of(lambda v: 100 * np.median(v), "mfu", 1),
        "memory GB, peak": of(np.max, "memory_gb"),
        "skipped steps": of(np.max, "skipped"),
    }
    return figures | {f"tokens from {name[4:]}": of(np.sum, name) for name in run.columns if name.startswith("mix/")}


def flat(value: Any, path: str = "") -> dict[str, str]:
    """A JSON value's leaves by dotted path.

    >>> flat({"a": {"b": 1, "c": None}, "d": [1, 2]})
    {'a.b': '1', 'a.c': 'null', 'd': '[1, 2]'}
    """
    if isinstance(value, dict):
        return {k: v for name, member in value.items()
                for k, v in flat(member, f"{path}.{name}" if path else name).items()}
    return {path: value if isinstance(value, str) else json.dumps(value)}


# ---- the picture -----------------------------------------------------------------------------------------------------

def draw(runs: Sequence[Run]) -> Figure:
    """Small multiples over steps: loss first, then every other column; and a data mix for each run that mixes."""
    names = [c for c in dict.fromkeys([*PANELS, *(c for run in runs for c in run.columns)])
             if any(c in run.columns for run in runs) and c not in ELSEWHERE and not c.startswith("mix/")]
    mixed = [i for i, run in enumerate(runs) if any(c.startswith("mix/") for c in run.columns)]
    rest = names[1:] + [f"mix/{i}" for i in mixed]
    beside = (rest[:2] or ["loss"]) * (3 - len(rest[:2]))  # two beside the loss, then rows of three; no gaps
    rows: list[Any] = [["loss", "loss", beside[0]], ["loss", "loss", beside[1]],
                       *((rest[i:i + 3] * 3)[:3] for i in range(2, len(rest), 3))]
    rows = [sorted(row, key=row.index) for row in rows]
    style: Any = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                  "ytick.color": INK, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                  "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 2.35 * len(rows) + 0.4), layout="constrained")
        axes = figure.subplot_mosaic(rows)
        for name in names:
            panel(axes[name], runs, name)
        for i in mixed:
            mix(axes[f"mix/{i}"], runs[i], len(runs) > 1)
        figure.legend(handles=legend(runs), loc="outside upper left", ncols=8, frameon=False)
    return figure


def legend(runs: Sequence[Run]) -> list[Line2D]:
    """What the marks mean; the first run's color stands for all where there are several."""
    color = COLORS[0] if len(runs) == 1 else INK
    keys = [Line2D([], [], color=COLORS[i % len(COLORS)], lw=1.8, label=run.name) for i, run in enumerate(runs)]
    keys += [Line2D([], [], color=color, lw=1, alpha=0.45, label="each step")]
    if any("eval_loss" in run.columns for run in runs):
        keys.append(Line2D([], [], color=color, ls="", marker="o", mfc="none", mew=1.5, label="held out"))
    if any(len(run.skipped) for run in runs):
        keys.append(Line2D([], [], color=color, ls="", marker="v", label="skipped step"))
    return keys


def panel(axes: Axes, runs: Sequence[Run], column: str) -> None:
    """One column of every run: raw and faint below, smoothed above; held-out points and skipped steps with the loss."""
    title, unit, factor, smoothed = PANELS.get(column, (column, "", 1, True))
    seen, raw = [], []
    for run, color in zip(runs, [COLORS[i % len(COLORS)] for i in range(len(runs))], strict=True):
        if column not in run.columns:
            continue
        steps, values = run.columns[column][0], run.columns[column][1] * factor
        taken = run.taken(column) * factor if column in TAKEN else values.copy()
        if column in ("tokens_per_s", "mfu") and len(steps) > 1:
            taken[0] = np.nan                                            # it compiles and warms up
        seen.append(taken)
        raw.append(values)
        single = "." if len(steps) == 1 else None
        if smoothed:
            axes.plot(*thin(steps, values), color=color, alpha=0.45, lw=0.8, marker=single)
        axes.plot(*thin(steps, smooth(taken) if smoothed else values), color=color, lw=1.8, marker=single)
        if column == "loss":
            many = len(run["eval_loss"]) > 50                            # then a line with some of the rings
            style: Any = {"ls": "-" if many else "", "lw": 0.8, "markevery": len(run["eval_loss"]) // 25 if many else 1}
            axes.plot(*run.columns.get("eval_loss", ([], [])), color=color, marker="o", mfc="none", ms=5.5, mew=1.5,
                      zorder=3, **style)
            seen.append(run["eval_loss"])
            if len(run.skipped):                                         # an empty unclipped line confuses the layout
                axes.plot(run.skipped, np.ones(len(run.skipped)), "v", color=color, ms=6,
                          transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_title(f"{title}  " if unit else title)
    axes.annotate(unit, (1, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=8)
    axes.grid(alpha=0.25, lw=0.6, color=INK)
    axes.margins(x=0.01)
    over_steps(axes)
    scale(axes, np.concatenate(seen), np.concatenate(raw), zero=column in ("tokens_per_s", "mfu", "memory_gb"))


def scale(axes: Axes, values: np.ndarray, raw: np.ndarray, zero: bool) -> None:
    """Limits by `values`; a few wild ones, or in `raw`, do not flatten the curve: cut off, counted in the panel."""
    values, raw = values[np.isfinite(values)], raw[np.isfinite(raw)]
    if not len(values):
        return
    low, most, high = np.percentile(values, [0, 99, 100])
    top = most + 0.5 * (most - low) if high - low > 4 * (most - low) > 0 else high
    low, space = (0, 0) if zero else (low, 0.06 * (top - low))
    if top > low:
        axes.set_ylim(low - space, top + 0.08 * (top - low))
    if beyond := np.sum(raw > top + 0.08 * (top - low)):
        axes.text(0.99, 0.96, f"{beyond} beyond, up to {raw.max():.3g}", transform=axes.transAxes, ha="right", va="top",
                  fontsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v, top)))


def over_steps(axes: Axes) -> None:
    """The axis that all panels share."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v, axes.get_xlim()[1])))
    axes.set_xlabel("step", fontsize=8)


def short(value: float, most: float) -> str:
    """A tick's label on an axis that goes up to `most`.

    >>> short(2e4, 6e4), short(2e4, 5000.0), short(5e5, 3e6)
    ('20k', '20000', '0.5M')
    """
    scale, unit = (1e6, "M") if most >= 2e6 else (1e3, "k") if most >= 1e4 else (1, "")
    return f"{value / scale:.6g}{unit}" if value else "0"


def mix(axes: Axes, run: Run, named: bool) -> None:
    """The share of each source in the tokens of a step, stacked."""
    columns = {name[4:]: column for name, column in run.columns.items() if name.startswith("mix/")}
    steps = np.unique(np.concatenate([s for s, _ in columns.values()]))
    tokens = np.zeros((len(columns), len(steps)))
    for row, (at, values) in zip(tokens, columns.values(), strict=True):
        row[np.searchsorted(steps, at)] = np.nan_to_num(values)          # no cell: nothing of it in that step
    shares = np.array([smooth(row) for row in tokens]) / np.maximum(smooth(tokens.sum(0)), 1e-9) * 100
    keep = np.unique(np.linspace(0, len(steps) - 1, 500).astype(int))
    axes.stackplot(steps[keep], shares[:, keep], colors=[COLORS[i % len(COLORS)] for i in range(len(columns))],
                   alpha=0.85, lw=0)
    ends = np.cumsum(shares[:, len(steps) // 2])
    for name, share, top, part in zip(columns, shares[:, len(steps) // 2], ends, tokens.sum(1) / max(tokens.sum(), 1),
                                      strict=True):
        if share > 7:                                                    # thinner ones have a row in the page's table
            where = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
            axes.text(0.5, top - share / 2, f"{name if len(name) < 40 else '…' + name[-38:]}  {part:.0%}",
                      color="black", fontsize=8, **where)
    axes.set_title(f"Data mix: {run.name}" if named else "Data mix")
    axes.annotate("% of tokens", (1, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", ha="right",
                  fontsize=8)
    axes.set_ylim(0, 100)
    axes.margins(x=0)
    over_steps(axes)


# ---- the page --------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark }
:root { --ink: light-dark(#1f2328, #d8dde3); --line: light-dark(#d9dde2, #363c44) }
:root { --mark: light-dark(#fff3c4, #4d4319) }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: light-dark(#ffffff, #14171b) }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: auto; color: light-dark(#5b626b, #a3abb5) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line) }
th, td { vertical-align: top; overflow-wrap: anywhere }
th { font-weight: 600; min-width: 8rem } td.number { text-align: right } tr.differs { background: var(--mark) }
.scroll { overflow-x: auto } code, pre { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin-top: 2rem }
"""


def table(heads: Sequence[str], rows: dict[str, Sequence[str]], kind: str = "") -> str:
    """An HTML table of text; a row whose cells differ is marked, unless it is one of numbers."""
    def row(name: str, cells: Sequence[str]) -> str:
        mark = ' class="differs"' if not kind and len(set(cells)) > 1 else ""
        data = "".join(f"<td{kind and f' class={kind}'}>{html.escape(c)}</td>" for c in cells)
        return f"<tr{mark}><th>{html.escape(name)}</th>{data}</tr>"
    head = "".join(f"<th>{html.escape(h)}</th>" for h in ("", *heads))
    body = (f"<tr>{head}</tr>" if len(heads) > 1 else "") + "".join(row(k, v) for k, v in rows.items())
    return f'<div class="scroll"><table>{body}</table></div>'


def page(runs: Sequence[Run], svg: str) -> str:
    """The whole HTML page, which refers to nothing outside of itself."""
    names = [run.name for run in runs]
    figures = [summary(run) for run in runs]
    labels = [k for k in dict.fromkeys(k for f in figures for k in f) if any(f.get(k) is not None for f in figures)]
    cell = lambda value: "" if value is None else f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    parts = [table(names, {k: [cell(f.get(k)) for f in figures] for k in labels}, "number"), svg,
             f"<p>{html.escape(MFU)}</p>"]
    last = [(run.record.get("runs") or [{}])[-1] for run in runs]
    for title, key in (("Flags", "flags"), ("Versions", "versions"), ("Data", "data")):
        leaves = [flat(start.get(key) or {}) for start in last]
        if any(leaves):
            parts.append(f"<h2>{title}</h2>" + table(names, {k: [f.get(k, "") for f in leaves]
                                                             for k in dict.fromkeys(k for f in leaves for k in f)}))
    for run in runs:
        parts.append(f"<h2>Starts{f' of {html.escape(run.name)}' if len(runs) > 1 else ''}</h2>")
        if not run.record.get("runs"):
            parts.append("<p>There is no run.json, so nothing is known of flags and versions.</p>")
            continue
        for start in run.record["runs"]:
            words = flat({k: v for k, v in start.items() if k not in ("flags", "versions", "data", "argv")})
            diff = words.pop("git.diff", "")
            words["command"] = " ".join(start.get("argv") or ())
            parts.append(table([""], {k: [v] for k, v in words.items() if v not in ("", "null")}))
            changes = f"<details><summary>uncommitted changes</summary><pre>{html.escape(diff)}</pre></details>"
            parts.append(changes if diff else "")
        end = run.record.get("finished")
        parts.append(f"<p>{'Not finished.' if end is None else f'Finished at step {end}.'}</p>")
    title = html.escape(" · ".join(names))
    head = f'<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    return "\n".join(["<!doctype html>", head, f"<h1>{title}</h1>", *parts, "</html>\n"])


def write(outs: Sequence[str | Path], to: str | Path | None = None) -> tuple[Path, Path]:
    """Read runs, and write report.png and report.html into `to` (by default the first run's directory); the two files.

    The same runs give the same bytes. Raises what `read` raises.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as out:
    ...     _ = Path(out, "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}')
    ...     [file.name for file in write([out])]
    ['report.png', 'report.html']
    """
    runs = [read(out) for out in outs]
    figure, to = draw(runs), Path(outs[0] if to is None else to)
    to.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xtf"}):
        figure.savefig(buffer := io.StringIO(), format="svg", transparent=True,
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    svg = svg.replace(INK, "currentColor")
    figure.savefig(to / "report.png", dpi=130, transparent=True)
    (to / "report.html").write_text(page(runs, svg), encoding="utf-8")
    return to / "report.png", to / "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the two files and say where; 1, after a line on stderr, where a directory is not a run's."""
    parser = argparse.ArgumentParser(prog="python -m xtf.report",
                                     description="Draw runs as report.png and report.html.")
    parser.add_argument("out", nargs="+", help="--out directories of runs; several are drawn over each other")
    parser.add_argument("--to", help="where to write (default: the first of them)")
    args = parser.parse_args(argv)
    try:
        print(*write(args.out, args.to), sep="\n")
    except (ValueError, OSError) as e:
        print(f"xtf.report: {e}", file=sys.stderr)
        return 1
    return 0
