"""The text of a PDF, in a process of its own: one that was made to take hours or gigabytes ends nothing else.

python -m deploy.pdf_text < report.pdf      # as uploads.py starts it; the exit code says why there is no text
"""

import contextlib
import io
import logging
import sys

LONGEST = 500_000  # characters; far more than any model here reads, and still quick in a browser
SECONDS, MEMORY = 20, 2 << 30
LOCKED, DAMAGED = 3, 4


def text_of_pdf(content: bytes) -> tuple[str, int]:
    """The text of its pages, an empty line between two; of a long one those up to more than LONGEST characters. And how many of
    them are pictures without text.

    Raises:
        PermissionError: it opens only with a password.
        Exception: of any kind, it is damaged.
    """
    from pypdf import PdfReader

    from shared.data.charsets import holds_pictures, whole_words

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise PermissionError
    pages, length, bare = [], 0, 0
    for page in reader.pages:
        pages.append(whole_words(page.extract_text()))
        length += len(pages[-1])
        bare += not pages[-1].strip() and holds_pictures(page)
        if length > LONGEST:
            break
    return "\n\n".join(pages), bare


def main() -> int:
    """From standard input to standard output, in UTF-8, below a line with the number of pages that are pictures without text; 0,
    LOCKED or DAMAGED.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        text, bare = text_of_pdf(sys.stdin.buffer.read())
        sys.stdout.buffer.write(f"{bare}\n{text}".encode("utf8", "replace"))
    except PermissionError:
        return LOCKED
    except Exception:  # on damaged files pypdf raises nearly everything
        return DAMAGED
    return 0


if __name__ == "__main__":
    sys.exit(main())
