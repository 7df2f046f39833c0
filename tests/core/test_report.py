"""The report against its rows: figures recomputed from the file by other means, curves as they are drawn, and a page
that stands alone."""
import json
import math
import random
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from xtf import report

SKIPPED = {40: None, 41: 55.0, 77: 30.0}                         # step: loss


def make(out, seed=0, steps=90, mix=True, **flags):
    """A run's directory, as log and run write it."""
    rng, skipped = random.Random(seed), 0
    rows = [{"step": 0, "eval_loss": 5.5}]
    for s in range(1, steps + 1):
        skipped += s in SKIPPED
        tokens = 4000 + rng.randrange(90)
        row = {"step": s, "loss": SKIPPED.get(s, 2 + 3 * math.exp(-s / 20) + rng.gauss(0, 0.05)),
               "grad_norm": None if s == 40 else 1 + rng.random(), "lr": 1e-4 * min(1, s / 10),
               "skipped": float(skipped), "in_a_row": float(s in SKIPPED), "tokens": tokens,
               "tokens_per_s": 100.0 if s == 1 else 900 + 50 * rng.random(), "mfu": 0.4 + 0.01 * rng.random(),
               "memory_gb": 1 + s / 100,
               "balance": 0.5}
        if mix:
            row |= {"mix/web": 3000, "mix/code": tokens - 3000} if s % 2 else {"mix/web": tokens}
        rows.append(row)
        rows += [{"step": s, "eval_loss": 2.1 + 3 * math.exp(-s / 20)}] if s % 30 == 0 else []
    out.mkdir()
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"started": "2026-01-02T03:04:05+00:00", "argv": ["sft.py", "--lr", "<1e-4>"],
             "flags": {"lr": 1e-4, "mesh": "dp=2"} | flags, "versions": {"torch": "2.13.0"},
             "git": {"commit": "c0ffee", "diff": "-<old>"}, "host": "node1", "mesh": "dp=2",
             "data": {"chats.jsonl": {"size": 7}}, "resumed_from": None}
    again = start | {"resumed_from": f"{out}/checkpoints/30", "host": "node2"}
    (out / "run.json").write_text(json.dumps({"runs": [start, again], "finished": None}))
    return rows


class Page(HTMLParser):
    """The text of each table's rows, and every tag with its attributes."""
    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self.cell = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data


def page(file):
    return Page(file.read_text())


def numbers(table):
    return {cells[0]: [float(c.replace(",", "")) if c else None for c in cells[1:]] for cells in table if cells[1:]
            and cells[0]}


def test_the_figures_on_the_page_are_those_of_the_rows(tmp_path):
    rows = make(tmp_path / "a")
    of = lambda name: [row[name] for row in rows if row.get(name) is not None]
    taken = lambda name: [row[name] for row in rows if name in row and row["step"] not in SKIPPED]
    found = numbers(page(report.write([tmp_path / "a"])[1]).tables[0])
    want = {
        "last step": 90, "tokens": sum(of("tokens")),
        "hours in steps": sum(t / s for t, s in zip(of("tokens"), of("tokens_per_s"), strict=True)) / 3600,
        "loss, mean of the last 20 steps": statistics.fmean(taken("loss")[-20:]),
        "held-out loss, first": 5.5, "held-out loss, lowest": min(of("eval_loss")),
        "held-out loss, last": of("eval_loss")[-1],
        "gradient norm, median": statistics.median(taken("grad_norm")),
        "gradient norm, largest": max(taken("grad_norm")),
        "tokens/s, median": statistics.median(of("tokens_per_s")[1:]),
        "MFU %, median": 100 * statistics.median(of("mfu")[1:]),
        "memory GB, peak": 1.9, "skipped steps": 3, "tokens from web": sum(of("mix/web")),
        "tokens from code": sum(of("mix/code"))}
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name][0] == pytest.approx(value, rel=1e-5), name       # six digits are shown
    assert sum(of("mix/web")) + sum(of("mix/code")) == sum(of("tokens"))


