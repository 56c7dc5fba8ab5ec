"""Corpora: every kind of source, a web server that misbehaves, a dump, resuming after kill -9, the report, flat memory."""

import bz2
import contextlib
import csv
import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from checkout import ROOT

from shared import UserError
from shared.corpora import crawl as web
from shared.corpora.build import BATCH, build, main, ordered_map, prepare, with_text
from shared.corpora.crawl import crawl
from shared.corpora.readers import decode, documents, local_files
from shared.corpora.wikitext import wiki_text
from shared.data.charsets import OLD
from shared.data.cleaning import LONGEST, CleaningReport, language
from shared.data.files import PIECE, pieces
from shared.data.near_duplicates import shingles

VIETNAMESE = "Hà Nội là thủ đô của nước Cộng hòa xã hội chủ nghĩa Việt Nam và có nhiều hồ đẹp."
LONG_VIETNAMESE = VIETNAMESE + (
    " Mùa thu trời trong xanh, người dân thường đi dạo quanh hồ vào buổi sáng sớm. Sau giờ làm việc, nhiều gia đình ra "
    "chợ mua rau quả tươi rồi cùng nhau nấu bữa tối. Trẻ em học ở trường gần nhà, cuối tuần chơi bóng đá trong công viên."
)
SYLLABLES = ["ka", "lo", "mi", "ren", "sta", "tor", "vel", "wun", "zor", "qui", "bram", "dol", "fen", "gris", "hap"]


def prose(seed: int, words: int = 80) -> str:
    """Sentences that no other seed gives."""
    rng = random.Random(seed)
    text = ["".join(rng.choices(SYLLABLES, k=rng.randrange(1, 4))) for _ in range(words)]
    return " ".join(word.capitalize() + "." if i % 12 == 11 else word for i, word in enumerate(text))


def read(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf8") if path.suffix == ".gz" else open(path, encoding="utf8") as lines:
        return [json.loads(line) for line in lines]


def corpus(rows, path, **options) -> tuple[list[dict], CleaningReport]:
    report = build(rows, path, **options)
    assert report.read == report.kept + report.dropped.total() and report.kept == len(read(path))
    return read(path), report


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "shared.corpora", *map(str, arguments)]


# The web: a server whose pages are functions of the handler, and a log of what was asked.


class Server:
    def __init__(self):
        self.pages, self.asked, self.times, self.agents = {}, [], [], set()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                server.times.append(time.monotonic())
                server.agents.add(self.headers["User-Agent"])
                page = server.pages.get(self.path)
                try:
                    if page is None:
                        self.send_error(404)
                    elif callable(page):
                        page(self)
                    else:
                        answer(self, page)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had enough

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def answer(handler, body: str | bytes, status: int = 200, **headers):
    body = body.encode() if isinstance(body, str) else body
    handler.send_response(status)
    headers = {"Content_Type": "text/html", "Content_Length": str(len(body))} | headers
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def html(title: str, seed: int, *links: str, head: str = "", text: str | None = None) -> str:
    paragraphs = [text] if text else [prose(10 * seed + i, 60) for i in range(3)]
    anchors = "".join(f'<li><a href="{link}">to {link}</a></li>' for link in links)
    body = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return (
        f"<html><head><title>{title}</title>{head}</head><body><nav><ul>{anchors}</ul></nav>"
        f"<article><h1>{title}</h1>{body}</article><footer>All rights reserved, imprint</footer></body></html>"
    )


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def quick(monkeypatch):
    """Time-outs of a fraction of a second."""
    monkeypatch.setattr(web, "ANSWER", 0.4)
    monkeypatch.setattr(web, "WHOLE", 0.5)


def fetched(url, state, **options) -> tuple[dict[str, dict], Counter]:
    """Documents by the path of their page, and the reasons for the pages passed over."""
    rows = list(crawl(url, state, delay=0.01, **options))
    pages = [row for row in rows if isinstance(row, dict)]
    assert len({row["source"] for row in pages}) == len(pages)
    return {"/" + row["source"].split("/", 3)[3]: row for row in pages}, Counter(r for r in rows if isinstance(r, str))


def test_a_site_is_crawled_breadth_first_and_only_its_text_is_kept(server, tmp_path):
    licence = '<a rel="license" href="https://creativecommons.org/licenses/by/4.0/">CC BY</a>'
    server.pages |= {
        "/": html(
            "Start", 1, "/a", "b#part", "http://elsewhere.example/x", "mailto:me@example.org", "/a.png", head=licence
        ),
        "/a": html("Page A", 2, "/", "/c", "/a?"),
        "/b": html("Page B", 3, "/a", "/b", head='<base href="http://[">'),
        "/c": html("Page C", 4, "/d"),
        "/d": html("Page D", 5),
        "/a.png": lambda h: answer(h, b"\x89PNG", Content_Type="image/png"),
        "/a?": html("Page A", 2),
    }
    rows, report = corpus(crawl(server.url, tmp_path / "state", depth=2, delay=0.01), tmp_path / "web.jsonl.gz")
    assert server.asked[:5] == ["/robots.txt", "/", "/a", "/b", "/c"] and "/d" not in server.asked
    assert "/a.png" not in server.asked and server.agents == {"lm-taskbook"}
    assert [row["title"] for row in rows] == ["Start", "Page A", "Page B", "Page C"]
    assert rows[0]["source"] == f"{server.url}/" and rows[0]["license"].startswith("CC BY") and rows[1]["license"] == ""
    assert prose(11, 60) in rows[0]["text"] and "imprint" not in rows[0]["text"] and "to /a" not in rows[0]["text"]
    assert report.kept == 4
    # The page alone, and the limit of pages
    server.asked.clear()
    assert set(fetched(server.url, tmp_path / "one")[0]) == {"/"} and server.asked == ["/robots.txt", "/"]
    assert set(fetched(server.url, tmp_path / "few", depth=9, max_pages=2)[0]) == {"/", "/a"}


def test_robots_txt_is_obeyed(server, tmp_path):
    rules = (
        "User-agent: *\nDisallow: /\n\nUser-agent: lm-taskbook\nDisallow: /private\nDisallow: /*?sort=\nAllow: /private/open\n"
        "Crawl-delay: 0.3\n"
    )
    server.pages["/robots.txt"] = lambda h: answer(h, rules, Content_Type="application/octet-stream")
    links = ("/private/a", "/private/open", "/list?sort=up", "/list?page=2", "/hop")
    server.pages |= {link: html(link, i) for i, link in enumerate(links, 2)}
    server.pages |= {"/": html("Start", 1, *links), "/hop": lambda h: answer(h, "", 302, Location="/private/b")}
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    assert set(pages) == {"/", "/private/open", "/list?page=2"} and reasons == {"robots.txt": 3}
    assert not {"/private/a", "/private/b", "/list?sort=up"} & set(server.asked)
    gaps = [later - earlier for earlier, later in itertools.pairwise(server.times)]
    assert len(gaps) == 4 and min(gaps[1:]) > 0.28
    server.pages["/robots.txt"] = lambda h: answer(h, "", 403)  # a 4xx forbids nothing
    assert "/private/a" in fetched(server.url, tmp_path / "other", depth=1)[0]
    server.asked.clear()
    server.pages["/robots.txt"] = lambda h: answer(h, "", 503)
    with pytest.raises(UserError, match=r"robots\.txt cannot be read \(HTTP 503\)"):
        fetched(server.url, tmp_path / "third")
    assert server.asked == ["/robots.txt"] * web.TRIES


