"""The pages are true: their Python runs and prints what they say, their commands parse, and what they name exists.

Fences: `python` runs in the page's one namespace, in order; `python ranks=N` runs on N real ranks, each with a copy of that namespace;
`text` after either is what it prints (on rank 0); `sh` is checked, not run.
"""
import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from xtf import cli, parity
from xtf.testing import pool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


class Fence(NamedTuple):
    kind: str                   # the line after the backticks
    text: str
    line: int                   # its first line in the page


def fences(page: Path) -> list[Fence]:
    text = page.read_text()
    return [Fence(m[1].strip(), m[2], text[:m.start(2)].count("\n") + 1) for m in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)]


def execute(source: str, name: str, namespace: dict) -> str:
    """Run a block; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), namespace)
    return out.getvalue()


def on_rank(source: str, name: str, namespace: dict) -> str:
    return execute(source, name, namespace)


@PAGE
def test_python_runs_and_prints_what_the_page_says(page):
    namespace, printed = {"__name__": page.stem.replace("-", "_")}, ""
    for kind, text, line in fences(page):
        source, name = "\n" * (line - 1) + text, str(page)
        if kind == "python":
            printed = execute(source, name, namespace)
        elif ranks := re.fullmatch(r"python ranks=(\d+)", kind):
            given = {k: v for k, v in namespace.items() if k != "__builtins__"}
            printed = pool(int(ranks[1])).run(on_rank, source, name, given)[0]
        elif kind == "text":
            assert text == printed, f"{page}:{line}: the block before prints\n{printed}"
        else:
            assert kind == "sh", f"{page}:{line}: a fence of kind {kind!r}; see this file's head"
