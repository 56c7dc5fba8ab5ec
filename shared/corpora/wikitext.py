"""The prose of a wiki page, as a reader sees it. Called by `build.prepare`, in the workers."""

import itertools
import re
import unicodedata
from collections.abc import Iterable

UNSEEN = {
    *("ref", "references", "table", "gallery", "timeline", "imagemap", "score", "templatestyles", "indicator", "style"),
    *(
        "includeonly",
        "hiero",
        "mapframe",
        "maplink",
        "graph",
        "inputbox",
        "templatedata",
        "categorytree",
        "section",
        "script",
    ),
}
# Nothing in them is markup; in <code> it is
VERBATIM = {"nowiki", "pre", "syntaxhighlight", "source", "math", "chem", "ce"}
# English names hold in every wiki. A dump names its own namespaces, but not the aliases of those: these are frequent
MEDIA = frozenset(
    (
        *(
            "file",
            "image",
            "category",
            "hình",
            "thể loại",
            "tập tin",
            "bild",
            "imagen",
            "imagem",
            "immagine",
            "afbeelding",
        ),
        *(
            "grafika",
            "изображение",
            "画像",
            "ファイル",
            "图像",
            "圖像",
            "文件",
            "檔案",
            "档案",
            "图片",
            "圖片",
            "分类",
            "分類",
            "그림",
            "파일",
        ),
    )
)
MEDIA_FILE = re.compile(
    r"[^\W\d_][\w ]*:.+\.(?:jpe?g|png|svg|gif|tiff?|webp|xcf|djvu|pdf|og[agv]|opus|webm|mp[34g]|mpeg|wav|flac|midi?|stl)",
    re.I,
)
LANGUAGE = re.compile(r"(?:[a-z]{2,3}(?:-[a-z]+)*|simple):\s*\S")  # of a link to the same article in another language
SWITCH = re.compile(r"__[^\W\d_]+__")  # __NOTOC__ and its translations
EMPTY_PARENTHESES = re.compile(r" ?[(（][\s,;:]*[)）]")  # what removed templates leave: "Hanoi ( ; )"
FLAGS = re.compile(r"\s*(?:[A-Z-]|[a-z]{2,3}(?:-[a-z]+)*)\s*(?:;[\s\w;-]*)?\|")
HIDDEN = re.compile(r"style\s*=.*display\s*:\s*none", re.I | re.S)
QUOTES = re.compile("'{2,}")
TAG = re.compile(
    r"</?(?:abbr|b|bdi|bdo|big|blockquote|br|caption|center|cite|code|col|dd|del|dfn|div|dl|dt|em|font|gallery|h[1-6]|hr|i|"
    r"includeonly|ins|kbd|li|math|mark|noinclude|nowiki|ol|onlyinclude|p|poem|pre|q|ref|references|rp|rt|ruby|s|samp|section|"
    r"small|source|span|strike|strong|sub|sup|syntaxhighlight|table|tbody|td|th|thead|tr|tt|u|ul|var|wbr)\b[^<>]*>",
    re.I,
)
BROKEN = re.compile(
    r"\{\{+[^{}|\n]*\||\{\{+|\}\}+|\[\[+|\]\]+"
)  # of templates and links without an end, or without a beginning
TABLE_LINE = re.compile(r"^[ \t:]*(?:\{\||\|[-}+|]?|!).*\n?", re.M)
# Templates that only dress a part of a sentence, by the argument that they show; without them it would have a hole
FIRST = ("nowrap", "nobr", "small", "smaller", "big", "larger", "abbr", "sic", "smallcaps", "ill")
FIRST += ("interlanguage link", "math", "mvar", "var", "mono", "em", "strong")
FIRST += ("quote", "blockquote", "cquote", "quotation", "nihongo", "vanchor")
DRESS = dict.fromkeys(FIRST, 1) | {"lang": 2}
MEASURES = {"convert", "cvt", "chuyển đổi"}
# Left alone, dropped, or a choice between scripts or spellings: -{zh-hans:计算机; zh-hant:電腦}-
PREPARED = re.compile(
    rf"(?P<verbatim><(?P<name>{'|'.join(VERBATIM)})\b[^<>]*(?<!/)>.*?</(?P=name)\s*>)|"
    r"(?P<hidden><!--.*?(?:-->|\Z)|<includeonly>.*?(?:</includeonly>|\Z))|-\{(?!\{)(?P<choice>(?:(?!-\{|\}-).)*)\}-",
    re.I | re.S,
)


def wiki_text(wikitext: str, media: Iterable[str] = ()) -> str:
    """The prose of a page of a wiki: no templates but those that `_dressed` knows, no tables, references, media; a heading stays
    if text follows it.

    Args:
        media: namespaces in the language of the wiki whose links show no text, files and categories, beside `MEDIA`.
    """
    import mwparserfromhell

    media = MEDIA | {_name(name) for name in media}
    for _ in range(3):  # choices hold others
        wikitext, choices = PREPARED.subn(_prepare, wikitext)
        if not choices or "-{" not in wikitext:
            break
    sections, in_table = [["", ""]], False
    # Quotes are read as text: one without its end would swallow the end of the link or table that it stands in
    for node in mwparserfromhell.parse(wikitext, skip_style_tags=True).nodes:
        if isinstance(node, mwparserfromhell.nodes.Heading):
            sections.append([_plain(node.title.nodes, media).strip(), ""])
            continue
        text = _plain([node], media)
        if isinstance(node, mwparserfromhell.nodes.Text):
            in_table = in_table or re.search(r"^[ \t:]*\{\|", text, re.M) is not None
            # Of a table without its end the lines are left; a line that begins with a bar is none elsewhere either
            text = TABLE_LINE.sub("", text) if in_table else text
        sections[-1][1] += text
    parts = []
    for heading, body in sections:
        body = SWITCH.sub(lambda found: "" if found[0] == found[0].upper() else found[0], body)  # __init__ is none
        body = EMPTY_PARENTHESES.sub("", body)
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip() for line in body.split("\n"))).strip()
        parts += [part for part in (heading, body) if part and body]
    return "\n\n".join(parts)


