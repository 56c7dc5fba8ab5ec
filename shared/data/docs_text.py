"""Docstrings as prose, and with their first sentences as summaries. Pure functions, called by docs.py."""

import hashlib
import re
from collections.abc import Iterable, Iterator

from shared.data.cleaning import clean_text

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
