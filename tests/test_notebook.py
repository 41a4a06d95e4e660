"""The notebook runs from top to bottom, as it stands: here on a CPU, where it trains the demo."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "scripts" / "colab.ipynb"


def outputs(notebook) -> str:
    """All text that the cells left."""
    found = []
    for cell in notebook["cells"]:
        for out in cell.get("outputs", ()):
            text = out.get("text") or out.get("data", {}).get("text/html") or ""
            found.append(text if isinstance(text, str) else "".join(text))
    return "\n".join(found)


def check(notebook) -> None:
    """What a reader should see in a notebook that ran."""
    text = outputs(notebook)
    assert not any(out["output_type"] == "error" for cell in notebook["cells"] for out in cell.get("outputs", ()))
    for words in ("no GPU here", "<b style='color:#1a9850'>", "done: 200 steps", "option accuracy", "read back",
                  "continues at step 20", "done: 60 steps"):  # fmt: skip
        assert words in text, words
    assert "error: " not in text.lower() and "Traceback" not in text
    images = [o for c in notebook["cells"] for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(images) >= 1


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(notebook)


def test_the_outputs_kept_in_it_are_of_a_whole_run():
    """Every code cell was run, in order; the address stands in one place."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    check(notebook)
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert sum("".join(c["source"]).count("github.com") for c in code) == 1
    assert Path(NOTEBOOK).stat().st_size < 300_000
