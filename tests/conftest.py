"""Shared by the tests. The demo's base is the small model that they train on."""

import gc
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and none may wait for it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small lose by a second thread

import pytest
import torch

from qlora_min.demo import world
from qlora_min.system import console

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

console.TOLD_SECONDS = 3600  # a busy machine adds no lines to stderr
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """gc.collect(), which device.release calls several times a run, looks only at what this file's tests make.

    Going through everything that torch and transformers have imported took a quarter of a second each time.
    """
    gc.collect()
    gc.freeze()


def assert_same(a, b, path: str = "") -> None:
    """Nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert repr(a) == repr(b), path  # exact, and NaN is NaN


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> tuple[Path, Path]:
    """The demo's (training, held-out) files."""
    return world.write_data(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's folder, for tests marked `real`."""
    folder = os.environ.get("QLORA_MIN_SMOLLM2")
    if not folder or not (Path(folder) / "model.safetensors").is_file():
        pytest.skip(
            f"QLORA_MIN_SMOLLM2 is {folder!r}, expected a folder with SmolLM2-135M-Instruct's model.safetensors"
        )
    return Path(folder)


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(rows, name="rows.jsonl") -> path of a file with one JSON object a line."""

    def write(rows: list, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def process(tmp_path):
    """process("train.py", "--demo", ...) -> the finished process, run in tmp_path."""

    def run(name: str, *args: object, expect: int | None = 0, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, **kwargs)
        assert expect is None or done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """As `process`, but within this one: the imports, several seconds, are paid once."""

    def run(name: str, *args: object, expect: int | None = 0, input: str = "") -> SimpleNamespace:
        path = str(ROOT / "scripts" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        out, err = capsys.readouterr()
        assert expect is None or end.value.code == expect, f"{name} {args}\n{out}\n{err}"
        return SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err)

    return run
