"""The rules of the house, held by reading the files: who imports whom, what must not occur, what documents promise.

Every rule is a function from a checkout to a list of violations. Each is tested twice: this checkout has none, and a
planted violation is found (a rule that finds nothing anywhere would pass the first test too).
"""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def sources(root: Path, *folders: str) -> Iterator[tuple[Path, str, ast.Module]]:
    """(path from the root, name of the folder or task, syntax tree) of each Python file below the folders."""
    for path in files(root):
        inside = path.relative_to(root)
        if inside.parts[0] in folders and path.suffix == ".py":
            yield (
                inside,
                inside.parts[1] if inside.parts[0] == "tasks" else inside.parts[0],
                ast.parse(path.read_bytes()),
            )


def task_names(root: Path) -> set[str]:
    return {path.relative_to(root).parts[1] for path in files(root) if path.relative_to(root).parts[0] == "tasks"}


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands, `import_module("...")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def arrows(root: Path) -> list[str]:
    """tasks -> shared <- deploy; a task's own files are its own."""
    tasks, found = task_names(root), []
    own = {task: {p.stem for p, t, _ in sources(root, "tasks") if t == task} for task in tasks}
    for path, place, tree in sources(root, "tasks", "shared", "deploy"):
        theirs = set().union(*(stems for task, stems in own.items() if task != place)) - own.get(place, set())
        forbidden = {"tasks", "tests", "tools"} | (tasks - {place}) | theirs
        if place != "deploy":
            forbidden.add("deploy")
        else:  # deploy has files of its own, whose names may be those of a task's
            forbidden -= {p.stem for p, *_ in sources(root, "deploy")}
        for line, module in imported(tree):
            if module.split(".")[0] in forbidden:
                found.append(f"{path}:{line} imports {module}")
    return found


# What each package of shared/ may import of the others
INSIDE_SHARED = {
    "metrics": set(),
    "data": set(),
    "corpora": {"data"},
    "publish": {"data", "metrics"},
    "training": {"data", "metrics", "publish"},
    "inference": {"data", "metrics", "publish"},
    "export": {"data", "metrics", "publish", "inference"},
    "compare": {"metrics", "publish"},
    "retrieval": {"data", "corpora", "publish"},
}


def arrows_inside_shared(root: Path) -> list[str]:
    """{metrics, data} <- publish <- {training, inference, compare}; {corpora, publish} <- retrieval; data <- corpora;
    inference <- export."""
    found = []
    for path, _, tree in sources(root, "shared"):
        package = path.parts[1] if len(path.parts) > 2 else None
        if package is None and path.name != "__init__.py":
            found.append(f"{path}: lies in no package")
        for line, module in imported(tree):
            parts = module.split(".")
            target = parts[1] if parts[0] == "shared" and len(parts) > 1 else None
            if target in INSIDE_SHARED and target != package and target not in INSIDE_SHARED.get(package, set()):
                found.append(f"{path}:{line} imports {module}")
    return found


def long_files(root: Path) -> list[str]:
    """No file of shared/ or deploy/ is longer than 450 lines."""
    lengths = {
        path: len((root / path).read_text("utf8").splitlines()) for path, *_ in sources(root, "shared", "deploy")
    }
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > 450]


def shadows(root: Path) -> list[str]:
    """A script's folder is first on the path: a file there hides a module of the same name."""
    modules = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    return [
        f"{path} hides the module {path.stem}" for path, *_ in sources(root, "tasks", "deploy") if path.stem in modules
    ]


def import_path(root: Path) -> list[str]:
    """`pip install -e .` is the one way in which `shared` is found."""
    found = []
    for path, _, tree in sources(root, "shared", "tasks", "deploy"):
        for node in ast.walk(tree):
            text = (
                ast.unparse(node) if isinstance(node, ast.Attribute | ast.ImportFrom) else getattr(node, "value", None)
            )
            if text in ("sys.path", "from sys import path", "PYTHONPATH"):
                found.append(f"{path}:{node.lineno} {text}")
    for path in files(root):
        if path.name == "Makefile" or path.suffix in {".sh", ".yaml"} or path.parent.name == ".ci":
            found += [f"{path.relative_to(root)}: PYTHONPATH" for _ in re.findall("PYTHONPATH", path.read_text("utf8"))]
    return found


def code_from_data(root: Path) -> list[str]:
    """Data never runs as code: no remote code, no pickle."""
    found = []
    for path, _, tree in sources(root, "shared", "tasks", "deploy", "tools"):
        for node in ast.walk(tree):
            bad = None
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                bad = node.arg if getattr(node.value, "value", None) is not False else None
            elif (
                isinstance(node, ast.AnnAssign | ast.Assign) and "trust_remote_code" in ast.unparse(node).split("=")[0]
            ):
                bad = "trust_remote_code"
            elif isinstance(node, ast.Dict):
                given = {getattr(key, "value", None): value for key, value in zip(node.keys, node.values, strict=True)}
                value = given.get("trust_remote_code", ast.Constant(False))
                bad = "trust_remote_code" if getattr(value, "value", None) is not False else None
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.serialization.load"):
                bad = "torch.load"
            if bad:
                found.append(f"{path}:{getattr(node, 'lineno', '?')} {bad}")
        pickles = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
        for line, module in imported(tree):
            if module.split(".")[0] in pickles or module == "torch.load":
                found.append(f"{path}:{line} {module}")
    for path in configs(root):
        if re.search(r"^\s*trust_remote_code\s*:\s*(?!false)", path.read_text("utf8"), re.MULTILINE):
            found.append(f"{path.relative_to(root)} trust_remote_code")
    return found


def remote_code_unsaid(root: Path) -> list[str]:
    """Whatever reads a model says that none of its code runs: transformers would ask on the terminal."""
    found = []
    code = [(path, tree) for path, _, tree in sources(root, "shared", "deploy", "tasks", "tools", "benchmarks")]
    for path in files(root):
        if path.suffix == ".ipynb":
            cells = [
                cell["source"] for cell in json.loads(path.read_text("utf8"))["cells"] if cell["cell_type"] == "code"
            ]
            text = "".join(line for cell in cells for line in [*cell, "\n"] if not line.lstrip().startswith(("!", "%")))
            code.append((path.relative_to(root), ast.parse(text)))
    for path, tree in code:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                said = {keyword.arg for keyword in node.keywords} & {"trust_remote_code", None}  # None: **options
                if re.match(r"([\w.]*\.)?(?i:auto|loader)", ast.unparse(node.func.value)) and not said:
                    found.append(f"{path}:{node.lineno} {ast.unparse(node.func)} without trust_remote_code=False")
    return found


def large_files(root: Path) -> list[str]:
    """A clone stays small; data and weights come from the names in shared/data/assets.py."""
    return [f"{p.relative_to(root)}: {p.stat().st_size} bytes" for p in files(root) if p.stat().st_size > 1_000_000]


def documents(root: Path) -> Iterator[tuple[Path, str]]:
    yield from ((path, path.read_text("utf8")) for path in files(root) if path.suffix == ".md")


def broken_links(root: Path) -> list[str]:
    """Relative links and images of every Markdown file lead to something."""
    found = []
    for path, text in documents(root):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(
            r"<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)", prose
        ):
            if re.match(r"[a-z][a-z0-9+.-]*:|#", target):
                continue
            if not (path.parent / target.split("#")[0]).exists():
                found.append(f"{path.relative_to(root)}: {target}")
    return found


def missing_files(root: Path) -> list[str]:
    """Files that documents, commands in comments and docstrings name exist (`my_task` stands for the reader's own)."""
    found = []
    for path in files(root):
        inside = path.relative_to(root)
        if (
            inside.parts[0] in ("tests", "benchmarks")
            or path.suffix not in {".md", ".yaml", ".py"}
            and path.name != "Makefile"
        ):
            continue
        pattern = r"(?<![\w/.~-])(?:tasks|accelerate|shared|tools|tests|deploy)/[\w./-]*\.(?:py|yaml|md)\b"
        for name in re.findall(pattern, path.read_text("utf8")):
            if "my_task" not in name and not (root / name).exists():
                found.append(f"{inside}: {name}")
    return found


def missing_targets(root: Path) -> list[str]:
    """`make x` in a document or script is a target of the Makefile, and the Makefile's help lists it."""
    makefile = (root / "Makefile").read_text("utf8")
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", makefile, re.MULTILINE))
    found = [
        f"Makefile: {t} has no ## help"
        for t in re.search(r"^\.PHONY: (.*)", makefile, re.M)[1].split()
        if t not in targets
    ]
    for path in files(root):
        inside = path.relative_to(root)
        if path.suffix == ".md" or inside.parts[0] == ".ci":
            for target in re.findall(r"(?:^|`)[ \t]*make ([a-z][a-z-]*)", path.read_text("utf8"), re.MULTILINE):
                if target not in targets:
                    found.append(f"{inside}: make {target}")
    return found


