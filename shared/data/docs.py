"""Data built from the documentation installed here (`docs:` names): prose, summaries, questions. Called by sources.py
and corpora.py; nothing is downloaded, imported or executed: the files are read with `ast`.

Sources: the language reference and the standard library of this Python, and the packages in requirements.txt with all
that they depend on. A docstring that nearly repeats an earlier one (a template, a copied method) is dropped before the
three sets are made, so no set holds both. They depend on the versions installed and on BUILD alone, to the byte.
"""

import ast
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import logging
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from shared import UserError
from shared.data.assets import cache_folder
from shared.data.cleaning import CleaningReport
from shared.data.docs_questions import questions
from shared.data.docs_text import prose, summaries, tidy
from shared.data.near_duplicates import drop_near_duplicates

log = logging.getLogger("taskbook")
# Part of the folder's name. Raise it when the rules below change, so that a folder made by older code is not used.
BUILD = 3
NAMES = ("docs:prose", "docs:summaries", "docs:questions")
LARGEST = 1_000_000  # bytes of a file; a larger one is a table of data, and its syntax tree takes a gigabyte
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
TESTS = re.compile(r"(^|/)(tests?|_tests?|testing|idle_test)/|(^|/)(test_[^/]*|[^/]*_tests?|conftest)\.py$")
VENDORED = re.compile(r"(^|/)(_?vendor(ed)?|_vendored_packages|externals?|extern|third_party|(site|dist)-packages)/")
# What only a program makes whole: %-templates, Jinja, doubled braces for str.format
TEMPLATE = re.compile(r"%\(\w+\)[sdr]|\{\{|\{%|\{0\}|<!--")


def packages() -> dict[str, importlib.metadata.Distribution]:
    """The packages in requirements.txt and what they depend on, as installed here, by name in order."""
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf8").splitlines()]
    waiting = [(Requirement(line), "") for line in lines if line and not line.startswith("-")]
    found, seen = {}, set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
                continue
            seen.add((name, wanted))
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [(Requirement(text), wanted) for text in found[name].requires or ()]
    return dict(sorted(found.items()))


def licence(package: importlib.metadata.Distribution) -> str | None:
    """What the metadata state, best an SPDX expression; None where they state nothing."""
    stated = package.metadata.get("License-Expression") or package.metadata.get("License") or ""
    if stated and "\n" not in stated and len(stated) <= 100 and stated != "UNKNOWN":
        return stated
    classifiers = package.metadata.get_all("Classifier") or ()
    names = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License :: ")]
    return ", ".join(names) or None


def modules() -> Iterator[tuple[str, str | None, str, Path]]:
    """(package, licence, dotted name, file) of each module worth reading: no tests, no vendored copies; sorted."""
    installed = packages()
    for package in sorted([*installed, "python"]):
        if package == "python":
            root, terms = Path(sysconfig.get_paths()["stdlib"]), "PSF-2.0"
            files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
        else:
            terms = licence(installed[package])
            files = {file.as_posix(): Path(file.locate()) for file in installed[package].files or ()}
        for name, path in sorted(files.items()):
            dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            # Whatever is no dotted name cannot be imported: an example, a script, a template
            is_module = name.endswith(".py") and all(part.isidentifier() for part in dotted.split("."))
            if not is_module or TESTS.search(name) or VENDORED.search(name):
                continue
            if path.is_file() and path.stat().st_size <= LARGEST:
                yield package, terms, dotted, path


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring without its indentation) of a module, its classes and functions, in their order."""

    def visit(node, name):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield name, text
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):  # what lies inside is not documentation
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from visit(child, f"{name}.{child.name}")
                elif isinstance(child, ast.If | ast.Try):
                    yield from visit(child, name)

    yield from visit(tree, module)


def read_docstrings(sources: Iterable[tuple[str, str | None, str, Path]]) -> Iterator[dict]:
    """Rows `package, license, module, name, text` of all docstrings; a file that is not Python 3 is passed over."""
    for package, terms, module, path in sources:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue  # nothing to find, or a table; parsing takes half of the time of a build
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError) as error:
            log.debug("%s: passed over, %s", path, error)
            continue
        seen = set()
        for name, text in docstrings(tree, module):
            # A name defined twice (a property's setter, both arms of an `if`) counts once
            if name not in seen and not TEMPLATE.search(text):
                yield {"package": package, "license": terms, "module": module, "name": name, "text": text}
            seen.add(name)


def language_reference() -> Iterator[dict]:
    """The topics that `help()` shows, one row each. None where Python was installed without `pydoc_data`."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    tree = ast.parse(path.read_bytes())
    topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in sorted(topics.items()):
        name = f"Language reference: {topic}"
        yield {"package": "python", "license": "PSF-2.0", "module": name, "name": name, "text": inspect.cleandoc(text)}


