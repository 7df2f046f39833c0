"""The pages are true: their Python runs and prints what they say, their commands parse, and what they name exists.

Fences: `python` runs in the page's one namespace, in order; `python ranks=N` runs on N real ranks, each with a copy of
that namespace; `text` after either is what it prints (on rank 0); `sh` is checked, not run.
"""
import contextlib
import dataclasses
import importlib.util
import io
import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

from xtf import cli, parity, plan, report
from xtf.layout import parse_mesh
from xtf.testing import pool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


class Fence(NamedTuple):
    kind: str                   # what follows the backticks
    text: str
    line: int                   # its first line in the page


def fences(page: Path) -> list[Fence]:
    text = page.read_text()
    return [Fence(m[1].strip(), m[2], text[:m.start(2)].count("\n") + 1)
            for m in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)]


def prose(page: Path) -> str:
    return re.sub(r"^```(?:.*\n)*?```$", "", page.read_text(), flags=re.M)


# ---- Python ----------------------------------------------------------------------------------------------------------

def execute(source: str, name: str, namespace: dict) -> str:
    """Run a block; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), namespace)
    return out.getvalue()


@PAGE
def test_python_runs_and_prints_what_the_page_says(page):
    namespace, printed = {"__name__": page.stem.replace("-", "_")}, ""
    for kind, text, line in fences(page):
        source = "\n" * (line - 1) + text                                    # so that a traceback names the page's line
        if kind == "python":
            printed = execute(source, str(page), namespace)
        elif ranks := re.fullmatch(r"python ranks=(\d+)", kind):
            given = {k: v for k, v in namespace.items() if k != "__builtins__"}
            printed = pool(int(ranks[1])).run(execute, source, str(page), given)[0]
        elif kind == "text":
            assert text == printed, f"{page}:{line}: the block before prints\n{printed}"
        else:
            assert kind == "sh", f"{page}:{line}: a fence of kind {kind!r}; the kinds are in this file's docstring"


def test_the_readmes_step_is_the_recipes():
    step = re.search(r"^def train_step.*?^    return .*?\n", (ROOT / "README.md").read_text(), re.M | re.S)
    assert step
    indented = re.sub(r"^(?=.)", "    ", step[0], flags=re.M)
    for name in ("qwen3_sft", "llama_sft", "qwen3_pretrain"):
        assert indented in (ROOT / "recipes" / f"{name}.py").read_text()


# ---- commands --------------------------------------------------------------------------------------------------------

def check(command: str, file: Path) -> None:
    """Raise unless what the command calls exists and takes these flags; `file` stands for every file and directory of
    the user's."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert targets and words[1:] and set(words[1:]) <= set(targets[1].split()), command
    elif words[:3] == ["python", "-m", "xtf.parity"]:
        # an unknown flag exits with 2
        assert parity.main([str(file.parent / "missing") if w == "DIR" else w for w in words[3:]]) == 1
    elif words[:3] == ["python", "-m", "xtf.report"]:
        assert report.main([str(file.parent / "missing") if w == "OUT" else w for w in words[3:]]) == 1
    elif words[:3] == ["python", "-m", "xtf.plan"]:
        flags = tyro.cli(plan.Flags, args=words[3:])
        assert flags.world % math.prod(parse_mesh(flags.mesh).values()) == 0, command
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).is_file() and len(words) == 2, command
    elif words[0] in ("python", "torchrun"):
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        assert words[at].startswith("recipes/") and (ROOT / words[at]).is_file(), command
        spec = importlib.util.spec_from_file_location("recipe", ROOT / words[at])
        assert spec and spec.loader
        spec.loader.exec_module(recipe := importlib.util.module_from_spec(spec))
        kind = getattr(recipe, "Flags", cli.Flags)
        flags = cli.parse(kind, [str(file.parent) if words[i - 1] == "--model" else words[i]
                                 for i in range(at + 1, len(words))])
        ranks = math.prod(parse_mesh(flags.mesh).values())
        assert words[1:at] == ([] if words[0] == "python"
                               else ["--nproc_per_node", str(ranks)]), f"{command}: the mesh has {ranks} ranks"
    else:
        assert words == ["source", ".venv/bin/activate"], f"{command}: not a command that these pages may use"


@PAGE
def test_commands_exist_and_take_their_flags(page, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for fence in fences(page):
        for command in fence.text.splitlines() if fence.kind == "sh" else ():
            check(command, file)


@pytest.mark.parametrize("wrong",
                         ["make coffee", "python -m xtf.parity DIR --tolerance 1", "python recipes/gpt_sft.py --out o",
                          "python recipes/qwen3_sft.py --model m --data d --out o --tokens 3", "rm -r runs",
                          "torchrun --nproc_per_node 2 recipes/qwen3_sft.py --model m --data d --out o --mesh dp=4"])
def test_a_command_that_is_wrong_is_noticed(wrong, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises((AssertionError, SystemExit)):
        check(wrong, file)


def test_the_readme_starts_with_the_two_commands_and_lists_every_flag():
    readme = ROOT / "README.md"
    assert fences(readme)[0].text.splitlines() == ["make demo", "make test"]
    rows = re.findall(r"^\| (`--.*?) \|", readme.read_text(), re.M)
    fields = {*(field.name for field in dataclasses.fields(cli.BiasFlags)), "mtp_weight"}
    assert sorted(re.findall(r"--([a-z0-9-]+)", " ".join(rows))) == sorted(name.replace("_", "-") for name in fields)


# ---- names -----------------------------------------------------------------------------------------------------------

class Collected:
    """A pytest plugin that keeps what was collected."""
    def pytest_collection_finish(self, session):
        self.items = [item.nodeid.split("[")[0] for item in session.items if not list(item.iter_markers("skip"))]


def test_the_tests_that_pages_name_are_run_by_make_test(capfd):
    named = {(page, name) for page in PAGES for name in re.findall(r"`(tests/\S+\.py::\w+)`", page.read_text())}
    collected = Collected()
    # the whole folder, as `make test` collects it: by their names even tests would be found that it passes over
    pytest.main(["--collect-only", "-q", f"--rootdir={ROOT}", str(ROOT / "tests")], plugins=[collected])
    assert len(named) > 30 and not [f"{page}: {name}" for page, name in named if name not in collected.items]


@PAGE
def test_files_and_links_exist(page):
    text = prose(page)
    for path in re.findall(r"`((?:xtf|tests|recipes|docs|benchmarks)/[\w/.-]+)(?:::\w+)?`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        assert (page.parent / target).exists(), f"{page}: {link}"
        headings = re.findall(r"^#+ (.*)$", prose(page.parent / target), re.M) if anchor else ()
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                                        for h in headings], f"{page}: {link}"