def test_pages_that_ask_not_to_be_followed(server, tmp_path):
    server.pages |= {
        "/": html("Start", 1, "/a", head="") + '<a rel="nofollow" href="/b">b</a>',
        "/a": html("A", 2, "/c", head='<meta name="ROBOTS" content="noarchive, nofollow">'),
        "/b": html("B", 3),
        "/c": html("C", 4),
    }
    assert set(fetched(server.url, tmp_path / "state", depth=3)[0]) == {"/", "/a"}


def test_loops_end(server, tmp_path):
    def endless(number):
        return lambda h: answer(h, html(f"Deep {number}", 100 + number, f"/deep/{number + 1}", "/x", "/y"))

    server.pages |= {f"/deep/{number}": endless(number) for number in range(50)}
    server.pages |= {
        "/": html("Start", 1, "/x", "/y", "/r1", "/self", "/deep/0", "/moved", "/target"),
        "/x": html("X", 2, "/y", "/", "/x"),
        "/y": html("Y", 3, "/x", "/"),
        "/r1": lambda h: answer(h, "", 301, Location="/r2"),
        "/r2": lambda h: answer(h, "", 302, Location="/r1"),
        "/self": lambda h: answer(h, "", 302, Location="/self"),
        "/moved": lambda h: answer(h, "", 308, Location="/target"),
        "/target": html("Target", 4),
    }
    pages, reasons = fetched(server.url, tmp_path / "state", depth=4)
    assert set(pages) == {"/", "/x", "/y", "/deep/0", "/deep/1", "/deep/2", "/deep/3", "/target"}
    assert reasons == {"too many redirects": 2}
    assert server.asked.count("/target") == 1 and server.asked.count("/x") == 1


def test_errors_are_retried_with_growing_waits_then_recorded(server, tmp_path, caplog):
    failures = {"/flaky": 2, "/busy": 1}

    def fail_first(handler):
        failures[handler.path] -= 1
        if failures[handler.path] >= 0:
            wait = {"Retry_After": "1"} if handler.path == "/busy" else {}
            answer(handler, "", 429 if wait else 500, **wait)
        else:
            answer(handler, html(handler.path, 7 + len(handler.path)))

    def cut_off(handler):
        answer(handler, html("Cut", 8)[:300], Content_Length="90000")

    server.pages |= {
        "/": html("Start", 1, "/flaky", "/busy", "/broken", "/gone", "/cut", "/data", "/last"),
        "/flaky": fail_first,
        "/busy": fail_first,
        "/broken": lambda h: answer(h, "", 500),
        "/cut": cut_off,
        "/data": lambda h: answer(h, b"1,2", Content_Type="text/csv"),
        "/last": html("Last", 9),
    }
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    assert set(pages) == {"/", "/flaky", "/busy", "/last"}
    assert reasons == {
        "HTTP 500": 1,
        "HTTP 404": 1,
        "no answer: ProtocolError": 1,
        "content of type text/csv": 1,
    }
    assert server.asked.count("/flaky") == server.asked.count("/broken") == web.TRIES
    assert server.asked.count("/gone") == 1
    asked = {path: [t for p, t in zip(server.asked, server.times, strict=True) if p == path] for path in failures}
    assert asked["/busy"][1] - asked["/busy"][0] >= 1  # what the server asked for
    assert asked["/flaky"][2] - asked["/flaky"][1] > asked["/flaky"][1] - asked["/flaky"][0] - 0.01
    assert f"{server.url}/broken: passed over: HTTP 500" in caplog.text
    # What failed for want of an answer is tried again by the next call; what the server refused is not.
    server.pages["/broken"] = html("Mended", 10)
    server.asked.clear()
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    assert "/broken" in pages and reasons["HTTP 404"] == 1
    assert set(server.asked) == {"/robots.txt", "/broken", "/cut"}


def test_slow_and_silent_pages_are_given_up(server, tmp_path, quick):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(60):
            handler.wfile.write(b"<p>word</p>")
            time.sleep(0.1)

    server.pages |= {
        "/": html("Start", 1, "/drip", "/silent", "/last"),
        "/drip": drip,
        "/silent": lambda h: time.sleep(1.5),
        "/last": html("Last", 2),
    }
    start = time.monotonic()
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    assert set(pages) == {"/", "/last"} and time.monotonic() - start < 5
    assert reasons == {"over 0 seconds": 1, "no answer: ReadTimeoutError": 1}


def test_a_huge_page_is_not_read_to_its_end(server, tmp_path):
    sent = Counter()

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"<p>words</p>" * 10_000)
            sent["bytes"] += 120_000

    bomb = gzip.compress(b"<p>zeros</p>" * 5_000_000)
    server.pages |= {
        "/": html("Start", 1, "/endless", "/said", "/bomb"),
        "/endless": endless,
        "/said": lambda h: answer(h, b"", Content_Length=str(10**9)),
        "/bomb": lambda h: answer(h, bomb, Content_Encoding="gzip"),
    }
    tracemalloc.start()
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(pages) == {"/"} and reasons == {"over 5,000,000 bytes": 3}
    assert sent["bytes"] < 40_000_000 and peak < 40_000_000


def test_a_redirect_off_the_site_is_refused(server, tmp_path):
    other = Server()
    other.pages["/"] = html("Other", 5)
    server.pages |= {
        "/": html("Start", 1, "/away", "/odd"),
        "/away": lambda h: answer(h, "", 302, Location=f"{other.url}/"),
        "/odd": lambda h: answer(h, "", 302, Location="file:///etc/passwd"),
    }
    pages, reasons = fetched(server.url, tmp_path / "state", depth=2)
    assert set(pages) == {"/"} and reasons == {"redirect off the site": 2} and other.asked == []
    other.http.shutdown()
    other.http.server_close()


def test_wrong_charsets(server, tmp_path):
    french = "Le café préféré de l'été où naît l'idée du garçon. " + prose(3)
    declared = '<meta charset="windows-1252">'
    server.pages |= {
        "/": html("Start", 1, "/utf8", "/header", "/meta", "/lies"),
        "/utf8": lambda h: answer(h, html("u", 2, text=VIETNAMESE * 9), Content_Type="text/html; charset=ISO-8859-1"),
        "/header": lambda h: answer(
            h, html("h", 3, text=french).encode("cp1252"), Content_Type="text/html; charset=windows-1252"
        ),
        "/meta": lambda h: answer(h, html("m", 4, head=declared, text=french).encode("cp1252")),
        "/lies": lambda h: answer(
            h, html("l", 5, text=french).encode("cp1252"), Content_Type="text/html; charset=utf-8"
        ),
    }
    pages, _ = fetched(server.url, tmp_path / "state", depth=1)
    assert VIETNAMESE in pages["/utf8"]["html"]
    for page in ("/header", "/meta", "/lies"):
        assert "café préféré de l'été" in pages[page]["html"], page
    assert decode(b"\xef\xbb\xbfabc") == "abc"
    assert decode(french.encode("cp1252"), "no-such-charset").startswith("Le café préféré")  # likely, not certain


