"""A small real dataset that every machine has: questions about the Python standard library, answered by its docstrings.

    python -m xtf.data.stdlib_qa OUT_DIR        # writes OUT_DIR/train.jsonl and OUT_DIR/heldout.jsonl

Nothing is imported: the files are parsed. Whole top-level modules are held out, so that held-out answers are about code
never seen.
"""
import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTIONS = ("What does Python's `{}` do?", "Explain `{}` from the Python standard library in a sentence or two.",
             "What is `{}` in Python for?", "In Python, what is the purpose of `{}`?")
# besides private names
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def documented(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the public functions, classes and methods below a folder, in a fixed order."""
    for file in sorted(stdlib.rglob("*.py")):
        parts = file.relative_to(stdlib).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or SKIPPED & set(parts) or any(p.startswith("_") or not p.isidentifier() for p in parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in others' strings
            try:
                module = ast.parse(file.read_bytes())
            except SyntaxError:
                continue
        yield from _definitions(module, ".".join(parts))


def _definitions(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}.{child.name}")


def first_paragraph(docstring: str) -> str | None:
    """The docstring's first paragraph on one line; None if it has under 20 or over 400 characters, or is no prose.

    >>> first_paragraph("Remove common leading\\n    white space.\\n\\n    More.")
    'Remove common leading white space.'
    >>> first_paragraph("See above:") is None
    True
    """
    paragraph = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip())[0].split())
    prose = paragraph.isprintable() and ">>>" not in paragraph and not paragraph.endswith((":", ","))
    return paragraph if prose and 20 <= len(paragraph) <= 400 else None


def held_out(name: str) -> bool:
    """Whether the top-level module of a qualified name is among the held-out tenth, by a hash of the module's name.

    >>> held_out("zipfile.ZipFile.namelist"), held_out("textwrap.dedent")
    (True, False)
    """
    return hashlib.sha256(b"held out: " + name.partition(".")[0].encode()).digest()[0] < 26


def records(stdlib: str | Path | None = None) -> tuple[list[dict], list[dict]]:
    """(training, held-out) records `{"messages": [user, assistant]}`, the same on every run, names and answers once."""
    train, held, seen = [], [], set()
    for name, docstring in documented(Path(stdlib or sysconfig.get_path("stdlib"))):
        answer = first_paragraph(docstring)
        if answer is None or answer in seen or name in seen:
            continue
        seen |= {answer, name}
        question = QUESTIONS[hashlib.sha256(name.encode()).digest()[0] % len(QUESTIONS)].format(name)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (held if held_out(name) else train).append({"messages": messages})
    return train, held


def main(out: str) -> None:
    """Write train.jsonl and heldout.jsonl to a folder, and print how many records each has."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in zip(("train.jsonl", "heldout.jsonl"), records(), strict=True):
        with open(folder / file, "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{folder / file}: {len(rows):,} conversations, {sum(len(r['messages'][1]['content']) for r in rows):,} "
              "characters of answers")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m xtf.data.stdlib_qa OUT_DIR")
    main(sys.argv[1])
