"""Where this checkout lies and which files belong to it. Used by the tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".git", ".venv", "outputs", "__pycache__", ".pytest_cache", ".ruff_cache"}


def files(root: Path = ROOT) -> list[Path]:
    """Files that are, or would be, under version control: from git, or by walking where there is none."""
    if (root / ".git").exists():
        command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted(root / name for name in listed if name and (root / name).is_file())
    inside = (path for path in root.rglob("*") if path.is_file())
    return sorted(
        path
        for path in inside
        if not any(part in NOT_OURS or part.endswith(".egg-info") for part in path.relative_to(root).parts)
    )


def train_script(task: str):
    """The module `tasks/<task>/train.py`, under a name of its own: each task has a file of that name."""
    name = f"{task}_train"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tasks" / task / "train.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
