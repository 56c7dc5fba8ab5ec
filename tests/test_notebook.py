"""notebooks/colab_t4.ipynb: no outputs are committed, and its cells run from clone to chat at tiny scale against the seeded Hub.

The kernel lives in an environment of its own that sees the packages of this one, since the notebook installs the repository.
"""

import copy
import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
from checkout import ROOT, files
from jupyter_client.manager import KernelManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOTEBOOK = ROOT / "notebooks" / "colab_t4.ipynb"
SMALL = "--max_steps 2 --max_train_rows 24 --max_test_rows 6 --max_validation_rows 4 "
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


@pytest.fixture
def old_torchao(environment):
    """As in Colab's image: too old for peft, which then makes no adapter."""
    own = next(environment.parent.parent.glob("lib/python*/site-packages"))
    about = own / "torchao-0.10.0.dist-info"
    for folder in (about, own / "torchao"):
        folder.mkdir()
    (own / "torchao" / "__init__.py").write_text("")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    (about / "INSTALLER").write_text("pip\n")
    names = ["torchao/__init__.py", *(f"{about.name}/{name}" for name in ("METADATA", "INSTALLER", "RECORD"))]
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    return own / "torchao"


@pytest.mark.parametrize(
    "device",
    [pytest.param("--fp16 false --use_cpu true ", id="cpu"), pytest.param("", id="gpu", marks=pytest.mark.gpu)],
)
def test_every_cell_runs(device, hub, repository, environment, old_torchao, tmp_path, monkeypatch):
    """And again from training on with a plan alone."""
    options = device + SMALL
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    parameters.source += f"\nREPOSITORY, OPTIONS = {str(repository)!r}, {options!r}"
    again = [cell for cell in notebook.cells if cell.cell_type == "code"][3:]
    change = f"OUTPUT, OPTIONS = 'outputs/planned', {options + ' --dry_run'!r}"
    notebook.cells += [nbformat.v4.new_code_cell(change), *map(copy.deepcopy, again)]
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
    assert "pushed: " in shown[3] and len(re.findall(r"(?:^|\[\])> ", shown[5], re.M)) == 2 and not old_torchao.exists()
    assert "on this machine: about" in shown[8] and all("Nothing was trained" in text for text in shown[9:11])
    assert "Not asked for" in shown[6] and "Not asked for" in shown[11]
    assert "checkpoint-2/manifest.json" in hub.files("alice/smollm2-chat", "checkpoints")
    canary = settings["HF_TOKEN"]
    assert not any(canary in text for text in shown)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "p_tuning in 4 bits"])
def test_the_chat_cell_takes_what_each_recipe_leaves(method, tiny, tmp_path, monkeypatch, capsys):
    """The cell itself, with a folder in the place of the repository on the Hub."""
    import methods

    name, in_4bit = method.split()[0], "q" in method or "4" in method
    settings = {"method": name, "load_in_4bit": in_4bit, "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    settings = SimpleNamespace(**settings, virtual_tokens=4)
    args = SimpleNamespace(fp16=False, bf16=False, gradient_checkpointing=False)
    model = methods.add_adapter(methods.load_model(tiny / "llama", name, args, in_4bit), settings, args)
    model.save_pretrained(tmp_path / "me" / "chat")
    methods.load_tokenizer(tiny / "llama").save_pretrained(tmp_path / "me" / "chat")
    (tmp_path / "me" / "chat" / "run.yaml").write_text(f"method: {name}\n" + "load_in_4bit: true\n" * ("4" in method))
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    cell = next(source for source in cells if "AutoPeftModelForCausalLM" in source)
    names = {"Path": Path, "TRAINED": True, "OUTPUT": "me/chat", "HUB_NAME": "chat", "ASK": ["One?", "Two?"]}
    monkeypatch.chdir(tmp_path)
    exec(cell.replace("max_new_tokens=128", "max_new_tokens=4"), names | {"whoami": lambda: {"name": "me"}})
    said = capsys.readouterr().out
    assert len(re.findall("^> ", said, re.M)) == 2 and "One?" in said, said


# What the image would have to keep: replaced in a running kernel, or for other packages of it, these break. Their versions' own
# requirements, as they state them, of what is installed here.
KEPT = {
    "torch",
    "torchvision",
    "torchaudio",
    "numpy",
    "pandas",
    "protobuf",
    "scipy",
    "psutil",
    "matplotlib",
    "packaging",
    "tqdm",
}
KEPT |= {"filelock", "fsspec", "requests", "tensorflow", "keras", "jax", "ipykernel", "google-colab", "pillow", "regex"}
TENSORFLOW = [
    "packaging",
    "protobuf>=5.28.0",
    "requests<3,>=2.21.0",
    "numpy>=1.26.0",
    "tensorboard~=2.20.0",
    "h5py>=3.11.0",
]
TENSORFLOW += ["ml_dtypes<1.0.0,>=0.5.1", "typing_extensions>=3.6.6", "grpcio<2.0,>=1.24.3", "wrapt>=1.11.0"]
TRANSFORMERS = ["huggingface-hub<2.0,>=1.5.0", "tokenizers<=0.23.0,>=0.22.0"]


def test_what_colab_has_is_kept(tmp_path):
    """pip's resolver on the list of versions of Colab's GPU image, whose packages are there as metadata alone."""
    environment = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    own, has = next(environment.glob("lib/python*/site-packages")), {}
    for line in (ROOT / "tests" / "colab_freeze.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, version = line.split("==")
        has[canonicalize_name(name)] = version
        (own / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
        requires = "".join(f"Requires-Dist: {each}\n" for each in TRANSFORMERS * (name == "transformers"))
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
        (own / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA").write_text(text)
    wanted = tmp_path / "requirements.txt"
    wanted.write_text((ROOT / "requirements-colab.txt").read_text().replace("\n-e .\n", "\n"))
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--dry-run", "--quiet"]
    report = tmp_path / "report.json"
    done = subprocess.run([*pip, "--report", report, "-r", wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {
        canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"]
        for i in json.loads(report.read_text())["install"]
    }
    assert found["peft"] and found["transformers"] and has.keys() >= KEPT
    assert not KEPT & found.keys(), found
    for line in TENSORFLOW:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains((found | {k: v for k, v in has.items() if k not in found})[name]), line
