"""A web page and the site around it, politely and resumably. Called by build.py."""

import contextlib
import functools
import mimetypes
import re
import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urldefrag, urljoin, urlsplit

from shared import UserError
from shared.corpora.readers import LARGEST, decode, log

AGENT = "lm-taskbook"

TRIES, HOPS = 3, 5
ANSWER, WHOLE = 20.0, 60.0  # seconds without a byte, seconds for a page
LONGEST_WAIT = 120.0  # seconds, however long a server asks to wait
LONGEST_DELAY = 60.0  # seconds between requests that a site may ask for; 100 pages take 100 minutes then
# Parameters that say where a reader comes from and never which page it is: `cid` and `source` may do so, `?12` without `=` too
TRACKERS = re.compile(
    r"(?:utm|mtm|pk|hsa|itm|vero|oly)_\w+|(?:fbcl|gcl|dcl|ycl|twcl|ttcl|msclk|gbra|wbra)id|mc_[ce]id|igshid|_gl|_ga|(?:php|j)?session_?(?:id)?|phpsessid",
    re.I,
)
UNSAFE = re.compile(r"%(?![0-9a-fA-F]{2})|[^!-~]|[\"<>\\^`{|}]")  # what browsers write as %20, and a % that begins none
NO_FOLLOWING = {"nofollow", "none"}  # of robots, in a page or its X-Robots-Tag
SOON = 30  # seconds after which a page may pass its reader on to another and still be no page of its own
NOT_PAGES = re.compile(r"(image|video|audio|font)/|application/(pdf|zip|x-tar|x-7z|java-archive|octet-stream)")


class _PassedOver(Exception):
    """Why a page gives no document."""


def _site(url: str) -> str:
    """Host and port; http and https, with and without www, are one site."""
    return urlsplit(url).netloc.lower().removeprefix("www.")


def _normal(url: str, base: str = "") -> str | None:
    """Absolute, percent-encoded, without fragment, default port and trackers, else as it is; None for what is no page."""
    try:
        parts = urlsplit(urldefrag(urljoin(base, url.strip())).url)
        host = parts.netloc.lower() if parts.netloc.isascii() else parts.netloc.lower().encode("idna").decode()
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    if port == {"http": 80, "https": 443}[parts.scheme]:
        host = host.removesuffix(f":{port}")
    path = re.sub("(?<!:)/{2,}", "/", parts.path or "/")
    path = urljoin("/", path) if "/." in path else path  # without `..`
    query = "&".join(part for part in parts.query.split("&") if part and not TRACKERS.fullmatch(part.partition("=")[0]))
    path, query = (UNSAFE.sub(lambda found: quote(found[0], safe=""), part) for part in (path, query))
    url = f"{parts.scheme}://{host}{path}" + (f"?{query}" if query else "")
    return url if len(url) <= 2000 else None


def _characters(header: str) -> str:
    """A header as browsers read it: `http.client` takes bytes of UTF-8 for Latin-1."""
    try:
        return header.encode("latin-1").decode("utf8")
    except UnicodeError:
        return header


def _tree(html: str):
    """The page as lxml reads it, None where it does not."""
    import lxml.etree
    import lxml.html

    try:
        return lxml.html.document_fromstring(
            html.encode("utf8", "replace"), parser=lxml.html.HTMLParser(encoding="utf8")
        )
    except (lxml.etree.LxmlError, ValueError):
        return None


def _words(value: str | None) -> set[str]:
    """The words of an attribute such as rel, or of robots' content, in lower case."""
    return set(re.split(r"[\s,;]+", (value or "").lower()))


def _base(tree, url: str) -> str:
    return _normal(next(iter(tree.xpath("//base/@href")), ""), url) or url


def _refresh(html: str, url: str) -> str | None:
    """Where `<meta http-equiv="refresh">` passes the reader on to, if soon: many a start page holds nothing else."""
    tree = _tree(html) if re.search(r"http-equiv\s*=\s*[\"']?\s*refresh", html, re.I) else None
    for meta in [] if tree is None else tree.xpath("//meta[@http-equiv][@content][not(ancestor::noscript)]"):
        # As browsers read it: seconds, a separator, `url=` or not, quotes or not
        content = re.fullmatch(
            r"""\s*(\d*)[\d.]*(?:\s*[;,]\s*|\s+)(?:url\s*=\s*)?(["']?)(.+?)\2\s*""", meta.get("content"), re.I | re.S
        )
        if meta.get("http-equiv").strip().lower() == "refresh" and content and int(content[1] or 0) <= SOON:
            return _normal(content[3], _base(tree, url))
    return None


