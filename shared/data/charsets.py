"""What encoding a file was saved in, and the Vietnamese of before Unicode. Called by files.py and shared/corpora.

TCVN3, VNI and VISCII put Vietnamese letters where Western encodings have others: "Việt Nam" was stored as "ViÖt Nam",
"Vieät Nam", "Vi®t Nam". Such a text may lie in a file as these bytes, or as UTF-8 of the wrong letters. A text is taken
for one of them only where nearly all its words with marks become syllables that Vietnamese has: other languages stay as they are.
"""

import codecs
import functools
import re
import unicodedata
from collections.abc import Mapping

SAMPLE = 1 << 20  # bytes of a file that are looked at
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32's mark begins with UTF-16's
ENOUGH = 5  # different syllables with marks: fewer may be chance

ACUTE_GRAVE_HOOK_TILDE_DOT = "\u0301\u0300\u0309\u0303\u0323"
_TCVN3 = (  # from 0xA0
    "\xa0ĂÂÊÔƠƯĐăâêôơưđẰ°±²³´àảãáạẲằẳẵắẴẮẦẨẪẤỀặầẩẫấậèỂẻẽéẹềểễếệìỉỄẾỒĩíịòỔỏõóọồổỗốộờởỡớợùỖủũúụừửữứựỳỷỹýỵỐ"
)
_VISCII = (  # from 0x80
    "ẠẮẰẶẤẦẨẬẼẸẾỀỂỄỆỐỒỔỖỘỢỚỜỞỊỎỌỈỦŨỤỲ"
    "ÕắằặấầẩậẽẹếềểễệốồổỗỠƠộờởịỰỨỪỬơớƯ"
    "ÀÁÂÃẢĂẳẵÈÉÊẺÌÍĨỳĐứÒÓÔạỷừửÙÚỹỵÝỡư"
    "àáâãảăữẫèéêẻìíĩỉđựòóôõỏọụùúũủýợỮ"
)
_VNI = dict(zip("ùøûõï", ACUTE_GRAVE_HOOK_TILDE_DOT, strict=True))
_VNI |= {"â": "\u0302"} | {old: f"\u0302{tone}" for old, tone in zip("áàåãä", ACUTE_GRAVE_HOOK_TILDE_DOT, strict=True)}
_VNI |= {"ê": "\u0306"} | {old: f"\u0306{tone}" for old, tone in zip("éèúüë", ACUTE_GRAVE_HOOK_TILDE_DOT, strict=True)}
_VNI |= {"ñ": "đ", "ö": "ư", "ô": "ơ", "í": "í", "ì": "ì", "æ": "ỉ", "ó": "ĩ", "ò": "ị", "î": "ỵ"}

ONSET = "ngh|ng|nh|gh|gi|kh|ph|qu|th|tr|ch|[bcdđghklmnpqrstvx]"
RHYME = (
    "(?:uyê|iê|yê|ươ|uô|oa|oă|oe|oo|ôô|uâ|uê|uy|uơ|[aăâeêioôơuưy])(?:ch|nh|ng|[cmnpt])|"
    "iêu|yêu|ươu|oai|oay|oao|oeo|uây|uôi|ươi|uya|uyu|ia|ua|ưa|oa|oe|uê|uy|uơ|ai|ao|au|ay|âu|ây|eo|êu|iu|oi|ôi|ơi|ui|ưi|ưu|"
    "[aeêioôơuưy]"
)
SYLLABLE = re.compile(f"(?:{ONSET})?(?:{RHYME})")
TONE = re.compile(f"[{ACUTE_GRAVE_HOOK_TILDE_DOT}]")
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
OTHERS = re.compile(f"[^\\x00-\\xff{''.join(bytes([byte]).decode('cp1252', 'ignore') for byte in range(0x80, 0xA0))}]")
WORD = re.compile(r"[^\W\d_]+")


def _tables() -> dict[str, dict[int, str]]:
    """For each old encoding what Western letters stand for, by their code point; whether a byte was read as Latin-1 or cp1252."""
    high = {byte: bytes([byte]).decode("cp1252", "replace").replace("\ufffd", chr(byte)) for byte in range(0x80, 0x100)}
    old = {
        "TCVN3": dict(enumerate(_TCVN3, 0xA0)),
        "VISCII": dict(enumerate(_VISCII, 0x80)),
        "VNI": {ord(old): new for old, new in _VNI.items()}
        | {ord(old.upper()): new.upper() for old, new in _VNI.items()},
        "windows-1258": {
            byte: bytes([byte]).decode("cp1258", "replace").replace("\ufffd", western) for byte, western in high.items()
        },
    }
    return {
        name: {code: table.get(byte, western) for byte, western in high.items() for code in {byte, ord(western)}}
        for name, table in old.items()
    }


OLD: Mapping[str, dict[int, str]] = _tables()


