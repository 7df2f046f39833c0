"""The recipes run from an installed wheel, from a source distribution and from an editable install, and are the files
of recipes/."""
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.name for p in (ROOT / "recipes").glob("*.py"))


def python(*words, cwd, path=()):
    """Standard output of a Python that has what is installed here except xtf (whose .pth file is not read), and `path`
    before it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, sysconfig.get_path("purelib")))),
            "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-S", "-P", *words], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a build reads: builds leave files beside what they build."""
    root = tmp_path_factory.mktemp("source")
    for name in ("xtf", "recipes"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
OPTIONS = ("--no-deps", "--no-build-isolation", "--no-index")


def members(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def ran(folder, begin):
    """`python -m xtf.recipes.qwen3_sft --help` with what is installed in folder/site: it is understood; the file that
    ran."""
    code = f"""{begin}import runpy, sys
from importlib.util import find_spec
print(find_spec("xtf.recipes.qwen3_sft").origin)
sys.argv[1:] = ["--help"]
runpy.run_module("xtf.recipes.qwen3_sft", run_name="__main__", alter_sys=True)"""
    file, *said = python("-c", code, cwd=folder, path=[folder / "site"]).splitlines()
    assert "Fine-tune a Qwen3" in "".join(said) and "--batch-tokens" in "".join(said)
    return Path(file).resolve()


def test_a_wheel_holds_the_recipes_and_they_run(source, tmp_path):
    python(*PIP, "wheel", *OPTIONS, "-w", tmp_path, str(source), cwd=tmp_path)
    [wheel] = tmp_path.glob("xtf-*.whl")
    found = members(wheel)
    for name in RECIPES:
        assert found[f"xtf/recipes/{name}"] == (ROOT / "recipes" / name).read_bytes()
    assert {name.split("/")[0].partition("-")[0] for name in found} == {"xtf"}           # no second copy, no tests
    python(*PIP, "install", *OPTIONS, "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    assert ran(tmp_path, "") == tmp_path / "site" / "xtf" / "recipes" / "qwen3_sft.py"


def test_a_source_distribution_makes_the_same_wheel(source, tmp_path):
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    python("-c", build, str(tmp_path), cwd=source)
    [archive] = tmp_path.glob("xtf-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    wheels = []
    for root, folder in ((source, tmp_path / "one"), (unpacked, tmp_path / "two")):
        python(*PIP, "wheel", *OPTIONS, "-w", folder, str(root), cwd=tmp_path)
        wheels.append(members(next(folder.glob("*.whl"))))
    code = [{k: v for k, v in wheel.items() if k.startswith("xtf/")} for wheel in wheels]
    assert code[0] == code[1] and len(code[0]) > 40


def test_an_editable_install_runs_the_files_of_the_checkout(source, tmp_path):
    build = "import sys, setuptools.build_meta as b; print(b.build_editable(sys.argv[1]))"
    python("-c", build, str(tmp_path), cwd=source)
    [wheel] = tmp_path.glob("xtf-*.whl")
    python(*PIP, "install", *OPTIONS, "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    # reads the .pth file, as an environment's start does
    begin = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
    assert ran(tmp_path, begin) == source / "recipes" / "qwen3_sft.py"
