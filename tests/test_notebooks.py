"""Every notebook runs from top to bottom, and is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from stripe.data import Loader, load_images
from stripe.gates import find_gates
from stripe.models import create_model
from stripe.recorder import Recorder

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of two epochs."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("notebooks") / "run"
    loader = Loader(load_images("digits", "test", samples=24), 12)
    for epoch in (1, 2):
        model = create_model("resnet", depth=11, module="senet")
        gates = find_gates(model, next(iter(loader))[0][:2])
        with Recorder(model, gates, path) as recorder:
            recorder.record(loader, epoch=epoch)
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, run, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as under JupyterLab
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)
    assert '"../runs/demo"' in code[0].source
    code[0].source = code[0].source.replace('"../runs/demo"', repr(str(run)))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert all(cell.outputs for cell in code)