def _links(html: str, url: str) -> list[str]:
    """Pages of the same site that a page links to, in its order; none where the page asks not to follow them."""
    if (tree := _tree(html)) is None:
        return []
    for meta in tree.xpath("//meta[@name]"):
        if meta.get("name").strip().lower() in ("robots", AGENT) and _words(meta.get("content")) & NO_FOLLOWING:
            return []
    base = _base(tree, url)
    found = (_normal(a.get("href"), base) for a in tree.xpath("//a[@href]") if "nofollow" not in _words(a.get("rel")))
    kind = functools.cache(lambda link: mimetypes.guess_type(urlsplit(link).path)[0] or "")
    return [
        link for link in dict.fromkeys(found) if link and _site(link) == _site(url) and not NOT_PAGES.match(kind(link))
    ]


class _Browser:
    """Requests to one site: one at a time, `delay` seconds apart, only where robots.txt allows."""

    def __init__(self, start: str, delay: float):
        import urllib3
        from protego import Protego  # the standard library's parser knows no wildcards and would fetch what they forbid

        self.site, self.delay, self.last = _site(start), delay, 0.0
        timeout = urllib3.Timeout(connect=ANSWER, read=ANSWER)
        headers = {"User-Agent": AGENT, **urllib3.util.make_headers(accept_encoding=True)}
        self.pool = urllib3.PoolManager(num_pools=2, headers=headers, timeout=timeout, retries=False)
        self.rules = Protego.parse("")
        try:
            text = self.get(urljoin(start, "/robots.txt"))[1]
        except _PassedOver as reason:
            # RFC 9309: a 4xx allows everything, a server that does not answer nothing
            text = "" if re.match("HTTP 4(?!29)", str(reason)) else None
            if text is None:
                raise UserError(
                    f"{self.site}: robots.txt cannot be read ({reason}), so no page is. Try again later."
                ) from None
        self.rules = Protego.parse(text)
        rate = self.rules.request_rate(AGENT)
        asked = max(self.rules.crawl_delay(AGENT) or 0, rate.seconds / rate.requests if rate and rate.requests else 0)
        if asked > LONGEST_DELAY:
            raise UserError(
                f"{self.site}: robots.txt asks for {asked:,.0f} seconds between requests (Crawl-delay); over "
                f"{LONGEST_DELAY:.0f} no crawl is begun. Ask the site for a copy of its texts."
            )
        if asked > delay:
            log.info("%s: robots.txt asks for %g seconds between requests", self.site, asked)
        self.delay = max(delay, asked)

    def get(self, url: str) -> tuple[str, str, str, bool]:
        """(final URL, characters, content type, whether links may be followed) of a page, after redirects within the site.

        Raises:
            _PassedOver: with the reason.
        """
        seen = set()
        for _ in range(HOPS):
            seen.add(url)
            if not self.rules.can_fetch(url, AGENT):
                raise _PassedOver("robots.txt")
            status, headers, data = self._request(url)
            if status not in (301, 302, 303, 307, 308):
                kind, _, parameters = (headers.get("Content-Type") or "text/html").partition(";")
                kind, charset = kind.strip().lower(), re.search(r"""charset\s*=\s*["']?([\w.:-]+)""", parameters, re.I)
                text = decode(data, charset and charset[1])
                target = _refresh(text, url) if kind != "text/plain" else None
                if target is None or target in seen or _site(target) != self.site or len(seen) == HOPS:
                    return url, text, kind, not _words(headers.get("X-Robots-Tag")) & NO_FOLLOWING
            else:
                target = _normal(_characters(headers.get("Location", "")), url)
            if not target or _site(target) != self.site:
                raise _PassedOver("redirect off the site")
            url = target
        raise _PassedOver("too many redirects")

    def _request(self, url: str) -> tuple[int, dict, bytes]:
        """One page with retries; the wait doubles each time, or is what the server asks for."""
        import urllib3

        reason, wait = "", self.delay
        for attempt in range(TRIES):
            time.sleep(max(0.0, self.last + wait - time.monotonic()))
            try:
                with self.pool.request("GET", url, redirect=False, preload_content=False) as response:
                    if response.status == 429 or response.status >= 500:
                        reason = f"HTTP {response.status}"
                        asked = response.headers.get("Retry-After", "")
                        wait = min(
                            LONGEST_WAIT, max(self.delay * 2 ** (attempt + 1), float(asked) if asked.isdigit() else 0)
                        )
                        continue
                    if response.status in (301, 302, 303, 307, 308):
                        return response.status, response.headers, b""
                    if response.status != 200:
                        raise _PassedOver(f"HTTP {response.status}")
                    kind = (response.headers.get("Content-Type") or "text/html").split(";")[0].strip().lower()
                    # Of what type robots.txt is sent matters to nobody, its rules do
                    if kind not in ("text/html", "application/xhtml+xml", "text/plain") and not url.endswith(
                        "/robots.txt"
                    ):
                        raise _PassedOver(f"content of type {kind}")
                    return 200, response.headers, self._body(response)
            except urllib3.exceptions.HTTPError as error:
                reason, wait = f"no answer: {type(error).__name__}", min(LONGEST_WAIT, self.delay * 2 ** (attempt + 1))
            finally:
                self.last = time.monotonic()
        raise _PassedOver(reason)

    @staticmethod
    def _body(response) -> bytes:
        data, deadline = bytearray(), time.monotonic() + WHOLE
        said = response.headers.get("Content-Length", "")
        if said.isdecimal() and int(said) > LARGEST:  # some servers say nonsense
            raise _PassedOver(f"over {LARGEST:,} bytes")
        # Decompressed, since a small answer may unpack to gigabytes; read1, since read waits until the amount is there.
        while chunk := response.read1(1 << 14):
            data += chunk
            if len(data) > LARGEST:
                raise _PassedOver(f"over {LARGEST:,} bytes")
            if time.monotonic() > deadline:
                raise _PassedOver(f"over {WHOLE:.0f} seconds")
        return bytes(data)


