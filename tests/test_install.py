"""Installing: nothing is asked for that Colab does not have, and the wheel holds all that the package needs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(extra: str) -> list[Requirement]:
    """Those of `pip install 'qlora_min[extra]'`, and bitsandbytes' own."""
    theirs = [r for r in importlib.metadata.requires("bitsandbytes") if "extra ==" not in r]
    return [Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS[extra], *theirs]]


@pytest.mark.real
@pytest.mark.parametrize("extra", EXTRAS)
def test_colab_has_what_we_ask_for(extra):
    """Of what Colab has no version is too old: pip adds bitsandbytes, and with some extras other packages, and leaves
    the rest as it is."""
    lines = (SHARED / "colab" / "pip-freeze.gpu.txt").read_text().splitlines()
    has = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    assert len(has) > 500
    wanted = requirements(extra)
    too_old = [str(r) for r in wanted if (v := has.get(canonicalize_name(r.name))) and not r.specifier.contains(v)]
    assert not too_old
    if extra == "plot":
        assert {r.name for r in wanted if canonicalize_name(r.name) not in has} == {"bitsandbytes"}


def test_the_pythons_are_named():
    """Those that .ci/run and scripts/README.md name."""
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in named
    assert PROJECT["requires-python"] == f">={min(named, key=lambda v: int(v.partition('.')[2]))}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    made = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder, ROOT], capture_output=True, text=True, timeout=300
    )
    if "No matching distribution found for setuptools" in made.stdout + made.stderr:
        pytest.skip("setuptools can't be had")
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    assert len([*folder.glob("*.tar.gz")]) == 1
    return path


@pytest.mark.slow
def test_the_wheel_trains_the_demo(wheel, tmp_path):
    """Installed beside this environment's packages, far from the clone."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True, timeout=300)
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    options = ["--demo", "--max-steps", "2", "--eval-limit", "20", "--output-dir", "run"]
    code = "import sys, qlora_min.cli.main as m; print(m.__file__); sys.exit(m.main())"
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-I", "-c", code, "train", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout and "done: 2 steps" in done.stdout
    assert (tmp_path / "run" / "adapter" / "README.md").exists()  # from the card's template
