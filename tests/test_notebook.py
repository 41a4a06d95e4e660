"""The notebooks run from top to bottom, as they stand: here on a CPU, where they train the demo."""

import json
import time
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


def test_the_address_of_the_repository_stands_in_one_place():
    code = [c for c in json.loads(COLAB.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert sum("".join(c["source"]).count("github.com") for c in code) == 1


def test_the_cells_of_the_course_are_short():
    cells = json.loads(COURSE.read_text(encoding="utf-8"))["cells"]
    assert all(len(c["source"]) <= 26 for c in cells if c["cell_type"] == "code")
