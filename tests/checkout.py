"""Where this checkout lies and which files belong to it. Used by the tests."""

import subprocess
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
