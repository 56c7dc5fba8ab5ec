"""Questions about docstrings whose answers stand in them, as SQuAD v2 has them. Pure functions, called by docs.py."""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator

from shared.data.docs_text import inline, unwrap

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
