"""What every task uses, in packages whose imports point one way: see README.md. Knows no task."""

import re
import unicodedata

_OPEN_SYLLABLE = re.compile(r"(?i)(?:(o)([àáảãạèéẻẽẹ])|(?<!q)(u)([ỳýỷỹỵ]))(?![\w\u0300-\u036f])")


class UserError(Exception):
    """A foreseeable mistake: the message says cause, place and remedy in one or two lines; the command exits with code 2."""


def one_spelling(text: str) -> str:
    """Composed letters (NFC), and the tone of open Vietnamese syllables in its older place: `hòa`, `khỏe`, `thủy` for `hoà`,
    `khoẻ`, `thuỷ`. Both are in use, often in one text. For comparing texts, not for showing them; as long as NFC's text.
    """

    def older(found: re.Match) -> str:
        first, second = (part for part in found.groups() if part)
        vowel, tone = unicodedata.normalize("NFD", second)
        return unicodedata.normalize("NFC", first + tone) + vowel

    return _OPEN_SYLLABLE.sub(older, unicodedata.normalize("NFC", text))
