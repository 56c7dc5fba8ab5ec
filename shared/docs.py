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
import random
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
from shared.assets import cache_folder
from shared.cleaning import CleaningReport, clean_text, drop_near_duplicates

log = logging.getLogger("taskbook")
# Part of the folder's name. Raise it when the rules below change, so that a folder made by older code is not used.
BUILD = 3
NAMES = ("docs:prose", "docs:summaries", "docs:questions")
LARGEST = 1_000_000  # bytes of a file; a larger one is a table of data, and its syntax tree takes a gigabyte
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
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


# Directives whose text is prose; of all others (math, plots, code, versions) the block goes with the directive.
PROSE = re.compile("note|warning|tip|important|caution|hint|attention|seealso")
DIRECTIVE = re.compile(r"\.\. *([\w:-]+)::\s*(.*)")
UNDERLINE = re.compile(r" *([-=~^*#\"+`])\1{2,} *")
TABLE = re.compile(r" *([+|][-=+|: ]{3,}|\|.*\||={3,}( +={3,})+) *")
# :class:`~a.B`, :func:`text <a.b>`: the name or the text; then Hugging Face's [`~a.B`] and NumPy's bare `~a.B`
ROLE = re.compile(r":(?:[\w+.-]+:)+`~?([^`<]+?)(?: *<[^`>]*>)?`")
TAG = re.compile(r"(?m)^ *(</?(Tip|Youtube|hfoptions?|Added|Deprecated|frameworkcontent|pt)\b[^>]*>|\[\[.*\]\]) *$")
EXAMPLES = re.compile(r"(Examples?|Usage( examples?)?|Example usage|Doctests?|Sample):{1,2}", re.I)
HEADING = re.compile(r"[A-Z][A-Za-z ]{2,30}:")


def inline(text: str) -> str:
    """Without reST's marks inside a line."""
    return ROLE.sub(r"`\1`", text).replace("``", "`").replace("`~", "`")


def tidy(text: str) -> str:
    """A docstring as plain text: no doctests, fenced code, tables, reST directives, roles and underlines."""
    lines, kept, i = TAG.sub("", text.expandtabs()).split("\n"), [], 0

    def after_block(i, indent):
        while i < len(lines) and (not lines[i].strip() or len(lines[i]) - len(lines[i].lstrip()) > indent):
            i += 1
        return i

    while i < len(lines):
        line, bare = lines[i].rstrip(), lines[i].strip()
        indent = len(line) - len(line.lstrip())
        i += 1
        if bare.startswith(">>>"):
            while i < len(lines) and lines[i].strip() and not lines[i].strip().startswith("```"):
                i += 1
        elif bare.startswith("```"):
            end = next((j for j in range(i, len(lines)) if lines[j].strip().startswith("```")), None)
            i = i if end is None else end + 1
        elif bare.startswith("..") and not bare.startswith("..."):
            directive = DIRECTIVE.match(bare)
            if directive and directive[1] in ("rubric", "topic", "admonition"):
                kept += ["", line[:indent] + directive[2].rstrip(":") + ":"]
            elif directive and PROSE.fullmatch(directive[1]):
                title = directive[1].capitalize().replace("Seealso", "See also")
                kept += ["", f"{line[:indent]}{title}: {directive[2]}".rstrip()]
            elif re.match(r"\.\. *\[", bare):  # a footnote: its text is prose
                kept.append(line[:indent] + bare[2:].lstrip())
            else:
                kept.append("")
                i = after_block(i, indent)
        elif TABLE.fullmatch(line):
            pass
        elif UNDERLINE.fullmatch(line):
            if kept and kept[-1].strip() and not kept[-1].endswith(":"):
                kept[-1] += ":"
        else:
            kept.append(line.removesuffix(":") if bare.endswith("::") else line)
    following = ""  # from the end, so that a heading knows what is left below it
    for i in range(len(kept) - 1, -1, -1):
        bare = kept[i].strip()
        if EXAMPLES.fullmatch(bare) and (not following or HEADING.fullmatch(following)):
            kept[i] = bare = ""
        following = bare or following
    return clean_text(inline("\n".join(kept)))


ITEM = re.compile(
    r" *([-*+•] |\d+[.)] |:\w+|[\w*`.,\[\]]+(, [\w*`]+)*( \([^\n]*?\))? ?: |[A-Z][\w ]{2,30}:$|.* : |.*:$)"
)


