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


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """As pip makes it of a checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    python(*PIP, "wheel", *OPTIONS, "-w", folder, str(source), cwd=folder)
    [wheel] = folder.glob("xtf-*.whl")
    return wheel


def built(what, folder, root):
    """What the build backend makes in `folder` of the sources in `root`, as pip calls it but without pip."""
    python("-c", f"import sys, setuptools.build_meta as b; b.build_{what}(sys.argv[1])", str(folder), cwd=root)
    [made] = folder.glob("xtf-*")
    return made


def test_a_wheel_holds_the_recipes_and_they_run(wheel, tmp_path):
    found = members(wheel)
    for name in RECIPES:
        assert found[f"xtf/recipes/{name}"] == (ROOT / "recipes" / name).read_bytes()
    assert {name.split("/")[0].partition("-")[0] for name in found} == {"xtf"}           # no second copy, no tests
    python(*PIP, "install", *OPTIONS, "--no-compile", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    assert ran(tmp_path, "") == tmp_path / "site" / "xtf" / "recipes" / "qwen3_sft.py"


def test_a_source_distribution_makes_the_same_wheel(source, wheel, tmp_path):
    archive = built("sdist", tmp_path, source)
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    other = built("wheel", tmp_path / "two", unpacked)
    code = [{k: v for k, v in members(file).items() if k.startswith("xtf/")} for file in (wheel, other)]
    assert code[0] == code[1] and len(code[0]) > 40


def test_an_editable_install_runs_the_files_of_the_checkout(source, tmp_path):
    with zipfile.ZipFile(built("editable", tmp_path, source)) as file:     # pip would do no more to a .pth file
        file.extractall(tmp_path / "site")
    # reads the .pth file, as an environment's start does
    begin = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
    assert ran(tmp_path, begin) == source / "recipes" / "qwen3_sft.py"