def test_the_curves_are_the_rows(tmp_path):
    rows = make(tmp_path / "a")
    axes = {a.get_title("left").strip(): a for a in report.draw([report.read(tmp_path / "a")]).axes}
    assert list(axes) == ["Loss", "Gradient norm", "Learning rate", "Throughput", "MFU", "Memory", "balance",
                          "Data mix"]
    units = {name: [t.get_text() for t in a.texts] for name, a in axes.items()}
    assert "nats per token" in units["Loss"] and "GB, the most so far" in units["Memory"]
    assert "tokens/s, no padding" in units["Throughput"]
    assert all(a.get_xlabel() == "step" for a in axes.values())
    raw, smoothed, held_out, skipped = (line.get_xydata() for line in axes["Loss"].lines)
    nan = lambda value: math.nan if value is None else value
    np.testing.assert_array_equal(raw, [(r["step"], nan(r["loss"])) for r in rows if "loss" in r])
    np.testing.assert_array_equal(held_out, [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r])
    assert skipped[:, 0].tolist() == sorted(SKIPPED)
    assert np.abs(np.diff(smoothed[:, 1])).max() < 0.5                       # the skipped steps are no part of it
    assert axes["Loss"].get_ylim()[1] < 7 and "2 beyond, up to 55" in units["Loss"]
    np.testing.assert_allclose(axes["MFU"].lines[0].get_ydata(), [100 * r["mfu"] for r in rows if "mfu" in r],
                               rtol=1e-15)
    assert axes["Throughput"].get_ylim()[0] == 0


def test_the_mix_is_the_share_of_each_source(tmp_path):
    rows = make(tmp_path / "a")
    mix = next(a for a in report.draw([report.read(tmp_path / "a")]).axes if a.get_title("left") == "Data mix")
    web, code = (band.get_paths()[0].vertices for band in mix.collections)
    inner = lambda band: band[(band[:, 0] > 20) & (band[:, 0] < 70), 1]
    assert max(inner(web)) == pytest.approx(100 * (3000 / 4045 + 1) / 2,
                                            abs=3) and max(code[:, 1]) == pytest.approx(100)
    share = sum(r["mix/web"] for r in rows if "mix/web" in r) / sum(r.get("tokens", 0) for r in rows)
    assert [t.get_text() for t in mix.texts if "%" in t.get_text()][:1] == [f"web  {share:.0%}"] and 0.8 < share < 0.9