def encoding_of(head: bytes) -> str:
    """Python's name of the encoding that the first bytes of a text say: UTF-16 or 32, else UTF-8, which it need not be."""
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(head) > 3:
        zeros = [head[i::2].count(0) / len(head[i::2]) for i in (0, 1)]
        if max(zeros) > 0.4 and min(zeros) < 0.1:  # UTF-16 without a mark: every other byte of English text is 0
            encoding = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return encoding


def is_syllable(word: str) -> bool:
    """Whether a word in composed letters could be a Vietnamese syllable: at most one tone, an onset and a rhyme that exist."""
    bare, tones = TONE.subn("", unicodedata.normalize("NFD", word.lower()))
    return tones < 2 and SYLLABLE.fullmatch(unicodedata.normalize("NFC", bare)) is not None


def to_unicode(text: str, old: str) -> str:
    """A text in one of the encodings of `OLD`, whose bytes were taken for Western letters, as the Vietnamese that was meant."""
    return unicodedata.normalize("NFC", text.translate(OLD[old]))


def old_vietnamese(text: str) -> str | None:
    """The encoding of `OLD` that makes Vietnamese of a text, None for any other text, Vietnamese in Unicode included."""
    text = text[:100_000]
    others = len(OTHERS.findall(text))
    if text.isascii() or others > 0.05 * len(BEYOND_ASCII.findall(text)) or (as_it_is := _marked(text)[0]) > 0.85:
        return None
    found = {}
    for name in OLD:
        share, of_all, kinds = _marked(to_unicode(text, name))
        if share > max(0.9, as_it_is + 0.1) and of_all > 0.1 and kinds >= ENOUGH:
            found[name] = share
    return max(found, key=found.get, default=None)


def _marked(text: str) -> tuple[float, float, int]:
    """Of the words that are not ASCII the share that are Vietnamese syllables, their share of all words, how many with
    two letters or more differ."""
    words = WORD.findall(unicodedata.normalize("NFC", text))
    marked = [word for word in words if not word.isascii()]
    good = [word.lower() for word in marked if is_syllable(word)]
    return (
        len(good) / max(1, len(marked)),
        len(good) / max(1, len(words)),
        len({word for word in good if len(word) > 1}),
    )


def likely_encoding(data: bytes) -> str:
    """The name, for Python, of the encoding that bytes that are not UTF-8 are most likely in; `OLD` is not among them.

    A guess: of few bytes it is Western Europe's, since a word alone fits many encodings.
    """
    western = data.decode("cp1252", "replace")
    special = [character for character in western if not character.isascii()]
    plain = sum(character in WESTERN for character in special)
    if plain == len(special) < 0.4 * len(data):
        # Of Central Europe only Hungarian has letters that all look Western: ő is õ, ű is û
        other = set(data.decode("cp1250", "replace")) - set(western)
        hungarian = other and other <= set("őűŐŰ") and len(special) > 40 and _guess(data) in ("cp1250", "iso8859-2")
        return "cp1250" if hungarian else "cp1252"
    return len(special) > 5 and _guess(data) or "cp1252"


# Of mainframes and the like: to charset_normalizer they are as likely as any
RARE = ["cp037", "cp273", "cp424", "cp500", "cp875", "cp1006", "cp1026", "cp1140", "hp_roman8", "kz1048", "ptcp154"]
WESTERN = frozenset("àâäáãåæçèéêëìíîïñòóôöõøœùúûüÿßÀÂÄÁÃÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÖÕØŒÙÚÛÜ«»’‘“”„–—…€£§°¿¡ºª·´\xa0")


@functools.lru_cache(16)
def _guess(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(data, cp_exclusion=RARE).best()
    name = codecs.lookup(best.encoding).name if best else None
    return {"euc_jis_2004": "euc_jp", "euc_jisx0213": "euc_jp", "shift_jis_2004": "cp932"}.get(name, name)


def unix_name(encoding: str) -> str:
    """A name of Python as `iconv` writes it: cp1252 is WINDOWS-1252."""
    name = codecs.lookup(encoding).name.upper().replace("_", "-")
    name = re.sub(r"^CP(125\d|874)$", r"WINDOWS-\1", name)
    return re.sub(r"^ISO8859", "ISO-8859", name).replace("MAC-ROMAN", "MACINTOSH")


def whole_words(page: str) -> str:
    """The text of a page of a PDF without the hyphens that divide a word at the end of a line; one that the word has elsewhere on
    the page stays."""

    def whole(found: re.Match) -> str:
        if not found[2][0].islower():
            return found[0]
        compound = f"{found[1]}-{found[2]}"
        return compound if compound in page else found[1] + found[2]

    return re.sub(r"([^\W\d_]+)[-\u2010\xad] ?\n([^\W\d_]+)", whole, page)


def holds_pictures(page) -> bool:
    """Whether a page of a PDF, pypdf's, shows a picture: without text it may be a scanned one."""
    try:
        parts = page["/Resources"]["/XObject"].values()
    except KeyError:
        return False
    return any(part.get_object().get("/Subtype") in ("/Image", "/Form") for part in parts)