def build(sources: Iterable[tuple[str, str | None, str, Path]], folder: Path) -> None:
    """Writes prose.jsonl, summaries.jsonl and questions.jsonl into `folder`."""
    gc_was_on = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles worth looking for: a third of the time
    try:
        rows = itertools.chain(language_reference(), read_docstrings(sources))
        rows = ({**row, "raw": row["text"], "text": tidy(row["text"])} for row in rows)
        report = CleaningReport()
        entries = list(drop_near_duplicates(filter(lambda row: row["text"], rows), lambda row: row["text"], report))
    finally:
        if gc_was_on:
            gc.enable()
    makers = {"prose": prose(entries), "summaries": summaries(entries), "questions": questions(entries)}
    for name, made in tqdm(makers.items(), desc="writing", unit=" sets", disable=None):
        with open(folder / f"{name}.jsonl", "w", encoding="utf8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    log.info("docstrings: %s", report)


@functools.cache
def folder_name() -> str:
    """Name of the folder in the cache: changes with every package, every version, Python and BUILD."""
    versions = [f"{name}=={package.version}" for name, package in packages().items()]
    key = "\n".join([*versions, f"python=={platform.python_version()}"])
    return f"docs-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{BUILD}"


def fetch(name: str) -> Path:
    """Returns the .jsonl file of a `docs:` name; all three are built the first time, in about a minute.

    Safe when several processes ask at once, and when one is killed: the folder is complete or absent.

    Raises:
        UserError: unknown name, or a cache folder that cannot be written.
    """
    if name not in NAMES:
        raise UserError(f"{name}: unknown. Known: {', '.join(NAMES)}.")
    target = cache_folder() / folder_name()
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.is_dir():  # another process may have made it while this one waited
                    _make(target)
    except OSError as error:
        raise UserError(f"{name}: cannot be written: {error}. Set TASKBOOK_CACHE to a folder of yours.") from error
    return target / f"{name.removeprefix('docs:')}.jsonl"


def _make(target: Path) -> None:
    """Builds beside `target`, then renames: called under the lock of `target`."""
    prefix = f".{target.name}-"
    for left_over in target.parent.glob(f"{prefix}*"):  # by a process that was killed; the lock says nobody uses it
        shutil.rmtree(left_over)
    print("building docs: from the packages installed here, about a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as staging:
        folder = Path(staging) / "built"
        folder.mkdir()
        build(tqdm(list(modules()), desc="reading docstrings", unit=" files", disable=None), folder)
        folder.rename(target)


def documents(name: str) -> Iterator[dict]:
    """Streams the rows of a `docs:` name without holding them in memory. Raises UserError for an unknown name."""
    with open(fetch(name), encoding="utf8") as lines:
        yield from map(json.loads, lines)


def load(name: str):
    """A DatasetDict with all rows as `train`. Raises UserError for an unknown name."""
    import datasets
    from datasets import Features, List, Value

    text = Value("string")
    columns = {
        "docs:prose": dict.fromkeys(("text", "source", "title", "license", "sha256"), text),
        "docs:summaries": dict.fromkeys(("document", "summary", "source"), text),
        # Stated, since a first block of rows without answers would be read as lists of nothing
        "docs:questions": dict.fromkeys(("id", "title", "context", "question"), text)
        | {"answers": {"text": List(text), "answer_start": List(Value("int32"))}},
    }
    file = fetch(name)
    return datasets.load_dataset("json", data_files={"train": str(file)}, features=Features(columns[name]))