def crawl(
    start: str, state: str | Path, *, depth: int = 0, max_pages: int = 100, delay: float = 1.0
) -> Iterator[dict | str]:
    """Streams a web page and, up to `depth` links away, the pages of its site; breadth first.

    Every answer is kept in `state` (SQLite) before the next request, so after a kill the same call repeats none of them; what
    failed for want of an answer is tried again. Robots.txt is obeyed and read anew at each call.

    Args:
        state: may hold several sites; delete it to fetch the pages anew.
        max_pages: requested in all, failures included.
        delay: seconds between requests; a longer Crawl-delay in robots.txt counts.

    Raises:
        UserError: no valid address, or a site whose robots.txt cannot be read, or asks for more than LONGEST_DELAY.
    """
    url = _normal(start)
    if not url:
        raise UserError(f"{start}: not the address of a page; expected https://...")
    with contextlib.closing(sqlite3.connect(state, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS pages (number INTEGER PRIMARY KEY, start TEXT, url TEXT, depth INTEGER, "
            "outcome TEXT, final TEXT, kind TEXT, content BLOB, UNIQUE (start, url))"
        )
        db.execute(
            "UPDATE pages SET outcome = NULL WHERE outcome LIKE 'no answer%' OR outcome LIKE 'HTTP 5%' OR outcome = 'HTTP 429'"
        )
        add = "INSERT OR IGNORE INTO pages (start, url, depth) VALUES (?, ?, ?)"
        db.execute(add, (url, url, 0))
        browser, number, requested = None, 0, 0
        following = (
            "SELECT number, url, depth, outcome, final, kind, content FROM pages "
            "WHERE start = ? AND depth <= ? AND number > ? ORDER BY number LIMIT 1"
        )
        while page := db.execute(following, (url, depth, number)).fetchone():
            number, address, level, outcome, final, kind, content = page
            if outcome is None:
                if requested >= max_pages:
                    break
                browser = browser or _Browser(url, delay)
                outcome, final, kind, content, links = _visit(browser, address)
                if outcome == "ok" and final != address:  # the page has two addresses: it must not be fetched twice
                    known = db.execute("SELECT outcome FROM pages WHERE start = ? AND url = ?", (url, final)).fetchone()
                    outcome = "redirect to a page fetched before" if known and known[0] else outcome
                db.execute("BEGIN")
                db.execute(
                    "UPDATE pages SET outcome = ?, final = ?, kind = ?, content = ? WHERE number = ?",
                    (outcome, final, kind, content, number),
                )
                db.executemany(add, [(url, link, level + 1) for link in links])
                if outcome == "ok" and final != address:
                    db.execute(add, (url, final, level))
                    db.execute("UPDATE pages SET outcome = 'seen' WHERE start = ? AND url = ?", (url, final))
                db.execute("COMMIT")
            if outcome == "seen":
                continue
            requested += outcome != "robots.txt"
            if outcome != "ok":
                log.warning("%s: passed over: %s", address, outcome)
                yield outcome
            else:
                text = zlib.decompress(content).decode("utf8", "surrogatepass")
                yield {"text" if kind == "text/plain" else "html": text, "source": final}


def _visit(browser: _Browser, url: str) -> tuple[str, str | None, str | None, bytes | None, list[str]]:
    """Outcome, final URL, content type, compressed characters and links of a page."""
    try:
        final, text, kind, follow = browser.get(url)
    except _PassedOver as reason:
        return str(reason), None, None, None, []
    links = _links(text, final) if follow and kind != "text/plain" else []
    return "ok", final, kind, zlib.compress(text.encode("utf8", "surrogatepass")), links