def test_several_runs_lie_over_each_other_and_flags_that_differ_are_marked(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", seed=1, steps=50, mix=False, lr=3e-4)
    png, html = report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert png.parent == tmp_path / "both" and not (tmp_path / "a" / "report.png").exists()
    figure = report.draw([report.read(tmp_path / "a"), report.read(tmp_path / "b")])
    told = [t.get_text() for t in figure.legends[0].texts]
    assert told == [str(tmp_path / "a"), str(tmp_path / "b"), "each step", "held out", "skipped step"]
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert len(colors) == 2
    found = page(html)
    assert numbers(found.tables[0])["last step"] == [90, 50] and numbers(found.tables[0])["tokens from code"][1] is None
    flags = found.tables[1]
    assert ["lr", "0.0001", "0.0003"] in flags and ["mesh", "dp=2", "dp=2"] in flags
    assert [attrs.get("class") for tag, attrs in found.tags if tag == "tr"].count("differs") == 1


def test_the_page_says_what_made_the_run_and_stands_alone(tmp_path):
    make(tmp_path / "a")
    file = report.write([tmp_path / "a"])[1]
    text, found = file.read_text(), page(file)
    assert "MFU = FLOPs / seconds" in found.text and "Not finished." in found.text
    cells = [row for table in found.tables for row in table]
    for row in (["torch", "2.13.0"], ["chats.jsonl.size", "7"], ["command", "sft.py --lr <1e-4>"],
                ["git.commit", "c0ffee"], ["host", "node2"], ["resumed_from", f"{tmp_path}/a/checkpoints/30"]):
        assert row in cells, row
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "old"}  # <old> is text of the diff
    references = [v for _, attrs in found.tags for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
    assert references and all(v.startswith("#") for v in references) and not re.search(r"@import|url\((?!#)", text)
    assert report.INK not in text and "currentColor" in text                 # one ink for light and dark


def test_the_same_run_gives_the_same_bytes_and_a_picture_of_some_size(tmp_path):
    make(tmp_path / "a")
    png, html = report.write([tmp_path / "a"])
    first = png.read_bytes(), html.read_bytes()
    report.write([tmp_path / "a"])
    assert (png.read_bytes(), html.read_bytes()) == first
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert pixels.shape[1] == 1560 and pixels[0, -1, 3] == 0                 # transparent, on light and on dark
    assert (pixels[..., 3] > 0).mean() > 0.05


@pytest.mark.parametrize("columns", [["loss"], ["loss", "lr"], ["loss", "lr", "x"],
                                     ["loss", "grad_norm", "lr", "mfu", "x", "y", "z"]])
def test_any_columns_have_a_place(tmp_path, columns):
    for steps in (1, 3):
        rows = [{"step": s} | dict.fromkeys(columns, 1.5) for s in range(1, steps + 1)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        report.write([tmp_path])
        assert len(report.draw([report.read(tmp_path)]).axes) == len(columns)


def test_a_live_run_and_one_without_run_json(tmp_path):
    rows = make(tmp_path / "a")
    whole = report.read(tmp_path / "a")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 91, "loss": 2.')
    live = report.read(tmp_path / "a")
    last = next(r["loss"] for r in reversed(rows) if "loss" in r)
    assert live["loss"].tolist()[-1] == whole["loss"].tolist()[-1] == last
    (tmp_path / "a" / "run.json").unlink()
    assert "There is no run.json" in report.write([tmp_path / "a"])[1].read_text()


@pytest.mark.parametrize("text,message", [
    ('{"step": 1, "loss": 2}\nnonsense\n{"step": 2, "loss": 2}\n', "metrics.jsonl, line 2"),
    ('{"loss": 2}\n', "line 1"), ("[1]\n", "line 1"),
    ('{"step": 1, "loss": "low"}\n', "line 1"), ("", "no step"), ('{"step": 0, "eval_loss": 2}\n', "no step")])
def test_what_is_no_run_is_named(tmp_path, capsys, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert report.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert message in said and str(tmp_path) in said and len(said.splitlines()) == 1
    assert report.main([str(tmp_path
                            / "missing")]) == 1 and "missing/metrics.jsonl: no such file" in capsys.readouterr().err


def test_smoothing_is_a_weighted_mean_of_both_sides():
    rng = np.random.default_rng(0)
    values = rng.normal(size=300)
    values[[3, 50, 299]] = np.nan, np.inf, np.nan
    weights = 0.5 ** (np.abs(np.subtract.outer(np.arange(300), np.arange(300))) / 3) * np.isfinite(values)
    want = weights @ np.where(np.isfinite(values), values, 0) / weights.sum(1)
    np.testing.assert_allclose(report.smooth(values), want, rtol=1e-9)
    assert np.isnan(report.smooth(np.full(4, np.nan))).all()


def test_thinning_keeps_every_extreme():
    y = np.random.default_rng(0).normal(size=100_003)
    y[[7, 70_000, 5]] = 99, -99, np.nan
    x, thinned = report.thin(np.arange(len(y)), y, bins=200)
    assert len(x) <= 400 and (np.diff(x) > 0).all() and (thinned == y[x]).all()
    for k in range(200):
        a, b = len(y) * k // 200, len(y) * (k + 1) // 200
        kept = thinned[(x >= a) & (x < b)]
        assert (kept.min(), kept.max()) == (np.nanmin(y[a:b]), np.nanmax(y[a:b]))