def unwrap(text: str) -> str:
    """One line an item or paragraph: what was wrapped to fit an editor is joined, and the indentation goes."""
    kept: list[str] = []
    header = False
    for line in text.split("\n"):
        new = not line.strip() or not kept or not kept[-1] or header or ITEM.match(line)
        header = bool(re.match(r" *[\w*, ]+ : |.*:$", line))  # NumPy style: the description begins below
        line = " ".join(line.split())
        if new:
            kept.append(line)
        else:
            kept[-1] += " " + line
    return re.sub(r"\n{2,}", "\n\n", "\n".join(kept)).strip()


def prose(entries: Iterable[dict]) -> Iterator[dict]:
    """One document a module: its docstring, then those of its classes and functions, each under its qualified name.

    A document is then long enough to fill a block of a model and stays on one subject, and what belongs to one module
    lands on one side of a split.
    """
    documents: dict[tuple, list[str]] = {}
    for entry in entries:
        key = (entry["package"], entry["module"], entry["license"])
        text = entry["text"] if entry["name"] == entry["module"] else f"{entry['name']}\n\n{entry['text']}"
        documents.setdefault(key, []).append(text)
    for (package, module, terms), texts in documents.items():
        text = "\n\n".join(texts)
        if len(text.split()) >= 20:
            digest = hashlib.sha256(text.encode("utf8")).hexdigest()
            yield {"text": text, "source": f"{package}/{module}", "title": module, "license": terms, "sha256": digest}


def summaries(entries: Iterable[dict]) -> Iterator[dict]:
    """Pairs `document, summary, source`: the summary is the first paragraph where it is one sentence."""
    for entry in entries:
        first, _, body = entry["text"].partition("\n\n")
        summary, body = " ".join(first.split()), unwrap(body)
        sentence = re.fullmatch(r"[A-Z][^\n:;]*[^.\s]\.", summary) and not re.search(r"[.!?] +[A-Z]", summary)
        words = re.findall(r"[A-Za-z]{2,}", body)
        if sentence and 4 <= len(summary.split()) <= 40 and len(words) >= 40:
            yield {"document": body, "summary": summary, "source": f"{entry['package']}/{entry['name']}"}


ASK = {
    "description": [
        "What does the parameter {name} of {function} do?",
        "What is {name} in {function}?",
        "What should be passed as {name}?",
        "What is the argument {name} for?",
    ],
    "type": [
        "What type does {name} have?",
        "Which type should the argument {name} of {function} be?",
        "What kind of value does {function} expect for {name}?",
    ],
    "default": [
        "What is the default value of {name}?",
        "What does {name} default to?",
        "Which value does {function} use for {name} if none is given?",
    ],
    "returns": [
        "What does {function} return?",
        "What is the return value of {function}?",
        "What do you get back from {function}?",
    ],
    "returned type": ["What type does {function} return?", "Of which type is the value that {function} returns?"],
    "raises": [
        "When does {function} raise {name}?",
        "In which case is {name} raised?",
        "What makes {function} raise {name}?",
    ],
}
WORDS = range(40, 401)  # words of a context
LONGEST_ANSWER = 30  # words


def first_sentence(text: str | None) -> str:
    """Up to the first full stop, without it; empty if that is longer than an answer may be."""
    sentence = re.split(r"(?<!e\.g)(?<!i\.e)(?<!etc)\.(?=\s|$)|\n\n", " ".join((text or "").split()), maxsplit=1)[0]
    return sentence if 2 <= len(sentence.split()) <= LONGEST_ANSWER else ""


def facts(text: str) -> list[tuple[str, str, str]]:
    """(kind, name, answer) that docstring_parser finds in a docstring: kinds are the keys of ASK."""
    import docstring_parser
    from docstring_parser import DocstringStyle as Style

    if re.search(r"\n *-{3,} *\n", text):
        style = Style.NUMPYDOC
    elif re.search(r"(?m)^:(param|return|raise)", text):
        style = Style.REST
    elif re.search(r"(?m)^(Args|Arguments|Parameters|Params|Returns?|Raises):\s*$", text):
        style = Style.GOOGLE
    else:
        return []
    try:
        parsed = docstring_parser.parse(text, style)
    except (docstring_parser.ParseError, IndexError, ValueError):
        return []
    found = []
    for param in parsed.params:
        if param.args[0] not in ("attribute", "attr"):
            found += [("description", param.arg_name, first_sentence(param.description))]
            found += [("type", param.arg_name, bare_type(param.type_name))]
            found += [("default", param.arg_name, (param.default or "").strip("`*\"' ").rstrip("."))]
    for returned in parsed.many_returns[:1]:
        found += [("returns", "", first_sentence(returned.description))]
        found += [("returned type", "", bare_type(returned.type_name))]
    found += [("raises", error.type_name or "", first_sentence(error.description)) for error in parsed.raises]
    return [
        (kind, name, inline(answer))
        for kind, name, answer in found
        if answer
        and len(answer.split()) <= LONGEST_ANSWER
        and (kind.startswith("return") or re.fullmatch(r"\w[\w.]*", name))
    ]