def test_a_crawl_goes_on_after_kill_9_without_fetching_again(server, tmp_path):
    links = [f"/{number}" for number in range(12)]
    server.pages |= {"/": html("Start", 99, *links)} | {link: html(link, i) for i, link in enumerate(links)}
    run = command(server.url, "--output", tmp_path / "web.jsonl", "--depth", 1, "--delay", 0.15, "--processes", 1)
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(server.asked) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "web.jsonl").exists()
    with contextlib.closing(sqlite3.connect(tmp_path / "web.jsonl.crawl")) as db:
        stored = {url.removeprefix(server.url) for (url,) in db.execute("SELECT url FROM pages WHERE outcome = 'ok'")}
    before = server.asked.copy()
    assert 4 <= len(stored) < 12
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not stored & set(server.asked[len(before) :])
    assert Counter(server.asked).total() <= 2 + 13 + 1  # robots.txt twice, the page that was under way at the kill
    assert [row["title"] for row in read(tmp_path / "web.jsonl")] == ["Start", *links]
    assert "read 13 = kept 13 + dropped 0" in done.stdout and "web.jsonl.crawl" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web.jsonl", "web.jsonl.crawl", "web.png"]


def test_a_site_that_does_not_answer_is_a_user_error(tmp_path, quick):
    with pytest.raises(UserError, match="robots.txt cannot be read"):
        list(crawl("http://127.0.0.1:9", tmp_path / "state", delay=0.01))
    with pytest.raises(UserError, match="not the address of a page"):
        list(crawl("http://", tmp_path / "state"))


# MediaWiki.

HANOI = f"""{{{{Infobox thành phố|tên=Hà Nội|dân số={{{{formatnum:8000000}}}}}}}}
'''Hà Nội''' ({{{{lang-en|Hanoi}}}}; ) là [[thủ đô]] của [[Việt Nam|nước Việt Nam]].<ref name="x">Nguồn</ref><ref name="x"/>
[[Tập tin:Hanoi.jpg|nhỏ|200px|Ảnh [[Hồ Gươm]] đẹp]]
[[Hình:Khác.png|trái|Một hình khác]]
{VIETNAMESE} {prose(1)}

== Lịch sử ==
{{| class="wikitable"
! Năm !! Dân số
|-
| 1990 || ô bảng
|}}
Thành phố có [[lịch sử]] lâu đời.<br>Dòng mới &amp; [http://example.com trang mạng] [http://example.com/hidden]
* mục ''một''
<!-- không thấy -->
== Tham khảo ==
{{{{tham khảo}}}}
[[Thể loại:Hà Nội]]
[[fr:Hanoï]]
__KHÔNGMỤCLỤC__
"""


def write_dump(path, pages: list[tuple[str, int, str, str]]):
    """A dump as MediaWiki exports it: (title, namespace, text, target of a redirect or nothing)."""
    from xml.sax.saxutils import escape

    with bz2.open(path, "wt", encoding="utf8") as xml:
        xml.write(
            '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="vi"><siteinfo>'
            "<sitename>Wikipedia</sitename><base>https://vi.wikipedia.org/wiki/Trang_Ch%C3%ADnh</base><namespaces>"
            '<namespace key="0" case="first-letter" /><namespace key="1" case="first-letter">Thảo luận</namespace>'
            '<namespace key="6" case="first-letter">Tập tin</namespace>'
            '<namespace key="14" case="first-letter">Thể loại</namespace></namespaces></siteinfo>\n'
        )
        for number, (title, namespace, text, target) in enumerate(pages):
            redirect = f'<redirect title="{target}" />' if target else ""
            xml.write(
                f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>{number}</id>{redirect}<revision><id>1</id>"
                f'<text bytes="9" xml:space="preserve">{escape(text)}</text></revision></page>\n'
            )
        xml.write("</mediawiki>")


def test_a_dump_gives_the_prose_of_its_articles(tmp_path):
    pages = [
        ("Hà Nội", 0, HANOI, ""),
        ("Thủ đô Hà Nội", 0, "#đổi [[Hà Nội]]", "Hà Nội"),
        ("Thảo luận:Hà Nội", 1, "Tôi nghĩ rằng. " + prose(2), ""),
        ("AT&T", 0, prose(3) + "\n", ""),
        ("Bản sao", 0, prose(3) + " thêm\n", ""),
        ("Ngắn", 0, "{{sơ khai}}", ""),
    ]
    write_dump(tmp_path / "viwiki.xml.bz2", pages)
    rows, report = corpus(documents(str(tmp_path / "viwiki.xml.bz2")), tmp_path / "vi.jsonl")
    assert report.dropped == {"redirect": 1, "not an article": 1, "no text in the page": 1, "near-duplicate": 1}
    assert [row["title"] for row in rows] == ["Hà Nội", "AT&T"]
    assert rows[0]["source"] == "https://vi.wikipedia.org/wiki/H%C3%A0_N%E1%BB%99i"
    assert rows[0]["license"] == "cc-by-sa-4.0"
    assert rows[0]["text"] == (
        f"Hà Nội là thủ đô của nước Việt Nam.\n\n{VIETNAMESE} {prose(1)}\n\nLịch sử\n\n"
        "Thành phố có lịch sử lâu đời.\nDòng mới & trang mạng\n- mục một"
    )


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("a [[b|c]] [[d (e)|]] [[:Category:F]]", "a c d Category:F"),
        ("[[File:a.jpg]]x[[Category:Y]]", "x"),
        ("a<ref>b</ref> <nowiki>[[c]]</nowiki> <math>x^2</math>", "a [[c]] x^2"),
        ("== Empty ==\n\n== Full ==\ntext", "Full\n\ntext"),
        ("{{a|{{b|[[c]]}}", ""),
        ("<gallery>\nFile:a.jpg|caption\n</gallery>b", "b"),
    ],
)
def test_wiki_text(wikitext, text):
    assert wiki_text(wikitext) == text