def _name(title: str) -> str:
    """A namespace as MediaWiki compares it: `_` is a blank, case and composition make no difference."""
    return " ".join(unicodedata.normalize("NFC", title).replace("_", " ").split()).casefold()


def _prepare(found: re.Match) -> str:
    """What comes in the place of a part that the parser does not know or would take for markup."""
    if found["verbatim"]:
        return found[0]
    if found["hidden"] is not None:
        return ""
    flags, _, rest = found["choice"].rpartition("|") if FLAGS.match(found["choice"]) else ("", "", found["choice"])
    # Rules for the page, or for its title, show nothing
    if {"H", "T", "-"} & {flag.strip() for flag in flags.split(";")}:
        return ""
    # Each variant has its code; the first is taken, as good as another. A rule may be `word=>code:word`
    first = re.match(r"\s*(?:[^;:|]*=>\s*)?[a-z]{2,3}(?:-[a-z]+)*\s*:\s*(.*?)\s*(?:;|\Z)", rest, re.S)
    return first[1] if first else rest


def _seen(link, media: frozenset[str]) -> str:
    """What a link shows."""
    title, label = str(link.title).strip(), link.text
    namespace, colon, page = title.partition(":")
    if title.startswith(":"):
        title = title.removeprefix(":").strip()
    # A category, a file, or the same article in another language: beside the text, whatever the label
    elif colon and (
        _name(namespace) in media
        or LANGUAGE.match(title)
        or MEDIA_FILE.fullmatch(title)
        and _name(namespace) != "media"  # which shows the label
    ):
        return ""
    if label is None:
        return _plain(link.title.nodes, media).strip().removeprefix(":")
    if not link.title.strip().startswith(":") and "|" in "".join(map(str, label.filter_text(recursive=False))):
        return ""  # only files take several options
    shown = _plain(label.nodes, media)
    if shown.strip():
        return shown
    # The pipe trick: `[[Paris (Texas)|]]`, `[[Help:Paris, Texas|]]`
    page = title.rpartition(":")[2] if colon else title
    return re.sub(r"\s*[(（][^()（）]*[)）]\s*$|,\s.*$|，.*$|、.*$", "", page.strip())


def _plain(nodes: Iterable, media: frozenset[str]) -> str:
    """What a reader sees of parsed wikitext. A walk of our own: strip_code shows references, file options and categories."""
    from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Template, Text, Wikilink

    shown = []
    for node in nodes:
        if isinstance(node, Text):
            shown.append(_without_leftovers(str(node)))
        elif isinstance(node, Wikilink):
            shown.append(_seen(node, media))
        elif isinstance(node, Template):
            shown.append(_dressed(node, media))
        elif isinstance(node, Tag):
            name = str(node.tag).strip().lower()
            if name == "br":
                shown.append("\n")
            elif node.wiki_markup == "*":
                shown.append("-")
            elif name in VERBATIM and node.contents is not None:
                text = "".join(_verbatim(part) for part in node.contents.nodes)
                shown.append(re.sub("</?nowiki>", "", text, flags=re.I) if name == "pre" else text)
            elif (
                name not in UNSEEN
                and node.contents is not None
                and not any(map(HIDDEN.search, map(str, node.attributes)))
            ):
                shown.append(_plain(node.contents.nodes, media))
        elif isinstance(node, ExternalLink):
            shown.append(_plain(node.title.nodes, media) if node.title else "" if node.brackets else str(node.url))
        elif isinstance(node, HTMLEntity):
            shown.append(_verbatim(node))
    return "".join(shown)


def _dressed(template, media: frozenset[str]) -> str:
    """What a template shows within a sentence: a measure as it is given, what `DRESS` says; nothing of all others."""
    name = _name(str(template.name))
    if name.startswith("formatnum:"):
        return _plain(template.name.nodes, media).partition(":")[2].strip()
    if name in MEASURES:
        given = [_plain(each.value.nodes, media).strip() for each in template.params if not each.showkey]
        numbers = itertools.takewhile(lambda each: re.match(r"[\d.,+−-]+|(?:to|and|or|by|x|đến|và)\Z", each), given[:9])
        return " ".join(given[: len(list(numbers)) + 1])
    place = DRESS.get(name)
    shown = next((key for key in (place, "text") if place and template.has(key)), None)
    return _plain(template.get(shown).value.nodes, media).strip() if shown else ""


def _verbatim(node) -> str:
    return node.normalize() if type(node).__name__ == "HTMLEntity" else str(node)


def _without_leftovers(text: str) -> str:
    """A text without the markup that has no end, or no beginning: quotes count by the line, and a tag alone does nothing."""
    if "<" in text:
        text = TAG.sub(lambda tag: "\n" if re.match(r"</?(?:br|p|div|li|tr)\b", tag[0], re.I) else "", text)
    text = BROKEN.sub("", text) if re.search(r"\{\{|\}\}|\[\[|\]\]", text) else text
    return QUOTES.sub(lambda quotes: "'" if len(quotes[0]) == 4 else "'" * max(0, len(quotes[0]) - 5), text)
