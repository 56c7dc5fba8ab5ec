"""The prose of a wiki page. Called by `build.prepare`, in the workers."""

import re
from collections.abc import Iterable

UNSEEN = {
    "ref",
    "references",
    "table",
    "gallery",
    "timeline",
    "imagemap",
    "score",
    "templatestyles",
    "indicator",
    "style",
}
SWITCH = re.compile(r"__[^\W\d_]+__")  # __NOTOC__ and its translations
EMPTY_PARENTHESES = re.compile(r" ?[(（][\s,;:]*[)）]")  # what removed templates leave: "Hanoi ( ; )"


def wiki_text(wikitext: str, media: Iterable[str] = ("file", "image", "category")) -> str:
    """The prose of a page of a wiki: no templates, tables, references, media; a heading stays if text follows it.

    Args:
        media: namespaces, in lower case and the language of the wiki, whose links show no text: files and categories.
    """
    import mwparserfromhell

    media = tuple(f"{name}:" for name in media)
    sections = [["", ""]]
    for node in mwparserfromhell.parse(wikitext).nodes:
        if isinstance(node, mwparserfromhell.nodes.Heading):
            sections.append([_plain(node.title.nodes, media).strip(), ""])
        else:
            sections[-1][1] += _plain([node], media)
    parts = []
    for heading, body in sections:
        body = EMPTY_PARENTHESES.sub("", SWITCH.sub("", body))
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip() for line in body.split("\n"))).strip()
        parts += [part for part in (heading, body) if part and body]
    return "\n\n".join(parts)


def _plain(nodes: Iterable, media: tuple[str, ...]) -> str:
    """What a reader sees of parsed wikitext. A walk of our own: strip_code shows references, file options and categories."""
    from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Text, Wikilink

    shown = []
    for node in nodes:
        if isinstance(node, Text):
            shown.append(str(node))
        elif isinstance(node, Wikilink):
            title, text = str(node.title).strip(), node.text
            # Only files take several options; a bare [[fr:Titre]] is the same article in another language.
            hidden = title.casefold().startswith(media) or (text is not None and "|" in _own_text(text))
            if not hidden and not (text is None and re.match(r"[a-z]{2,3}(-[a-z]+)*:\S", title)):
                shown.append(title.removeprefix(":") if text is None else _plain(text.nodes, media))
        elif isinstance(node, Tag):
            name = str(node.tag).lower()
            if name == "br":
                shown.append("\n")
            elif node.wiki_markup == "*":
                shown.append("-")
            elif name not in UNSEEN and node.contents is not None:
                shown.append(_plain(node.contents.nodes, media))
        elif isinstance(node, ExternalLink):
            shown.append(_plain(node.title.nodes, media) if node.title else "" if node.brackets else str(node.url))
        elif isinstance(node, HTMLEntity):
            shown.append(node.normalize())
    return "".join(shown)


def _own_text(code) -> str:
    """The text of a link's label outside of the templates and links in it."""
    return "".join(str(node) for node in code.nodes if type(node).__name__ == "Text")
