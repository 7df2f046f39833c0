"""How the house stands: arrows point one way, names mean one thing, the README's map names every file."""
import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [p for p in sorted((ROOT / "xtf").rglob("*.py")) if "recipes" not in p.parts]

# A room may import from those before it, and from its own files. A file at the root is a room; `xtf` is its __init__.
ROOMS = """
    tree lock layout spec device kernels ops transform
    data parallel grad moe flops nn optim state _shard xtf
    transforms hf models gguf
    peft checkpoint testing parity plan cli run report
""".split()


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(p): p for p in FILES}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def imports(path: Path) -> set[str]:
    """The modules of xtf that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xtf":
            whole = [f"{node.module}.{a.name}" for a in node.names]
            found |= {name if name in MODULES else node.module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "xtf"}
    return found - {module(path)}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_arrows_point_down(path):
    here = room(module(path))
    for name in imports(path):
        assert name in MODULES, f"{path}: {name} is no module of ours"
        assert room(name) == here or ROOMS.index(room(name)) < ROOMS.index(here), f"{path}: {here} imports {name}"


def test_no_circle_within_a_room():
    graph = {name: {other for other in imports(path) if room(other) == room(name)} for name, path in MODULES.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    # a package's __init__ imports its files, and these import each other, not it
    assert not graph, f"a circle among {sorted(graph)}"


def rows() -> dict[str, int]:
    """The files and folders that the README's map names, each with the number of the last row that does."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Where things are"):text.index("## Read on")]
    named = {}
    for number, row in enumerate(line for line in table.splitlines() if line.startswith("|")):
        words = re.findall(r"`([\w/.]+)`", row)                      # `folder/`: file, file, ... in one row
        for word in words:
            named[word if word.startswith(("xtf/", "recipes/")) else words[0] + word] = number
    return named


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=module)
def test_each_row_of_the_map_uses_those_above_it(path):
    named = rows()
    at = lambda p: named[str(p.relative_to(ROOT)).replace("__init__.py", "")]
    for name in imports(path) - {"xtf"}:
        assert at(MODULES[name]) <= at(path), f"{name} stands in a row below {module(path)}'s"


def test_the_root_is_small_and_the_map_names_every_file():
    assert len(list((ROOT / "xtf").glob("*.py"))) <= 20
    named = rows()
    files = [str(p.relative_to(ROOT)) for p in FILES if p.name != "__init__.py"]
    missing = [name for name in files if name not in named]
    assert not missing, f"README.md, Where things are, names no {missing}"
    assert not [name for name in named if not (ROOT / name).exists()]


def test_no_public_function_has_the_name_of_a_module():
    """`from xtf.parallel import mesh` would be the one or the other by the order of imports: such a file is called
    `_mesh.py`."""
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            continue
        exported = {a.asname or a.name: node.module for node in ast.parse(path.read_text()).body
                    if isinstance(node, ast.ImportFrom) for a in node.names}
        for public, source in exported.items():
            beside = f"{name}.{public}"
            assert beside not in MODULES or source == name, f"{path}: {public} hides {beside}: call it _{public}.py"


ORDERS = """
import importlib, os, pickle, random, sys, types
modules, orders = sys.argv[1].split(","), int(sys.argv[2])

def check():
    for package in [m for m in list(sys.modules) if m.split(".")[0] == "xtf" and hasattr(sys.modules[m], "__all__")]:
        for name in sys.modules[package].__all__:
            module = f"{package}.{name}"
            public = getattr(sys.modules[package], name)
            assert isinstance(public, types.ModuleType) == (module in modules), f"{module} is {public!r}"
        if package == "xtf":
            from xtf.parallel import mesh as M
            assert M(dp=1) is None

# What a first child imports of other packages, this process imports too, once for all the others.
here, there = os.pipe()
if os.fork() == 0:
    for name in modules:
        importlib.import_module(name)
    found = [name for name in sys.modules if name.split(".")[0] != "xtf"]
    with open(there, "wb") as file:
        pickle.dump(found, file)
    os._exit(0)
os.close(there)
with open(here, "rb") as file:
    for name in pickle.load(file):
        try:
            importlib.import_module(name)
        except ImportError:                 # made by another module as it runs
            pass
assert not [name for name in sys.modules if name.split(".")[0] == "xtf"]

for seed in range(orders):
    if (child := os.fork()) == 0:
        order = list(modules)
        random.Random(seed).shuffle(order)
        for name in order:
            importlib.import_module(name)
            if name.count(".") < 2:
                check()
        check()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"order {seed} failed")
"""


def test_names_mean_the_same_in_any_order_of_imports():
    names = [m for m in MODULES if not m.endswith("__main__")]
    argv = [sys.executable, "-c", ORDERS, ",".join(names), "8"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("word, place", [
    ("permute", "xtf/parallel/_ep.py"), ("unpermute", "xtf/moe.py"), ("capacity", "xtf/parallel/_ep.py"),
    ("unshard", "xtf/parallel/_fsdp.py"), ("all-gather", "xtf/parallel/_fsdp.py"),
    ("grouped GEMM", "xtf/kernels/experts.py"),
    ("all-to-all", "xtf/parallel/_ulysses.py"), ("ZeRO", "xtf/parallel/_fsdp.py"), ("all-reduce", "xtf/_shard.py")])
def test_the_fields_words_find_the_place(word, place):
    assert word in (ROOT / place).read_text()


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest passes over folders called dist, build and so on, unless told otherwise; ours has tests/dist."""
    files = [*(ROOT / "tests").rglob("test_*.py"), *FILES]                          # doctests too
    folders = {part for p in files for part in p.relative_to(ROOT).parts[:-1]}
    patterns = pytestconfig.getini("norecursedirs")
    assert not [name for name in folders for pattern in patterns if fnmatch.fnmatch(name, pattern)]