def bare_type(stated: str | None) -> str:
    """The type without `optional`, the default and the quotes around it."""
    kind = re.split(r",? *[*(]*(?:optional|default\w*|keyword)\b|,? returned when", stated or "")[0].strip(" ,")
    return kind.strip("`") if "`" not in kind.strip("`") else kind


SECTION = re.compile(
    r"(args|arguments|parameters|params|returns?|yields?|raises|notes?|warnings?|examples?|references|see also|attributes|"
    r"keyword arguments|other parameters|warns|rtype)",
    re.I,
)
# The name that a line is about: `axis (int):`, `axis : int`, `:param axis:`, `ValueError: ...`, `Returns:`
HEAD = re.compile(
    r"[*`:\s-]*(?:(?:param|type|raises?|exception)\s+(?:[\w.\[\]]+\s+)?)?\**([\w.]+(?: [\w]+)?)`*((?:, *[\w*`]+)*) *(?=[:(]|$)"
)


def locate(context: str, kind: str, name: str, answer: str, names: set[str]) -> int:
    """Where the answer begins in the lines that are about `name`; -1 if it is not there verbatim."""
    start, at = None, 0
    for line in context.splitlines(keepends=True):
        head = HEAD.match(line)
        about = {head[1], *re.findall(r"[\w.]+", head[2])} if head else set()
        wanted = name in about if name else bool(head and re.fullmatch("returns?|yields?|rtype", head[1], re.I))
        if start is None and wanted:
            start = at + head.end()
        elif start is not None and not wanted and head and (about & names or SECTION.fullmatch(head[1])):
            break
        at += len(line)
    if start is None:
        return -1
    while (start := context.find(answer, start, at)) >= 0:
        end = start + len(answer)
        if not re.match(r"[\w.]", context[start - 1]) and not re.match(r"\w", context[end : end + 1]):
            return start
        start += 1
    return -1


def questions(entries: Iterable[dict]) -> Iterator[dict]:
    """Rows as SQuAD v2 has them on the Hub; `title` is the qualified name, and its context is on all its rows.

    About one in five asks about a parameter or exception of another function of the same module and has no answer.
    """
    by_module: dict[str, list] = {}
    for entry in entries:
        found = facts(entry["raw"])
        context = unwrap(entry["text"]) if found else ""
        if len(context.split()) in WORDS:
            by_module.setdefault(entry["module"], []).append((entry["name"], context, found))
    for module, functions in by_module.items():
        foreign = sorted({(kind, name) for *_, found in functions for kind, name, _ in found if name})
        for title, context, found in functions:
            names = {name for _, name, _ in found if name}
            located = [(*fact, start) for fact in found if (start := locate(context, *fact, names)) >= 0]
            choose = random.Random(title)  # seeded with the name: the same on every machine
            asked = choose.sample(located, min(3, len(located)))
            words = set(re.findall(r"\w+", context.lower()))
            for _ in range(sum(choose.random() < 0.27 for _ in asked)):
                absent = [fact for fact in foreign if fact[1].split(".")[-1].lower() not in words]
                asked += [(*choose.choice(absent), "", -1)] if absent else []
            seen = set()
            for kind, name, answer, start in asked:
                function = title.removeprefix(f"{module}.")
                question = choose.choice(ASK[kind]).format(name=name, function=function)
                if question in seen:
                    continue
                seen.add(question)
                yield {
                    "id": hashlib.sha256(f"{title}\0{question}".encode()).hexdigest()[:24],
                    "title": title,
                    "context": context,
                    "question": question,
                    "answers": {"text": [answer], "answer_start": [start]}
                    if answer
                    else {"text": [], "answer_start": []},
                }


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
