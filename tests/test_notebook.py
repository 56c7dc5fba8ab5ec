"""notebooks/colab_t4.ipynb: no outputs are committed, and its cells run from clone to chat at tiny scale against the seeded Hub.

The kernel lives in an environment of its own that sees the packages of this one, since the notebook installs the repository.
"""

import json
import os
import shutil
import site
import subprocess
import sys

import nbclient
import nbformat
import pytest
from checkout import ROOT, files
from jupyter_client.manager import KernelManager

NOTEBOOK = ROOT / "notebooks" / "colab_t4.ipynb"
SMALL = "--fp16 false --use_cpu true --max_steps 2 --max_train_rows 24 --max_test_rows 6 --max_validation_rows 4 "
SMALL += "--max_length 256 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --warmup_steps 0 --logging_steps 1"


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with the packages of this one, pip and accelerate; its Python."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "of_the_tests.pth").write_text("\n".join(site.getsitepackages()))
    for name in ("pip", "accelerate"):
        first, _, rest = (ROOT / ".venv" / "bin" / name).read_text().partition("\n")
        assert first.startswith("#!")
        (folder / "bin" / name).write_text(f"#!{python}\n{rest}")
        (folder / "bin" / name).chmod(0o755)
    return python


@pytest.fixture
def repository(tmp_path):
    """These files as a git repository that can be cloned."""
    folder = tmp_path / "repository"
    for path in files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "--quiet"], ["add", "--all", "--force"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_no_outputs_are_committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert [cell.metadata.get("tags") for cell in notebook.cells if cell.metadata.get("tags")] == [["parameters"]]


def test_every_cell_runs(hub, repository, environment, tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    parameters.source += f"\nREPOSITORY, OPTIONS = {str(repository)!r}, {SMALL!r}"
    work = tmp_path / "content"
    work.mkdir()
    settings = hub.env_for("write", home=tmp_path / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    settings["PATH"] = f"{environment.parent}{os.pathsep}{os.environ['PATH']}"
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    kernel = [str(environment), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager = KernelManager()
    manager.kernel_spec.argv = kernel
    try:
        client = nbclient.NotebookClient(notebook, km=manager, timeout=300, resources={"metadata": {"path": str(work)}})
        client.execute()
    finally:
        manager.shutdown_kernel(now=True)
    shown = [
        "".join(output.get("text", "") + str(list(output.get("data", ""))) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    run = work / "lm-taskbook" / "outputs" / "chat_sft"
    results = json.loads((run / "all_results.json").read_text())
    assert "logged in as" in shown[2] and "Did it help?" in shown[3]
    assert f"{results['test_perplexity']:,.2f}" in shown[4] and "image/png" in shown[4]
    assert "https://" in shown[5] or hub.url in shown[5]
    assert shown[6].count("> ") == 2
    canary = settings["HF_TOKEN"]
    assert not any(canary in text for text in shown)