def test_a_truncated_dump_keeps_what_was_read(tmp_path, caplog):
    write_dump(tmp_path / "whole.xml.bz2", [(f"A{i}", 0, prose(i, 4000), "") for i in range(60)])
    data = (tmp_path / "whole.xml.bz2").read_bytes()
    (tmp_path / "cut.xml.bz2").write_bytes(data[: len(data) * 3 // 4])
    rows = list(documents(str(tmp_path / "cut.xml.bz2")))
    assert rows[-1] == "bad: damaged file" and 20 < len(rows) < 60 and rows[0]["title"] == "A0"
    assert "cut.xml.bz2: damaged" in caplog.text


# Local files.


def pdf(path, *pages: str):
    """A PDF as matplotlib writes it."""
    import matplotlib
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(path, metadata={"Title": "On words"}) as file:
        for page in pages:
            words = page.split()
            figure = Figure(figsize=(8, 10))
            figure.text(0.05, 0.1, "\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)), fontsize=8)
            file.savefig(figure)


def test_a_folder_of_every_kind(tmp_path):
    from pypdf import PdfReader, PdfWriter

    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text(prose(0))
    (folder / "a.txt").write_bytes(("\ufeff" + VIETNAMESE + " " + prose(1)).encode())
    (folder / "b.md").write_text("# Title\n\n" + prose(2))
    (folder / "c.html").write_bytes(html("Page", 3, text="café " + prose(3)).encode("cp1252"))
    pdf(folder / "d.pdf", prose(4), prose(5))
    rows = [{"text": prose(6), "title": "six", "license": "mit", "url": "https://example.org/6"}, {"text": prose(7)}]
    (folder / "e.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n[1]\n" + json.dumps({"text": None}))
    with open(folder / "f.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["title", "text"], ["eight", prose(8) + '\n"quoted", and more'], ["nine", prose(9)]]
        )
    table = pyarrow.table({"text": [prose(10), prose(11)], "source": ["ten", None], "other": [1, 2]})
    pyarrow.parquet.write_table(table, folder / "g.parquet")
    with gzip.open(folder / "sub" / "h.txt.gz", "wt") as file:
        file.write(prose(12))
    with gzip.open(folder / "sub" / "i.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": prose(13)}))
    (folder / "j.png").write_bytes(b"\x89PNG")
    (folder / "q.rst").write_text("Title\n=====\n\n" + prose(17))
    with gzip.open(folder / "R.NDJSON.GZ", "wt") as file:
        file.write(json.dumps({"text": prose(18)}))
    (folder / "k.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    (folder / "l.parquet").write_bytes(b"PAR1 no")
    (folder / "m.txt.gz").write_bytes(gzip.compress(prose(14, 5000).encode())[:-2000])
    (folder / "n.txt").write_bytes((prose(15) + " Überführung für größere Straßen").encode("cp1252"))
    (folder / "o.txt").write_text(prose(16), encoding="utf-16")
    writer = PdfWriter(PdfReader(folder / "d.pdf"))
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(folder / "p.pdf")
    found, report = corpus(documents(str(folder)), tmp_path / "all.jsonl.gz")
    by_source = {row["source"]: row for row in found}
    assert set(by_source) == {
        *("mine/a.txt", "mine/b.md", "mine/c.html", "mine/d.pdf", "https://example.org/6", "mine/e.jsonl#2"),
        *("mine/f.csv#1", "mine/f.csv#2", "ten", "mine/g.parquet#2", "mine/sub/h.txt.gz", "mine/sub/i.jsonl.gz#1"),
        *("mine/n.txt", "mine/o.txt", "mine/q.rst", "mine/R.NDJSON.GZ#1"),
    }
    assert report.dropped == {
        "not a JSON object": 2,
        "missing": 1,
        "another kind of file": 1,
        "damaged file": 3,
        "PDF with a password": 1,
    }
    assert by_source["mine/a.txt"]["text"].startswith(VIETNAMESE) and by_source["mine/a.txt"]["title"] == "a.txt"
    assert "café" in by_source["mine/c.html"]["text"] and by_source["mine/c.html"]["title"] == "Page"
    assert "größere Straßen" in by_source["mine/n.txt"]["text"] and by_source["mine/o.txt"]["text"] == prose(16)
    assert " ".join(by_source["mine/d.pdf"]["text"].split()) == f"{prose(4)} {prose(5)}"
    assert by_source["mine/d.pdf"]["title"] == "On words"
    assert by_source["https://example.org/6"]["license"] == "mit" and by_source["mine/e.jsonl#2"]["license"] == ""
    assert by_source["mine/f.csv#1"] | {"sha256": ""} == {
        "text": prose(8) + '\n"quoted", and more',
        "source": "mine/f.csv#1",
        "title": "eight",
        "license": "",
        "sha256": "",
    }
    for row in found:
        assert row["sha256"] == hashlib.sha256(row["text"].encode()).hexdigest()
        assert list(row) == ["text", "source", "title", "license", "sha256"]
        assert all(isinstance(value, str) for value in row.values())


def test_a_file_of_a_folder_that_is_not_what_its_name_says_is_passed_over(tmp_path, caplog):
    noise = random.Random(1).randbytes(4000)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n"
    for name, content in (
        ("b.txt", b"PK\3\4"),
        ("c.jsonl", b"BZh9"),
        ("d.md", b""),
        ("e.html", b"PK\3\4"),
        ("f.txt", pointer),
    ):
        (tmp_path / name).write_bytes(content if content is pointer else content + noise)
    for name in "ag":
        (tmp_path / f"{name}.txt").write_text(prose(ord(name)))
    rows, report = corpus(documents(str(tmp_path)), tmp_path / "o.jsonl")
    assert [row["title"] for row in rows] == ["a.txt", "g.txt"] and report.bad == 5
    assert report.dropped == {"content of another kind": 4, "control characters": 1}
    assert (
        "d.md: not a text but binary data" in caplog.text
        and "f.txt: its content is a pointer of Git LFS" in caplog.text
    )
    with pytest.raises(UserError, match="binary data"):
        list(documents(str(tmp_path / "d.md")))


def test_a_folder_that_datasets_saved(tmp_path):
    import datasets

    splits = {
        name: datasets.Dataset.from_dict({"text": [prose(number)]}) for number, name in enumerate(("train", "dev"))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["dev"].save_to_disk(tmp_path / "one")
    assert [row["text"] for row in documents(str(tmp_path / "both"), split="dev")] == [prose(1)]
    assert [row["source"] for row in documents(str(tmp_path / "one"))] == ["one#1"]
    with pytest.raises(UserError, match="no split test: found train, dev"):
        list(documents(str(tmp_path / "both"), split="test"))


def test_a_split_of_files_is_said_to_be_none(tmp_path, caplog):
    (tmp_path / "a.txt").write_text(prose(1))
    assert len(list(documents(str(tmp_path), split="test"))) == 1 and "read whole: --split" in caplog.text
    caplog.clear()
    assert len(list(documents(str(tmp_path)))) == 1 and not caplog.text


def test_columns_of_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": prose(1), "headline": "One", "id": 7}))
    columns = {"text": "body", "title": "headline", "source": "id"}
    assert corpus(documents(str(tmp_path / "a.jsonl"), columns=columns), tmp_path / "o.jsonl")[0][0]["source"] == "7"
    with pytest.raises(UserError, match=r"a\.jsonl: no column text: found body, headline, id\..*--columns text="):
        list(documents(str(tmp_path / "a.jsonl")))


def test_a_column_that_is_mapped_and_not_there_is_said(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose(1), "headline": "One"}))
    assert list(documents(str(tmp_path / "a.jsonl"), columns={"title": "headlne"}))[0]["title"] is None
    assert "no column headlne: found text, headline" in caplog.text


def test_a_long_text_becomes_several_documents_and_no_character_is_lost():
    text = "\n\n".join(prose(i, 300) for i in range(30))
    cut = list(pieces((text[i : i + 1000] for i in range(0, len(text), 1000)), 7000))
    assert "".join(cut) == text and all(len(piece) <= 7000 for piece in cut) and len(cut) < len(text) / 3500 + 1
    assert all(piece.startswith("\n\n") for piece in cut[1:])
    assert list(pieces(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5] and list(pieces([])) == []
    assert PIECE < LONGEST


def test_docs_names(tmp_path, monkeypatch):
    """Without building the whole set, which test_docs does: the rows are those that shared/data/docs.py yields."""
    from shared.data import docs

    made = {
        "docs:prose": {"text": prose(1), "source": "python/ast", "title": "ast", "license": None, "sha256": "x"},
        "docs:summaries": {"document": prose(2), "summary": "Does it.", "source": "python/ast.parse"},
        "docs:questions": {"id": "1", "title": "ast.parse", "context": prose(3), "question": "What?", "answers": {}},
    }
    monkeypatch.setattr(docs, "documents", lambda name: iter([made[name], made[name]]))
    for name, text in zip(made, (prose(1), f"Does it.\n\n{prose(2)}", prose(3)), strict=True):
        rows, report = corpus(documents(name), tmp_path / "o.jsonl")
        assert [row["text"] for row in rows] == [text] and report.dropped == {"near-duplicate": 1}
        assert rows[0]["license"] == "" and rows[0]["source"]


# The stream.


def test_the_report_adds_up_and_the_histogram_is_a_picture(tmp_path):
    from PIL import Image

    texts = [prose(i, 60 + i) for i in range(100)]
    near = texts[0].split()
    near[30] = "other"
    # 6 unusable, 3 short, 2 repeated, 1 in another language, 2 near-duplicates, 1 exact
    bad = [None, "", 7, "\x00" * 90, "x" * (LONGEST + 1), " "]
    rest = ["too few", "short", "one two", "menu\n" * 90, "buy it now " * 50, LONG_VIETNAMESE]
    rows = [
        {"text": text, "source": i}
        for i, text in enumerate([*texts, *bad, *rest, " ".join(near), texts[1].upper(), texts[2]])
    ]
    kept, report = corpus([*rows, "HTTP 404"], tmp_path / "o.jsonl.gz", codes={language(text) for text in texts})
    assert [row["text"] for row in kept] == texts
    assert report.read == 116 and report.kept == 100 and report.bad == 6
    assert report.dropped == {
        **{"missing": 1, "empty": 2, "wrong type": 1, "control characters": 1, "over 1 MB": 1, "HTTP 404": 1},
        **{"too short": 3, "repeated lines": 1, "repeated words": 1, "other language": 1, "near-duplicate": 3},
    }
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_processes_give_the_same_file_and_equal_input_gives_equal_bytes(tmp_path):
    rows = [{"text": prose(i % 900, 200), "source": str(i)} for i in range(1000)]
    for name, processes in (("one", 1), ("two", 2), ("again", 1)):
        report = build(rows, tmp_path / f"{name}.jsonl.gz", processes=processes)
        assert (report.read, report.kept, report.dropped) == (1000, 900, {"near-duplicate": 100})
    files = [(tmp_path / f"{name}.jsonl.gz").read_bytes() for name in ("one", "two", "again")]
    assert files[0] == files[1] == files[2]


def test_the_processes_do_not_read_ahead(monkeypatch):
    taken = 0

    def rows():
        nonlocal taken
        for i in range(10_000):
            taken += 1
            yield {"text": str(i) + "x" * 20_000}

    results = ordered_map(len, rows(), 2)
    assert next(results) == 1
    assert taken <= 6 * BATCH / 20_000
    results.close()


def test_memory_does_not_grow_with_the_file(tmp_path):
    line = prose(1, 30)
    with (
        open(tmp_path / "a.jsonl", "w") as jsonl,
        open(tmp_path / "a.txt", "w") as txt,
        open(tmp_path / "a.csv", "w") as table,
    ):
        table.write("text\n")
        for i in range(200_000):
            jsonl.write(json.dumps({"text": f"{i} {line}"}) + "\n")
            txt.write(f"{i} {line}\n")
            table.write(f"{i} {line}\n")
    write_dump(tmp_path / "a.xml.bz2", [(f"A{i}", 0, f"{i} {line} " * 30, "") for i in range(1500)])
    next(documents(str(tmp_path / "a.csv")))  # what is imported does not count
    for name, count in (("a.jsonl", 200_000), ("a.txt", 0), ("a.csv", 200_000), ("a.xml.bz2", 1500)):
        characters = 0
        tracemalloc.start()
        for number, row in enumerate(documents(str(tmp_path / name)), 1):
            characters += len(row.get("text") or row["wikitext"])
            if number == 20_000:
                break  # enough: a reader that reads it whole has done so by now
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000, (name, peak)
        assert count in (0, 200_000) or number == count
        assert characters > 4_000_000


def test_a_corpus_in_the_folder_of_its_texts_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "az":
        (tmp_path / f"{name}.txt").write_text(prose(ord(name)))
    for _ in range(2):
        main([".", "--output", "corpus.jsonl", "--processes", "1"])
        assert [row["title"] for row in read(tmp_path / "corpus.jsonl")] == ["a.txt", "z.txt"]
    (tmp_path / "a.txt").unlink()
    main([".", "--output", "corpus.jsonl", "--processes", "1"])
    assert [row["title"] for row in read(tmp_path / "corpus.jsonl")] == ["z.txt"]
    main(["corpus.jsonl", "--output", "corpus.jsonl", "--processes", "1"])  # but cleaned anew where it is named
    assert [row["title"] for row in read(tmp_path / "corpus.jsonl")] == ["z.txt"]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--languages", "xx", "xx: no code of a language that is known: ace af"),
        ("--languages", "vietnamese", "vietnamese: no code"),
        ("--depth", "-1", "-1: expected 0 or more"),
    ],
)
def test_values_that_would_keep_nothing_are_refused(flag, value, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["README.md", "--output", str(tmp_path / "o.jsonl"), flag, value])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_code_of_a_language_in_capitals(tmp_path):
    (tmp_path / "a.txt").write_text(LONG_VIETNAMESE)
    main([str(tmp_path / "a.txt"), "--output", str(tmp_path / "o.jsonl"), "--languages", "VI", "--processes", "1"])
    assert len(read(tmp_path / "o.jsonl")) == 1


