"""The notebooks run from top to bottom, as they stand: here on a CPU, where they train the demo."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import pytest
from conftest import ROOT

COLAB, COURSE = ROOT / "scripts" / "colab.ipynb", ROOT / "scripts" / "course.ipynb"
SAID = {  # what a reader should see in a notebook that ran
    COLAB: ("no GPU here", "<b style='color:#1a9850'>", "done: 200 steps", "option accuracy", "read back",
            "continues at step 20", "done: 60 steps"),
    COURSE: ("a fresh adapter changes nothing: True", "NF4", "4-bit weights", "tokens are supervised",
             "merged, then quantised to NF4 again", "the same mask: True"),
}  # fmt: skip
IMAGES = {COLAB: 1, COURSE: 9}
JUDGED = re.compile(  # a question whose right answer a reader sees, and what is answered
    r"\nQ:.*\? \n{'A': .*},\n\n--- the right answer\n(.+)\n+--- without the adapter\n(?s:.+?)--- with the adapter\n\1\n"
)
BOTH = pytest.mark.parametrize("path", [COLAB, COURSE], ids=lambda p: p.stem)


def outputs(notebook) -> str:
    """All text that the cells left."""
    found = []
    for cell in notebook["cells"]:
        for out in cell.get("outputs", ()):
            text = out.get("text") or out.get("data", {}).get("text/html") or ""
            found.append(text if isinstance(text, str) else "".join(text))
    return "\n".join(found)


def check(path: Path, notebook) -> None:
    """It ran without an error, and shows what it should."""
    text = outputs(notebook)
    assert not any(out["output_type"] == "error" for cell in notebook["cells"] for out in cell.get("outputs", ()))
    for words in SAID[path]:
        assert words in text, words
    assert "error: " not in text.lower() and "Traceback" not in text
    images = [o for c in notebook["cells"] for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(images) >= IMAGES[path]
    assert path != COLAB or JUDGED.search(text)


@pytest.mark.slow
@BOTH
def test_it_runs_from_top_to_bottom(path, tmp_path):
    """The course in under two minutes."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    notebook, begun = nbformat.read(path, as_version=4), time.monotonic()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(path, notebook)
    assert path == COLAB or time.monotonic() - begun < 120


