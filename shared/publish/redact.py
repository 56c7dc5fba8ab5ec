"""No file of a run may hold a token or a path of this machine. Used by whatever writes into a run folder."""

import os
import re
import sys
import tempfile
from pathlib import Path

TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")
SECRET_FLAG = re.compile(
    r"(--(?:hub_)?token|--\w*(?:api_key|password)|\b[A-Z_]*(?:TOKEN|API_KEY|PASSWORD|SECRET)(?==))[ =]\S+"
)
ABSOLUTE_PATH = re.compile(
    r"""(["'])(?:file://)?/[^"']*?([^/"']+)/?\1|(?<![\w:/.<])(?:file://)?(?:/|[A-Za-z]:\\)[^\s"'`,;)]+"""
)
UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)  # controls, text direction, surrogates


def redact(text: str) -> str:
    """Text without Hub tokens, without this machine's folders, without characters that do not show."""
    folders = {os.getcwd(): ".", str(Path.home()): "~", tempfile.gettempdir(): "...", sys.prefix: "..."}
    for folder in sorted(folders, key=len, reverse=True):
        if folder.count(os.sep) and folder != os.sep:
            text = re.sub(re.escape(folder) + r"(?![\w-])", lambda _, short=folders[folder]: short, text)
    return UNSEEN.sub("", TOKEN.sub("hf_***", text))


def without_paths(text: str) -> str:
    """As `redact`; also without secret flags, and of each absolute path only the last part. For commands and facts."""
    text = SECRET_FLAG.sub(r"\1 ***", redact(text))

    def last_part(found: re.Match) -> str:
        mark = found[1] or ""
        return mark + ".../" + re.split(r"[/\\]", found[0].strip("\"'").rstrip("/\\"))[-1] + mark

    return ABSOLUTE_PATH.sub(last_part, text)