def test_a_failure_leaves_the_old_output(tmp_path):
    output = tmp_path / "o.jsonl"
    build([{"text": prose(1), "source": "a"}], output)
    old = output.read_bytes()

    def breaks():
        yield {"text": prose(2), "source": "b"}
        raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        build(breaks(), output)
    with pytest.raises(UserError, match=r"No document is left for .*: read 1 = kept 0 \+ dropped 1 \(too short 1\)"):
        build([{"text": "short", "source": "b"}], output)
    assert output.read_bytes() == old and sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.png"]


# The command.


def run_command(*arguments, **environment):
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_command_joins_sources_and_says_what_it_did(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1))
    (tmp_path / "b.csv").write_text(f"body\n{prose(2)}\n{prose(1)}\nfew words\n")
    done = run_command(
        *(tmp_path / "a.txt", tmp_path / "b.csv", "--columns", "text=body", "--output", tmp_path / "new" / "o.jsonl.gz")
    )
    assert done.returncode == 0, done.stderr
    assert "read 4 = kept 2 + dropped 2 (too short 1, near-duplicate 1); lengths in o.png" in done.stdout
    assert [row["source"] for row in read(tmp_path / "new" / "o.jsonl.gz")] == ["a.txt", "b.csv#1"]
    assert str(tmp_path) not in (tmp_path / "new" / "o.jsonl.gz").read_text(errors="replace")


