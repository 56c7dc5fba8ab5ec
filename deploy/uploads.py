"""The text of a file that somebody opens on the page: read right, or refused in one line. Called by text_pages.py."""

import re
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

from deploy.pdf_text import DAMAGED, LOCKED, LONGEST, SECONDS
from deploy.texts import t
from shared import UserError
from shared.data.charsets import encoding_of

KINDS = ("txt", "md", "pdf")
LARGEST_MB = 10
_two_at_once = threading.BoundedSemaphore(2)


def read_upload(name: str, content: bytes, problems: list[str] | None = None) -> str:
    """The text of a .txt, .md or .pdf, in NFC (a PDF may hold accents apart from their letters), its lines ended by \\n.

    Args:
        problems: gets what has to be said of a text that is not the whole file.

    Raises:
        UserError: in the session's language: another kind, too large, encrypted, without text, damaged, in no Unicode encoding.
    """
    kind = Path(name).suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UserError(t("file_kind", name))
    if len(content) > LARGEST_MB << 20:
        raise UserError(t("file_large", name, LARGEST_MB))
    text, bare = _of_pdf(name, content) if kind == "pdf" else (_of_characters(name, content), 0)
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    # Blank lines in front stay: places in the text are lines of the file
    text = text.lstrip("\ufeff").rstrip()
    if not re.search(r"\w", text):
        raise UserError(t("file_scanned" if kind == "pdf" else "file_empty", name))
    if len(text) > LONGEST:
        raise UserError(t("file_long", name, LONGEST))
    if bare and problems is not None:
        problems.append(t("file_part_scanned", name, bare))
    return text


def _of_characters(name: str, content: bytes) -> str:
    try:
        text = content.decode(encoding_of(content[:4096]))
    except UnicodeDecodeError:
        raise UserError(t("file_encoding", name)) from None
    if "\0" in text:
        raise UserError(t("file_binary", name))
    return text


def _of_pdf(name: str, content: bytes) -> tuple[str, int]:
    command, root = [sys.executable, "-m", "deploy.pdf_text"], Path(__file__).parents[1]
    try:
        with _two_at_once:
            done = subprocess.run(command, input=content, capture_output=True, timeout=3 * SECONDS, cwd=root)
    except subprocess.TimeoutExpired:
        raise UserError(t("file_slow", name)) from None
    if done.returncode:
        reasons = {LOCKED: "file_locked", DAMAGED: "file_damaged"}
        raise UserError(t(reasons.get(done.returncode, "file_slow"), name))  # else it was ended: time or memory
    bare, _, text = done.stdout.decode("utf8").partition("\n")
    return text, int(bare)