def installation(root: Path) -> list[str]:
    """`-e .` comes last; only `shared` is installed, and all of it: a folder of it without __init__.py would be missing."""
    found = []
    lines = [line.strip() for line in (root / "requirements.txt").read_text("utf8").splitlines()]
    if [line for line in lines if line and not line.startswith("#")][-1] != "-e .":
        found.append("requirements.txt does not end with -e .")
    project = tomllib.loads((root / "pyproject.toml").read_text("utf8"))
    if project["tool"]["setuptools"]["packages"]["find"] != {"include": ["shared*"]}:
        found.append("pyproject.toml: packages.find includes something else than shared*")
    folders = {path.parent for path, *_ in sources(root, "shared")}
    return found + [
        f"{folder}: no __init__.py" for folder in sorted(folders) if not (root / folder / "__init__.py").exists()
    ]


def lock(root: Path) -> list[str]:
    """requirements.lock pins every requirement, within its range."""
    lines = [
        line.split(" #")[0]
        for name in ("requirements.txt", "requirements-dev.txt")
        if (root / name).exists()
        for line in (root / name).read_text("utf8").splitlines()
        if re.match(r"\w", line)
    ]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (root / "requirements.lock").read_text("utf8"), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    found = []
    for requirement in map(Requirement, lines):
        pinned = pins.get(canonicalize_name(requirement.name))
        if pinned is None or pinned not in requirement.specifier:
            found.append(f"requirements.lock: {requirement.name} {pinned}, which is not {requirement.specifier}")
    return found