def test_hub_datasets_are_streamed_with_their_licence(hub, tmp_path):
    output, arguments = tmp_path / "o.jsonl.gz", ("--min_words", 20, "--processes", 1)
    refused = run_command("Skylion007/openwebtext", *arguments, "--output", output, **hub.env)
    assert refused.returncode == 2 and "Skylion007/openwebtext is a script" in refused.stderr
    copy = refused.stderr.split()[-1]
    done = run_command(copy, "--dataset_config", "plain_text", *arguments, "--output", output, **hub.env)
    assert done.returncode == 0, done.stderr
    rows = read(output)
    assert len(rows) > 50 and {row["license"] for row in rows} == {""}  # that revision has no card
    assert rows[0]["source"] == "Skylion007/openwebtext@refs/convert/parquet#1"

    simple = ("wikimedia/wikipedia", "--dataset_config", "20231101.simple", *arguments, "--output", output)
    assert run_command(*simple, **hub.env).returncode == 0
    rows = read(output)
    assert rows and all(row["title"] and row["source"].startswith("https://en.wikipedia.org/wiki/") for row in rows)
    assert {row["license"] for row in rows} == {"cc-by-sa-3.0, gfdl"}

    missing = run_command("wikimedia/wikipedia", "--dataset_config", "xx", "--output", output, **hub.env)
    assert missing.returncode == 2 and "20231101.simple" in missing.stderr and "Traceback" not in missing.stderr
    unnamed = run_command("HuggingFaceFW/fineweb-edu@v9", "--output", output, **hub.env)
    assert unnamed.stderr.endswith("RevisionNotFoundError: it has no revision v9.\n")
    unnamed = run_command("HuggingFaceFW/fineweb-edu", "--output", output, **hub.env)
    assert unnamed.returncode == 2 and unnamed.stderr.count("\n") == 1 and "sample-10BT" in unnamed.stderr
    assert read(output) == rows  # what was there before stays
    unknown = run_command("no/such", "--output", output, **hub.env)
    assert unknown.returncode == 2 and "no/such: cannot be read from the Hub" in unknown.stderr
    offline = {**hub.env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    refused = run_command("Skylion007/openwebtext", "--output", output, **offline)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr


def test_parts_of_the_dump_of_a_large_wiki_are_read(tmp_path):
    dump = f"<mediawiki><page><title>A</title><ns>0</ns><revision><text>{prose(1)}</text></revision></page></mediawiki>"
    (tmp_path / "enwiki-20250101-pages-articles1.xml-p1p41242.bz2").write_bytes(bz2.compress(dump.encode()))
    (tmp_path / "enwiki-20250101-pages-articles2.xml-p41243p151573").write_text(dump)
    assert [row["title"] for row in documents(str(tmp_path))] == ["A", "A"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["./org/name"], "no such file or folder"),
        (["docs:nothing"], "docs:nothing: unknown. Known: docs:prose"),
        (["README.md", "--columns", "body"], "--columns body: expected text="),
        (["README.md", "--columns", "text=a", "text=b"], "each name takes one column"),
        (["Makefile"], "Makefile: cannot be read; expected .txt"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, said, tmp_path):
    done = run_command(*arguments, "--output", tmp_path / "o.jsonl", "--processes", 1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") <= 2
    assert not (tmp_path / "o.jsonl").exists()


def test_the_output_must_be_jsonl(tmp_path):
    with pytest.raises(UserError, match=r"expected a name that ends in \.jsonl or \.jsonl\.gz"):
        build([], tmp_path / "o.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build([{"text": prose(1), "source": "a"}], tmp_path / "file" / "o.jsonl")


def test_the_words_of_these_tests_differ():
    """Else the near-duplicates above would be others than the planted ones."""
    assert not set(shingles(prose(1))) & set(shingles(prose(2)))


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
@pytest.mark.parametrize("password", ["", "secret"])
def test_an_encrypted_pdf_is_read_where_it_needs_no_password(algorithm, password, tmp_path):
    from pypdf import PdfReader, PdfWriter

    pdf(tmp_path / "plain.pdf", prose(1))
    writer = PdfWriter(PdfReader(tmp_path / "plain.pdf"))
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    writer.write(tmp_path / "a.pdf")
    found = list(documents(str(tmp_path / "a.pdf")))
    if password:
        assert found == ["PDF with a password"]
    else:
        assert " ".join(found[0]["text"].split()) == prose(1)


def test_words_that_a_line_of_a_pdf_divides_are_whole(tmp_path):
    import matplotlib
    from matplotlib.figure import Figure

    lines = ["a well-known fact: infor-", "mation is a well-", "known Viet-", "Anh word, 10-", "20 of them, bờ-", "cõi"]
    page = Figure()
    for number, line in enumerate(lines):
        page.text(0.1, 0.9 - 0.1 * number, line)
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        page.savefig(tmp_path / "a.pdf")
    (row,) = documents(str(tmp_path / "a.pdf"))
    text = "a well-known fact: information is a well-known Viet-\nAnh word, 10-\n20 of them, bờcõi"
    assert row["text"].strip() == text


def test_a_pdf_without_text_is_named(tmp_path, caplog):
    import numpy as np
    from matplotlib.figure import Figure
    from pypdf import PdfReader, PdfWriter

    scan = Figure(figsize=(4, 4))
    scan.figimage(np.random.default_rng(0).random((200, 200)))
    scan.savefig(tmp_path / "scan.pdf")
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    assert list(documents(str(tmp_path / "scan.pdf"))) == ["scanned PDF, pictures without text (needs OCR)"]
    assert list(documents(str(tmp_path / "blank.pdf"))) == ["PDF without text"]
    pdf(tmp_path / "text.pdf", prose(1))
    both = PdfWriter()
    for part in ("text.pdf", "scan.pdf"):
        both.append(PdfReader(tmp_path / part))
    both.write(tmp_path / "both.pdf")
    assert len(list(documents(str(tmp_path / "both.pdf")))) == 1 and "1 of 2 pages are pictures" in caplog.text


# Tables and texts as people have them.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semi.csv", "title;text\nMột;{0}\nHai;{1}\n"),
        ("tab.tsv", "title\ttext\nMột\t{0}\nHai\t{1}\n"),
        ("list.json", '[{{"title": "Một", "text": "{0}"}}, {{"title": "Hai", "text": "{1}"}}]'),
        ("data.json", '{{"data": [{{"title": "Một", "text": "{0}"}}, {{"title": "Hai", "text": "{1}"}}]}}'),
        ("blank.jsonl", '\ufeff{{"title": "Một", "text": "{0}"}}\n\n{{"title": "Hai", "text": "{1}"}}'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_table_in_many_dresses(name, content, encoding, tmp_path):
    (tmp_path / name).write_text(content.format(prose(1), prose(2)), encoding=encoding)
    rows = list(documents(str(tmp_path / name)))
    assert [(row["title"], row["text"]) for row in rows] == [("Một", prose(1)), ("Hai", prose(2))]


def test_a_quotation_mark_that_swallows_rows_is_named(tmp_path, caplog):
    lines = [f"{i},{prose(i)}" for i in range(30)]
    lines[3] = '3,"' + prose(3)
    (tmp_path / "open.csv").write_text("\n".join(["title,text", *lines]))
    with pytest.raises(UserError, match="line 5: a quotation mark opens a cell and swallows 26 further lines"):
        list(documents(str(tmp_path / "open.csv")))
    (tmp_path / "z.txt").write_text(prose(40))  # in a folder the others are read
    rows = list(documents(str(tmp_path)))
    assert [row if isinstance(row, str) else row["title"] for row in rows] == [
        "0",
        "1",
        "2",
        "bad: damaged file",
        "z.txt",
    ]
    assert "line 5: a quotation mark" in caplog.text


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Die Straße führt über größere Brücken, und schöne Häuser stehen an ihr."),
        ("cp1251", "Москва является столицей и крупнейшим городом страны, в ней много парков и театров."),
        ("koi8-r", "Москва является столицей и крупнейшим городом страны, в ней много парков и театров."),
        ("cp932", "東京は日本の首都であり、世界でも最大級の都市の一つです。春には桜が咲きます。"),
        ("gb18030", "北京是中华人民共和国的首都，也是全国的政治和文化中心，历史悠久。"),
    ],
)
def test_texts_in_other_encodings_are_read_and_said(name, encoding, text, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = {"a.csv": f'title,text\nx,"{text * 8}"\n', "a.jsonl": f'{{"text": "{text * 8}"}}\n', "a.txt": text * 8}
    (tmp_path / name).write_bytes(rows[name].encode(encoding))
    assert [row["text"].strip() for row in documents(str(tmp_path / name))] == [text * 8]
    assert "read as" in caplog.text


def test_old_vietnamese_among_documents_is_converted(tmp_path, caplog):
    def old(name: str) -> str:
        return LONG_VIETNAMESE.translate(
            {ord(new): code for code, new in OLD[name].items() if code < 256 and len(new) == 1}
        )

    tcvn, viscii = old("TCVN3"), old("VISCII")
    assert tcvn != LONG_VIETNAMESE != viscii
    (tmp_path / "a.txt").write_bytes(tcvn.encode("latin-1"))
    page = html("Trang", 1, head='<meta charset="windows-1252">', text=tcvn)
    (tmp_path / "b.html").write_bytes(page.encode("latin-1"))
    (tmp_path / "c.html").write_bytes(
        html("Trang", 1, head='<meta charset="x-user-defined">', text=viscii).encode("latin-1")
    )
    rows = [{"text": tcvn}, {"text": LONG_VIETNAMESE}, {"text": prose(1, 80) + " café, où êtes-vous né à l'été"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))  # of several kinds in one file
    found = [prepare(row, 10, ())[0]["text"].removeprefix("Trang\n") for row in documents(str(tmp_path))]
    assert found[:5] == [LONG_VIETNAMESE] * 5 and found[5] == rows[2]["text"]
    assert "documents in TCVN3" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("rss.xml", "<rss><item>hello</item></rss>", "bad: not a MediaWiki dump"),
        (
            "bare.xml",
            "<mediawiki><siteinfo><base></base><namespaces><namespace key='6'/><namespace key='1'>Talk</namespace></namespaces>"
            f"</siteinfo><page><title>A</title><revision><text>{prose(1)}</text></revision></page></mediawiki>",
            prose(1),
        ),
        (
            "talk.xml",
            "<mediawiki><siteinfo><namespaces><namespace key='1'>Talk</namespace></namespaces></siteinfo>"
            f"<page><title>Talk:A</title><revision><text>{prose(1)}</text></revision></page></mediawiki>",
            "not an article",
        ),
        ("part.html", f"<article><p>{prose(1)}</p></article>", prose(1)),
        ("bytes.csv", b"text,x\n" + prose(1).encode() + b",\xff\n", prose(1)),
    ],
)
def test_odd_files_are_read_or_named(name, content, found, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (row,) = documents(str(tmp_path / name))
    row = prepare(row, 10, ())
    assert (row if isinstance(row, str) else row[0]["text"]) == found.removeprefix(
        "bad: " if isinstance(row, tuple) else ""
    )


# The web, as it is.


@pytest.mark.parametrize(
    ("head", "links", "followed"),
    [
        ('<meta name="ROBOTS" content="NOARCHIVE, NOFOLLOW">', '<a href="/x">x</a>', []),
        ('<meta name="robots" content="none">', '<a href="/x">x</a>', []),
        ('<META NAME="Robots" CONTENT="None">', '<a href="/x">x</a>', []),
        ('<meta name="lm-taskbook" content="nofollow">', '<a href="/x">x</a>', []),
        ('<meta name="googlebot" content="nofollow">', '<a href="/x">x</a>', ["/x"]),
        ('<meta name="robots" content="noindex">', '<a href="/x">x</a>', ["/x"]),
        (
            "",
            '<a rel="NOFOLLOW" href="/x">x</a><A HREF="/y" REL="noopener NoFollow">y</A><a rel="next" href="/z">z</a>',
            ["/z"],
        ),
        ("", '<a rel="x-nofollow-y" href="/x">x</a>', ["/x"]),
        ("", '<a href="http://site.example:80/x">x</a><a href="https://www.site.example:443/y">y</a>', ["/x", "/y"]),
        ("", '<a href="http://site.example:8080/x">another site</a>', []),
    ],
)
def test_links_are_followed_where_they_may_be(head, links, followed):
    page = f"<html><head>{head}</head><body>{links}</body></html>"
    assert [link.partition("example")[2] for link in web._links(page, "http://site.example/")] == followed


def test_a_header_may_forbid_following(server, tmp_path):
    page = html("Start", 1, "/x")
    server.pages |= {"/": lambda h: answer(h, page, X_Robots_Tag="noarchive, NoFollow"), "/x": html("X", 2)}
    assert set(fetched(server.url, tmp_path / "state", depth=1)[0]) == {"/"}


@pytest.mark.parametrize(
    "content",
    ["0; url=/real", "0;URL='/real'", '5, url = "/real"', "0;/real", "0 url=http://{host}:{port}/real", "1.5;url=real"],
)
def test_a_page_that_passes_on_is_followed_within_the_site(content, server, tmp_path):
    content = content.format(host="127.0.0.1", port=server.http.server_port)
    server.pages |= {
        "/": f"<html><head><META HTTP-EQUIV=Refresh CONTENT='{content}'></head></html>".replace(
            "='0;URL='/real''", "=\"0;URL='/real'\""
        ),
        "/real": html("Real", 1, "/more"),
        "/more": html("More", 2),
    }
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    assert set(pages) == {"/real", "/more"} and not reasons


def test_pages_that_pass_on_to_others_sites_themselves_or_much_later_are_pages(server, tmp_path):
    def refresh(content):
        return f'<meta http-equiv="refresh" content="{content}">'

    server.pages |= {
        "/": html("Start", 1, "/away", "/self", "/late", "/a", "/script"),
        "/away": html("Away", 2, head=refresh("0;url=http://elsewhere.example/")),
        "/self": html("Self", 3, head=refresh("10")),
        "/late": html("Late", 4, head=refresh("600;url=/b")),
        "/a": html("A", 5, head=refresh("0;url=/b")),
        "/b": html("B", 6, head=refresh("0;url=/a")),
        "/script": html("Script", 7, head=f"<noscript>{refresh('0;url=/gone')}</noscript>"),
    }
    pages, reasons = fetched(server.url, tmp_path / "state", depth=1)
    assert set(pages) == {"/", "/away", "/self", "/late", "/b", "/script"} and not reasons


@pytest.mark.parametrize("rule", ["Crawl-delay: 3600", "Request-rate: 1/3600s"])
def test_a_site_that_wants_an_hour_between_requests_is_refused_at_once(rule, server, tmp_path):
    server.pages |= {"/robots.txt": f"User-agent: *\n{rule}\n", "/": html("Start", 1)}
    with pytest.raises(UserError, match=r"robots.txt asks for 3,600 seconds between requests"):
        fetched(server.url, tmp_path / "state")
    assert server.asked == ["/robots.txt"]


@pytest.mark.parametrize(
    ("encoding", "declared", "text"),
    [
        ("iso2022_jp", "ISO-2022-JP", "東京は日本の首都であり、世界でも最大級の都市です。"),
        ("iso2022_jp", "iso-2022-jp", "ひらがなとカタカナ"),
        ("big5hkscs", "Big5-HKSCS", "香港嘅茶餐廳好好食，我哋今日去飲茶，啲嘢好正㗎。"),
        ("big5hkscs", "big5", "我哋喺度食嘢，佢哋唔知，啱啱嚟咗。"),
        ("cp932", "Shift_JIS", "①②③の髙島屋と﨑山さん"),
        ("cp932", "x-sjis", "東京は日本の首都です"),
        ("cp932", "windows-31j", "東京は日本の首都です"),
        ("gb18030", "gb2312", "朱镕基和㐂字都在这里"),
        ("cp949", "euc-kr", "똠방각하 펲시콜라 한국어"),
        ("cp1252", "iso-8859-1", "“Größe” – 5 €"),
        ("cp874", "windows-874", "ภาษาไทย “เขียน”"),
        ("cp874", "tis-620", "ภาษาไทยเป็นภาษา"),
        ("utf-16", "utf-8", "Việt Nam đất nước con người"),
        ("koi8-u", "koi8-u", "Київ є столицею України"),
    ],
)
@pytest.mark.parametrize("where", ["header", "meta", "http-equiv"])
def test_a_declared_charset_is_read(encoding, declared, text, where):
    head = {
        "header": "",
        "meta": f'<meta charset="{declared}">',
        "http-equiv": f"<META http-equiv=Content-Type content='text/html; charset={declared}'>",
    }[where]
    page = f"<html><head>{head}</head><body>{text}</body></html>"
    assert decode(page.encode(encoding), declared if where == "header" else None) == page


def test_an_output_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--output", str(tmp_path / "file" / "corpus.jsonl")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: --output ")
    assert said.endswith("; name another file.\n") and said.count("\n") == 1


def test_folders_that_links_lead_to_are_read_once(tmp_path):
    """Without going round in a ring, and without what hides."""
    notes, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    for folder in (notes / "own", notes / ".git", elsewhere / "deep"):
        folder.mkdir(parents=True)
    for file in (notes / "a.md", notes / "own" / "b.md", notes / ".git" / "c.md", elsewhere / "deep" / "d.md"):
        file.write_text(file.name)
    for link, target in (
        ("linked", elsewhere),
        ("again", notes / "own"),
        ("round", notes),
        ("gone", tmp_path / "gone"),
    ):
        (notes / link).symlink_to(target)
    (elsewhere / "back").symlink_to(notes)
    names = [name for _, name in local_files(notes)]
    assert names == ["notes/a.md", "notes/linked/deep/d.md", "notes/own/b.md"]


def test_pages_told_apart_by_their_query_alone_are_all_read(server, tmp_path):
    """Each was one page with the others once: a parameter without `=`, or one called as trackers are elsewhere."""
    queries = ["about", "12", "cid=1", "cid=2", "source=b", "gallery=3", "b=1&a=2", "u=a%26b", "x=a+b", "q="]
    links = [f"/show?{query}".replace("&", "&amp;") for query in queries] + ["/m;v=1", "/a/../d"]
    server.pages["/"] = html("start", 1, *links, "/show?utm_source=n&amp;12&amp;fbclid=3", "/show?PHPSESSID=9&amp;12")
    paths = [f"/show?{query}" for query in queries] + ["/m;v=1", "/d"]
    server.pages |= {path: html(path, 2 + number) for number, path in enumerate(paths)}
    pages, reasons = fetched(server.url + "/", tmp_path / "state", depth=1)
    assert set(pages) == {"/", *paths} and not reasons


def test_addresses_in_other_letters(server, tmp_path):
    """A redirect writes them in UTF-8, a link as it likes."""
    seen = "/tin-t%E1%BB%A9c?t%E1%BB%AB=100%25%20x"
    server.pages["/"] = html("start", 1, "/moved", "/tin-tức?từ=100% x", "http://127.0.0.1:99999/", "http://[a/")
    server.pages["/moved"] = lambda handler: answer(
        handler, "", 302, Location="/tin-tức?từ=100% x".encode().decode("latin-1")
    )
    server.pages[seen] = html("news", 2)
    pages, reasons = fetched(server.url + "/", tmp_path / "state", depth=1)
    assert set(pages) == {"/", seen} and not reasons and server.asked.count(seen) == 1
    assert web._normal("http://CHỢ.vn:80/A") == "http://xn--ch-3bt.vn/A"


def test_words_of_neighbouring_blocks_are_not_joined():
    body = (
        "<ul><li><div>one</div><div>two</div>three</li></ul><pre><div>line a</div><div>line b</div></pre>"
        "<blockquote><div>four</div><div>five</div></blockquote><template><p>nobody sees it</p></template>"
    )
    page = html("Blocks", 1).replace("</article>", f"{body}<p>{prose(9)}</p></article>")
    text = with_text({"html": page, "source": "http://a.example/"})["text"]
    assert "one\ntwo\nthree\nline a\nline b\nfour\nfive\n" in text and "nobody" not in text


def test_headers_that_say_nothing_or_nonsense(server, tmp_path):
    server.pages["/"] = lambda handler: answer(handler, html("A", 1, "/b"), Content_Length="many")
    server.pages["/b"] = lambda handler: answer(handler, html("B", 2), Content_Type="")
    pages, reasons = fetched(server.url + "/", tmp_path / "state", depth=1)
    assert set(pages) == {"/", "/b"} and not reasons
