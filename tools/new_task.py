"""Starts a new task as a copy of an existing one. Called by `make new-task NAME=my_task FROM=chat_sft`.

The copy is complete and belongs to you: nothing links it to the task it came from. Only the folder's name changes.
"""

import importlib.util
import keyword
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USAGE = "make new-task NAME=my_task FROM=chat_sft"


def refusal(name: str, source: str, root: Path = ROOT) -> str | None:
    """Why `tasks/<name>` cannot be made from `tasks/<source>`, in one line, or None if it can."""
    tasks = sorted(path.parent.name for path in (root / "tasks").glob("*/train.py"))
    if not name or not source:
        return f"{'NAME' if not name else 'FROM'} is missing: {USAGE}. Tasks to copy from: {', '.join(tasks)}."
    if source not in tasks:
        return f"FROM={source}: there is no tasks/{source}/train.py. Tasks to copy from: {', '.join(tasks)}."
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return (
            f"NAME={name}: use lower-case letters, digits and underscores, a letter first, no Python keyword: {USAGE}."
        )
    if (root / "tasks" / name).exists():
        return f"NAME={name}: tasks/{name} exists already; choose another name or remove that folder."
    if (root / name).is_dir() or name in sys.stdlib_module_names or importlib.util.find_spec(name):
        return f"NAME={name}: a Python module has this name, and an import could find the wrong one; choose another."
    return None


def rename(text: str, source: str, name: str) -> str:
    """`text` with the folder name `source` replaced where a word is it or begins with it (`outputs/chat_sft_multitask`), with
    hyphens too."""
    for old, new in ((source, name), (source.replace("_", "-"), name.replace("_", "-"))):
        text = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(old)}(?![A-Za-z0-9])", new, text)
    return text


def copy_task(name: str, source: str, root: Path = ROOT) -> Path:
    """Copies `tasks/<source>` to `tasks/<name>`, renames what names the folder, returns the new folder."""
    folder = root / "tasks" / name
    shutil.copytree(root / "tasks" / source, folder, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    for path in folder.rglob("*"):
        if path.suffix in {".py", ".yaml", ".md"}:
            path.write_text(rename(path.read_text(encoding="utf8"), source, name), encoding="utf8")
    readme = folder / "README.md"
    if readme.is_file():
        title, _, body = readme.read_text(encoding="utf8").partition("\n")
        if name not in title:
            readme.write_text(f"# {name}: {title.lstrip('# ')}\n{body}", encoding="utf8")
    return folder


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    name, source = (*argv, "", "")[:2]
    reason = refusal(name, source)
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    copy_task(name, source)
    print(f"tasks/{name} is yours now. Run it:\n\n    accelerate launch tasks/{name}/train.py\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
