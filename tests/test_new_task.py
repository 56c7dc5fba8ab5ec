"""`make new-task` makes a folder that runs, and refuses what would not. Works on a copy of the checkout."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, files

PYTHON = ROOT / ".venv" / "bin" / "python"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The checkout's files in a folder whose path has a space, with this checkout's .venv."""
    root = tmp_path_factory.mktemp("a copy")
    for path in files():
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    (root / ".venv").symlink_to(ROOT / ".venv")
    return root


def new_task(copy, *variables):
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # none of the caller's MAKEFLAGS, NAME or FROM
    return subprocess.run(["make", "new-task", *variables], cwd=copy, env=environment, capture_output=True, text=True)


def test_the_copy_runs_under_its_own_name(copy):
    made = new_task(copy, "NAME=my_task", "FROM=chat_sft")
    assert made.returncode == 0, made.stderr
    assert "accelerate launch tasks/my_task/train.py" in made.stdout

    command = [PYTHON, "tasks/my_task/train.py", "--help"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "my_task" in result.stdout and "chat_sft" not in result.stdout
    assert "--max_train_rows" in result.stdout


@pytest.mark.parametrize("source", sorted(path.parent.name for path in (ROOT / "tasks").glob("*/train.py")))
def test_a_copy_is_its_own(copy, source):
    """No path and no name of the original is left, in none of its configurations: two runs would share a folder."""
    name = "mine_" + source[::-1]
    assert new_task(copy, f"NAME={name}", f"FROM={source}").returncode == 0
    original, folder = copy / "tasks" / source, copy / "tasks" / name
    names = [sorted(p.relative_to(d) for p in d.rglob("*") if "__pycache__" not in p.parts) for d in (original, folder)]
    assert names[0] == names[1]
    for path in folder.rglob("*"):
        if path.suffix in {".py", ".yaml", ".md"}:
            assert not re.search(rf"(?<![A-Za-z0-9_]){source.replace('_', '[-_]')}(?![A-Za-z0-9])", path.read_text()), (
                path
            )
    outputs = []
    for path in (folder / "configs").glob("*.yaml"):
        one, other = (yaml.safe_load((each / "configs" / path.name).read_text()) for each in (folder, original))
        for key in ("output_dir", "hub_model_id"):
            assert key not in one or one[key] != other[key], (path, key)
        outputs.append(one.get("output_dir", f"outputs/{name}"))  # by default after the folder
    assert all(Path(output).name.startswith(name) for output in outputs)
    assert f"accelerate launch tasks/{name}/train.py" in (folder / "train.py").read_text()
    shutil.rmtree(folder)


def test_a_readme_gets_the_new_name(copy):
    source = copy / "tasks" / "source_task"
    source.mkdir()
    (source / "train.py").write_text(
        '"""Run tasks/source_task/train.py, see outputs/source_task; resource_tasks stays."""\n'
    )
    (source / "README.md").write_text("# A title without it\n\nlm-source-task, source_task_2, `tasks/source_task`\n")
    assert new_task(copy, "NAME=other", "FROM=source_task").returncode == 0
    other = copy / "tasks" / "other"
    assert (
        other / "train.py"
    ).read_text() == '"""Run tasks/other/train.py, see outputs/other; resource_tasks stays."""\n'
    assert (other / "README.md").read_text() == "# other: A title without it\n\nlm-other, other_2, `tasks/other`\n"


@pytest.mark.parametrize(
    "variables, words",
    [
        ((), ["NAME is missing", "make new-task NAME=my_task FROM=chat_sft"]),
        (("NAME=fresh",), ["FROM is missing", "chat_sft"]),
        (("NAME=fresh", "FROM=nothing"), ["tasks/nothing/train.py", "chat_sft"]),
        (("NAME=fresh", "FROM=../tasks/chat_sft"), ["FROM="]),
        (("NAME=chat_sft", "FROM=chat_sft"), ["exists already"]),
        (("NAME=my-task", "FROM=chat_sft"), ["underscores"]),
        (("NAME=2nd", "FROM=chat_sft"), ["a letter first"]),
        (("NAME=../away", "FROM=chat_sft"), ["lower-case letters"]),
        (("NAME=class", "FROM=chat_sft"), ["keyword"]),
        (("NAME=datasets", "FROM=chat_sft"), ["module"]),
        (("NAME=statistics", "FROM=chat_sft"), ["module"]),
        (("NAME=shared", "FROM=chat_sft"), ["module"]),
    ],
)
def test_refusals_are_one_line_and_make_nothing(copy, variables, words):
    before = sorted((copy / "tasks").iterdir())
    result = new_task(copy, *variables)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert sorted((copy / "tasks").iterdir()) == before and not (copy / "away").exists()