@BOTH
def test_the_outputs_kept_in_it_are_of_a_whole_run(path):
    """Every code cell was run, in order."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    check(path, notebook)
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 500_000


def test_the_address_of_the_repository_stands_in_one_place_and_every_command_may_stop_it():
    code = [c for c in json.loads(COLAB.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert sum("".join(c["source"]).count("github.com") for c in code) == 1
    assert not any(re.match(r"\s*[!%]", line) for c in code for line in c["source"])  # after a `!command` it goes on
    first = "".join(code[0]["source"])  # that is skipped within the clone: so an installation that fails is tried again
    assert first.index('"pip"') < first.index('os.chdir("qlora_min")')


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A machine like Colab's: its environment has the packages of ours but qlora_min, and its kernels begin with
    google.colab imported. pip may download nothing.

    Returns run(cells, kill_at, **settings), which executes these code cells (by default all) in a new kernel, with
    these settings in the first cell, and returns the notebook; an error has it as `.notebook`. As soon as the path
    kill_at exists, the kernel is killed.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    files = {
        "stand_in/google/colab/__init__.py": "",
        "stand_in/google/colab/drive.py": "import pathlib\n\ndef mount(folder):\n    print('Mounted at', folder)\n"
        "    pathlib.Path(folder, 'MyDrive').mkdir(parents=True, exist_ok=True)\n",
        "ipython/profile_default/startup/colab.py": "import google.colab\n",
        "jupyter/kernels/colab/kernel.json": json.dumps({
            "argv": [f"{tmp_path}/venv/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Colab", "language": "python",
        }),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "ours.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    (tmp_path / "content").mkdir()
    environment = {
        "JUPYTER_PATH": tmp_path / "jupyter", "IPYTHONDIR": tmp_path / "ipython", "PYTHONPATH": tmp_path / "stand_in",
        "XDG_CACHE_HOME": tmp_path / "cache", "CUDA_VISIBLE_DEVICES": "",
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # 0 means no isolation
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))

    def run(cells=range(9), kill_at=None, **settings):
        notebook = nbformat.read(COLAB, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for name, value in settings.items():
            setting = f"{name} = {value!r}"
            code[0].source, changed = re.subn(rf"^{name} = .*", setting, code[0].source, flags=re.MULTILINE)
            assert changed == 1
        notebook.cells = [code[i] for i in cells]
        for cell in notebook.cells:
            cell.outputs, cell.execution_count = [], None
        where = {"metadata": {"path": str(tmp_path / "content")}}
        client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="colab", resources=where)
        if kill_at:
            threading.Thread(target=kill, args=(client, kill_at), daemon=True).start()
        try:
            client.execute()
        except Exception as e:
            e.notebook = notebook
            raise
        return notebook

    def kill(client, path):
        while not path.exists():
            time.sleep(0.05)
        os.kill(client.km.provisioner.pid, signal.SIGKILL)

    return run


@pytest.fixture
def fork(tmp_path) -> str:
    """The address of a git repository of what is in ours now, by another name."""
    folder = tmp_path / "somebodys-fork.git"
    for name in ("qlora_min", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder.as_uri()


@pytest.mark.slow
def test_on_colab_a_lost_session_goes_on_and_a_run_that_has_ended_is_evaluated(colab, fork, tmp_path):
    """Three sessions, the first of which is lost in the middle of training. pip changes nothing but qlora_min."""
    from nbclient.exceptions import DeadKernelError

    run = tmp_path / "drive" / "MyDrive" / "qlora_min" / "demo"
    settings = {"REPOSITORY": fork, "DRIVE": str(tmp_path / "drive")}
    with pytest.raises(DeadKernelError):
        colab(kill_at=run / "checkpoints" / "step-50", **settings)

    second = colab(**settings)
    check(COLAB, second)
    assert not second.cells[0].outputs  # pip has nothing to say
    training = outputs({"cells": [second.cells[3]]})
    assert f"Mounted at {tmp_path}/drive\n" in outputs(second)
    assert f"{tmp_path}/content/qlora_min/qlora_min/demo" in training  # the clone's
    assert re.search(r"continues at step (50|100|150)\n", training)

    metrics = (run / "metrics.jsonl").read_bytes()
    third = outputs(colab(range(7), **settings))
    assert f"{run} has ended" in third and (run / "metrics.jsonl").read_bytes() == metrics
    assert "option accuracy" in third and JUDGED.search(third)

    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    assert {p.name for p in site.iterdir() if "qlora_min" not in p.name} == {"ours.pth"}


@pytest.mark.slow
def test_what_fails_stops_it_with_one_line(colab, fork, tmp_path):
    """The address is not set, or leads nowhere; a command fails, since no run is there. Without Google Drive."""
    from nbclient.exceptions import CellExecutionError

    def line(cells, at, **settings):
        with pytest.raises(CellExecutionError) as error:
            colab(cells, **settings)
        ran = error.value.notebook.cells
        assert [bool(cell.execution_count) for cell in ran] == [i <= at for i in range(len(ran))]
        (out,) = (out for out in ran[at].outputs if out.output_type == "error")
        (one,) = out.traceback
        return one

    unset = "Stop: REPOSITORY, in the first cell, is not set: put the address of your copy in the place of OWNER's"
    assert line(range(9), 0) == unset
    nowhere = (tmp_path / "nowhere").as_uri()
    assert line(range(9), 0, REPOSITORY=nowhere) == f"Stop: exit code 128 of git clone -q {nowhere} qlora_min"
    evaluating = line((0, 1, 4, 5), 2, REPOSITORY=fork, DRIVE=None)
    assert evaluating.endswith(" scripts/eval.py --adapter runs/demo/adapter") and "exit code 2 of " in evaluating


def test_the_cells_of_the_course_are_short():
    cells = json.loads(COURSE.read_text(encoding="utf-8"))["cells"]
    assert all(len(c["source"]) <= 26 for c in cells if c["cell_type"] == "code")