def configs(root: Path) -> list[Path]:
    return [
        path
        for path in files(root)
        if path.suffix == ".yaml" and path.relative_to(root).parts[0] in ("tasks", "accelerate")
    ]


def configurations(root: Path) -> list[str]:
    """A configuration is short, opens with its command, and names itself in it (laptop.yaml is the default)."""
    found = []
    for path in configs(root):
        text, inside = path.read_text("utf8"), path.relative_to(root)
        content = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        opening = "\n".join(re.match(r"(?:#.*\n)*", text)[0].splitlines())
        if len(content) > 25:
            found.append(
                f"{inside}: {len(content)} lines; a configuration holds at most 25, only what differs from the defaults"
            )
        if "accelerate launch" not in opening or (path.name != "laptop.yaml" and str(inside) not in opening):
            found.append(f"{inside}: the opening comment does not hold its command")
        if "easured" not in opening and not re.search(r"\d+ ?(s|min|minutes|seconds)\b", opening):
            found.append(f"{inside}: the opening comment gives no measurement and does not say `not yet measured`")
        if not isinstance(yaml.safe_load(text), dict):
            found.append(f"{inside}: not a mapping")
    return found


def docstrings(root: Path) -> list[str]:
    """Files, and public functions, classes and methods say what they are; a private class and a method that a
    framework calls by its name (`on_save`, `forward`, `__iter__`) need not."""
    found = []
    for path, _, tree in sources(root, "shared", "tasks", "tools", "deploy"):
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            found.append(f"{path}: the file has no docstring")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                inherits = isinstance(node, ast.ClassDef) and node.bases
                methods = node.body if isinstance(node, ast.ClassDef) and not inherits else []
                public = [m for m in methods if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
                found += [f"{path}:{n.lineno} {n.name}" for n in (node, *public) if not ast.get_docstring(n)]
    # `main` is described by its file: its six headings are the recipe
    return [line for line in found if not (line.startswith("tasks/") and line.endswith(" main"))]


RULES = (
    arrows,
    arrows_inside_shared,
    long_files,
    shadows,
    import_path,
    code_from_data,
    remote_code_unsaid,
    large_files,
    broken_links,
    missing_files,
    missing_targets,
    installation,
    lock,
    configurations,
    docstrings,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_checkout_keeps(rule):
    assert list(sources(ROOT, "shared")) and list(sources(ROOT, "tasks")), "nothing was looked at"
    violations = rule(ROOT)
    assert not violations, f"{rule.__doc__}\n" + "\n".join(violations)


PLANTED = [
    (arrows, "tasks/one/train.py", "def f():\n    from tasks.two import train\n"),
    (arrows, "tasks/one/train.py", "import features_of_two\n"),
    (arrows, "tasks/one/train.py", "import deploy.api\n"),
    (arrows, "shared/training/arguments.py", "import features_of_two\n"),
    (arrows, "shared/training/arguments.py", "import importlib\nimportlib.import_module('tasks.one.train')\n"),
    (arrows, "shared/training/arguments.py", "from deploy import api\n"),
    (arrows, "deploy/api.py", "import tasks.one.train\n"),
    (arrows_inside_shared, "shared/data/load.py", "from shared.publish import hub\n"),
    (arrows_inside_shared, "shared/inference/model.py", "from shared.training.plan import estimate\n"),
    (arrows_inside_shared, "shared/publish/card.py", "def f():\n    from shared import training\n"),
    (arrows_inside_shared, "shared/corpora/build.py", "from shared.retrieval import index\n"),
    (arrows_inside_shared, "shared/helpers.py", "x = 1\n"),
    (long_files, "deploy/api.py", "x = 1\n" * 451),
    (shadows, "tasks/one/evaluate.py", "x = 1\n"),
    (shadows, "tasks/one/datasets.py", "x = 1\n"),
    (shadows, "tasks/one/statistics.py", "x = 1\n"),
    (import_path, "tasks/one/train.py", "import sys\nsys.path.insert(0, '.')\n"),
    (import_path, "shared/training/arguments.py", "import os\nos.environ['PYTHONPATH'] = '.'\n"),
    (import_path, "Makefile", "test:\n\tPYTHONPATH=. pytest\n"),
    (code_from_data, "shared/training/arguments.py", "load(x, trust_remote_code=True)\n"),
    (code_from_data, "shared/training/arguments.py", "load(x, **{'trust_remote_code': True})\n"),
    (code_from_data, "tasks/one/train.py", "import torch\ntorch.load('x')\n"),
    (code_from_data, "tasks/one/train.py", "from torch import load\n"),
    (code_from_data, "shared/training/arguments.py", "import pickle\n"),
    (code_from_data, "tasks/one/configs/laptop.yaml", "# accelerate launch, 3 min\ntrust_remote_code: true\n"),
    (remote_code_unsaid, "shared/export/export.py", "config = AutoConfig.from_pretrained(folder)\n"),
    (remote_code_unsaid, "tasks/one/train.py", "model = AutoModelForCausalLM.from_config(config)\n"),
    (remote_code_unsaid, "benchmarks/speed.py", "model = transformers.AutoModel.from_pretrained(folder)\n"),
    (
        remote_code_unsaid,
        "notebooks/one.ipynb",
        '{"cells": [{"cell_type": "code", "source": ["!ls\\n", "loader.from_pretrained(repo)"]}]}',
    ),
    (large_files, "tests/weights.bin", "0" * 1_000_001),
    (broken_links, "README.md", "see [there](docs/nowhere.md#part)\n"),
    (missing_files, "README.md", "run `accelerate launch tasks/three/train.py`\n"),
    (missing_targets, "README.md", "```\nmake dinner\n```\n"),
    (missing_targets, "CONTRIBUTING.md", "then `make lunch`\n"),
    (installation, "requirements.txt", "-e .\ntorch\n"),
    (lock, "requirements.lock", "torch==2.9.0\n"),
    (lock, "requirements.lock", "numpy==2.4.6\n"),
    (installation, "shared/metrics/rouge/rouge.py", "x = 1\n"),
    (installation, "pyproject.toml", '[tool.setuptools.packages.find]\ninclude = ["*"]\n'),
    (
        configurations,
        "tasks/one/configs/laptop.yaml",
        "# accelerate launch, 3 min\n" + "".join(f"k{i}: 1\n" for i in range(26)),
    ),
    (configurations, "tasks/one/configs/t4.yaml", "# accelerate launch tasks/one/train.py, 3 min\na: 1\n"),
    (configurations, "tasks/one/configs/laptop.yaml", "# accelerate launch\na: 1\n"),
    (docstrings, "shared/training/arguments.py", '"""File."""\ndef public():\n    pass\n'),
    (docstrings, "tasks/one/train.py", "x = 1\n"),
]


@pytest.mark.parametrize(
    "rule, name, text", PLANTED, ids=[f"{rule.__name__}-{i}" for i, (rule, *_) in enumerate(PLANTED)]
)
def test_a_violation_is_found(rule, name, text, tmp_path):
    clean = {
        "shared/__init__.py": "",
        "tasks/one/train.py": '"""One."""\nimport json\nimport features_of_one\nfrom shared.training import launch\n',
        "tasks/one/features_of_one.py": '"""One."""\n',
        "tasks/two/features_of_two.py": '"""Two."""\n',
        "tasks/one/configs/laptop.yaml": "# accelerate launch tasks/one/train.py\n# Not yet measured.\nlr: 1\n",
        "deploy/api.py": '"""Serves."""\nfrom shared.training import launch\n',
        "requirements.txt": "torch>=2.10\n-e .\n",
        "requirements.lock": "torch==2.13.0\n",
        "pyproject.toml": '[tool.setuptools.packages.find]\ninclude = ["shared*"]\n',
        "Makefile": ".PHONY: test\ntest: ## run\n\tpytest\n",
        "README.md": "[one](tasks/one/train.py) [web](https://example.org/x)\n\n    make test\n",
    }
    for file, content in clean.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    assert rule(tmp_path) == []
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert rule(tmp_path) != []


@pytest.mark.parametrize(
    "body",
    [
        "def test_it():\n    pytest.skip('no GPU')\n",
        "@pytest.mark.skipif(True, reason='no GPU')\ndef test_it():\n    pass\n",
        "pytest.importorskip('no_such_module')\n",
    ],
)
@pytest.mark.parametrize("ci, code", [("true", 1), ("", 0)])
def test_a_skip_fails_in_ci(body, ci, code, tmp_path):
    (tmp_path / "test_skips.py").write_text("import pytest\n\ndef test_runs():\n    pass\n\n" + body)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest", str(tmp_path)]
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    # 2: pytest stops at a file that cannot be collected
    assert (result.returncode in (1, 2)) == bool(code), result.stdout + result.stderr
    assert ("CI=true does not allow" in result.stdout) == bool(code)
