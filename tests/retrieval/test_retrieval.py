"""shared/retrieval: passages, words, an index that is updated, killed and refused, vectors, the command. Tiny models."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import torch
from checkout import ROOT
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from shared import UserError
from shared.data import files
from shared.retrieval.__main__ import main, texts_of
from shared.retrieval.answers import citations
from shared.retrieval.encoder import SETTINGS, Encoder, pool, save_settings
from shared.retrieval.index import Index, fuse, terms
from shared.retrieval.passages import WORD, cut

MANUAL = """# The mill

Grain is ground on Mondays. Flour is sold at noon.

## Empty

## Prices

A sack costs nine crowns.
```
# no heading, a comment

sack = 9
```

The pond
--------
Đừng câu cá ở đây.
"""


def test_passages_stand_where_they_say():
    found = cut(MANUAL)
    assert [(part.heading, part.line) for part in found] == [("The mill", 1), ("Prices", 5), ("The pond", 16)]
    assert found[1].text.endswith("sack = 9\n```") and found[2].text.endswith("Đừng câu cá ở đây.")
    for part in found:
        assert MANUAL.startswith(part.text, part.start) and MANUAL[: part.start].count("\n") == part.line - 1


UNUSUAL = {
    "file names": ("Copy these:\n\nmain.py\nutils.py\nwww.example.com\n\nThen restart.", [""]),
    "names alone": ("anna.meyer\n\nbob.lee", [""]),
    "names of docs:prose": ("a.b\n\nDoes this.\n\na.c\n\nDoes that.", ["a.b", "a.c"]),
    "a name in a text": ("It calls\na.b\nthen.\n\nReturns:\na.c\n\nMore.", [""]),
    "headings alone": ("# Install\n## Steps\n\nRun it.\n\n# End\n\n## Of it", ["Steps"]),
    "nothing but headings": ("# One\n\n## Two", ["Two"]),
    "a fence in a line": ("# One\n\n```pip install x```\n\nRun.\n\n# Two\n\nEnd.", ["One", "Two"]),
    "a longer closing fence": ("# A\n\n```\n# x\n````\n\n# B\n\nEnd.", ["A", "B"]),
    "a fence in a fence": ("# A\n\n````md\n```\n# x\n```\n````\n\n# B\n\nEnd.", ["A", "B"]),
    "another fence does not end it": ("# A\n\n```\n~~~\n# x\n```\n\n# B\n\nEnd.", ["A", "B"]),
    "a fence that nothing ends": ("# A\n\n```python\n\n# B\n\nEnd.", ["A", "B"]),
    "reStructuredText": ("Intro\n~~~~~\n\nText.\n\nUse\n~~~~\n\nMore.\n\nEnd\n===\n\nEnd.", ["Intro", "Use", "End"]),
    "tildes": ("# A\n\n~~~\n# x\n~~~\n\n# B\n\nEnd.", ["A", "B"]),
}


@pytest.mark.parametrize("text, headings", UNUSUAL.values(), ids=UNUSUAL)
def test_headings_and_what_looks_like_them(text, headings):
    """No line is lost, whatever it looks like."""
    found = cut(text)
    assert [part.heading for part in found] == headings
    lines = [line for line in text.split("\n") if re.search(r"\w", line)]
    assert [line for part in found for line in part.text.split("\n") if re.search(r"\w", line)] == lines
    headings_only = "\n\n".join(f"# Heading {i}" for i in range(1000))
    assert all(len(WORD.findall(part.text)) <= 60 for part in cut(headings_only, most_words=30))


@pytest.mark.parametrize("seed", range(20))
def test_no_word_is_lost_and_none_stands_twice(seed):
    """Of documents of sentences, long lines, Chinese, blank lines and blanks anywhere."""
    draw = random.Random(seed)
    parts = ["word ", "End. ", "\n", "\n\n", "  \r\n\r\n", "中文字。", "x" * 50, " ", "?\u2028", "\f", "e\u0301 "]
    parts += ["\n\nmain.py\n", "\na.b", "\n# H\n", "\n```\n", "\n~~~~\n", "\n== M ==\n", "\n====\n"]
    document = "".join(draw.choices(parts, k=600))
    found = cut(document, most_words=draw.randint(1, 30))
    assert sum((WORD.findall(part.text) for part in found), []) == WORD.findall(document)
    end = 0
    for part in found:
        assert document.startswith(part.text, part.start) and part.start >= end and part.text == part.text.strip()
        assert part.line == document[: part.start].count("\n") + 1
        end = part.start + len(part.text)


def test_a_long_paragraph_is_cut_at_sentences():
    sentences = [f"This is sentence {i} of a paragraph." for i in range(40)]
    found = cut(" ".join(sentences), most_words=20)
    assert len(found) > 10 and all(part.text.endswith("paragraph.") for part in found)
    assert all(len(WORD.findall(part.text)) <= 20 for part in found)


def test_words_of_code_and_of_languages():
    assert {"torch.nn.max_pool2d", "torch", "max_pool2d", "pool2d"} < set(terms("torch.nn.max_pool2d"))
    assert {"bertmodel", "bert", "model"} == set(terms("BertModel"))
    assert terms("hoà thuận") == terms("ho\u0061\u0300 thuận") == ["hòa", "thuận"]
    assert terms("中文abc") == ["中", "文", "abc"]


def test_every_letter_of_unicode_is_found():
    """FTS5 folds what it stores by tables of its own."""
    letters = [chr(i) for i in range(0x30, 0x30000) if unicodedata.category(chr(i))[0] in "LNM"]
    index = Index(":memory:")
    index.update([{"source": "x", "text": " ".join(f"zz{letter}" for letter in letters)}])
    stored = {row[0] for row in index.connection.execute("SELECT term FROM vocabulary")}
    assert [letter for letter in letters if not set(terms(f"zz{letter}")) <= stored] == []


@pytest.mark.parametrize(
    "asked, text",
    [
        ("νόμος", "Ο νόμος ισχύει."),
        ("ΝΌΜΟΣ", "Ο νόμος ισχύει."),
        ("5 µm", "A gap of five μm."),
        ("istanbul", "İSTANBUL'DA"),
        ("İstanbul", "Istanbul ve İSTANBUL"),
        ("STRASSE", "Die Straße ist nass."),
        ("กรุงเทพ", "ฉันอยู่ที่กรุงเทพมหานคร"),
        ("ວຽງຈັນ", "ຂ້ອຍຢູ່ວຽງຈັນ"),
        ("ភ្នំពេញ", "ខ្ញុំរស់នៅភ្នំពេញ"),
        ("ရန်ကုန်", "ကျွန်တော်ရန်ကုန်မှာနေတယ်"),
    ],
)
def test_words_of_other_scripts_are_found(asked, text):
    index = Index(":memory:")
    index.update([{"source": "x", "text": text}, {"source": "y", "text": "something else"}])
    assert [found.source for found in index.search(asked)] == ["x"]
    assert set(terms(asked)) - {"5"} <= set(terms(text))


def test_fusion_is_that_of_the_paper():
    found = dict(fuse([[1, 2, 3], [3, 1]], 10))
    assert found == {1: 1 / 61 + 1 / 62, 3: 1 / 63 + 1 / 61, 2: 1 / 62}
    assert [item for item, _ in fuse([[1, 2, 3], [3, 1]], 2)] == [1, 3]


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return Encoder(tiny_bert)


DOCUMENTS = [
    {"source": "a.md", "title": "Mill", "text": MANUAL},
    {"source": "b.md", "title": "Library", "text": "The library lends maps.\n\nIt opens at ten."},
    {"source": "c.md", "title": "Quán", "text": "Bưu điện mở cửa lúc bảy giờ sáng."},
]


def test_an_index_is_updated_not_rebuilt(encoder, tmp_path, monkeypatch):
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, kind: encoded.extend(texts) or encode(self, texts, kind))
    index = Index(tmp_path / "x.sqlite", encoder)
    assert index.update(DOCUMENTS) == {"added": 3, "changed": 0, "kept": 0, "removed": 0}
    assert index.search("When does the library open?", how="words")[0].source == "b.md"
    assert index.search("bưu điện mở cửa lúc nào", how="words")[0].source == "c.md"
    encoded.clear()
    changed = [DOCUMENTS[0], {**DOCUMENTS[1], "text": "The library lends globes."}]
    other = Index(tmp_path / "x.sqlite", encoder)
    other.by_meaning("maps")
    assert index.update(changed) == {"added": 0, "changed": 1, "kept": 1, "removed": 1}
    assert encoded == ["maps", "Library\nThe library lends globes."] or encoded == [
        "Library\nThe library lends globes."
    ]
    for reader in (index, other):  # one that was open while another wrote sees it too
        assert [found.source for found in reader.search("globes", how="words")] == ["b.md"]
        assert reader.by_words("maps") == [] and "c.md" not in {found.source for found in reader.search("giờ", 50)}
        assert set(reader.by_meaning("maps")) == {found.id for found in reader.passages()}
    fresh = Index(tmp_path / "y.sqlite", encoder)
    fresh.update(changed)
    shown = [[(p.source, p.line, p.text) for p in each.search("globes of the library", 9)] for each in (index, fresh)]
    assert shown[0] == shown[1]


def test_a_cited_line_is_that_of_the_file(tiny_bert, tmp_path, capsys, monkeypatch):
    """Of a text that is read in parts too; of a page, a PDF or a table, whose text is not the file's own, none is told."""
    folder = tmp_path / "notes"
    folder.mkdir()
    lines = [f"Line {i} of many." for i in range(1, 201)]
    lines[149] = "# The heron stands here."
    (folder / "long.txt").write_text("\n".join(["", *lines]))
    monkeypatch.setattr(files.pieces, "__defaults__", (1000,))
    pages = " ".join(f"The stork number {i} returns in its own week of March." for i in range(9))
    (folder / "page.html").write_text(f"<html>\n\n<body>\n<h1>Storks</h1><p>{pages}</p></body></html>")
    (folder / "table.csv").write_text("text\nThe crane dances.\n")
    (folder / "lone.md").write_text("\n\nThe egret fishes.")
    name, known = str(tmp_path / "x.sqlite"), Index(tmp_path / "words.sqlite")
    assert main([str(folder), "--index", name, "--model", str(tiny_bert)]) == 0
    known.update(texts_of(str(folder)))
    for question, line in (("heron", 151), ("stork", None), ("crane", None), ("egret", 3)):
        found = known.search(question)[0]
        assert citations([found])[0]["line"] == line
    capsys.readouterr()
    for question, said in (("stork", "(notes/page.html)"), ("egret", "(notes/lone.md, line 3)")):
        assert main(["--index", name, "--ask", question, "--most", "1000"]) == 0
        assert said in capsys.readouterr().out
    before = {part.id: part.line for part in known.passages()}
    (folder / "long.txt").write_text("\n".join(["", "", *lines]))
    known.update(texts_of(str(folder)))
    assert sum(before.get(part.id) == part.line for part in known.passages()) == 3, "those of the other files"


def test_a_source_given_twice_is_two_documents(tmp_path):
    index = Index(tmp_path / "x.sqlite")
    assert index.update([{"source": "half", "text": "half \ud800 a letter"}])["added"] == 1
    rows = [{"source": "t.csv", "text": "first row"}, {"source": "t.csv", "text": "second row"}]
    assert index.update(rows) == {"added": 2, "changed": 0, "kept": 0, "removed": 1} and index.update(rows)["kept"] == 2
    assert [found.source for found in index.search("second")] == ["t.csv#2"]
    names = ["a#2", "a", "a", "a", "a#2"]
    index.update([{"source": name, "text": f"row {i}"} for i, name in enumerate(names)])
    assert [found.source for found in index.passages()] == ["a#2", "a", "a#3", "a#4", "a#2#2"]


def test_many_rows_of_one_source_take_no_longer_each(monkeypatch):
    """Names that are tried grow with the rows, not with their square."""
    rows = [{"source": "wikipedia", "text": ""} for _ in range(300)]
    tried = 0

    class Seen(set):
        def __contains__(self, name):
            nonlocal tried
            tried += 1
            return super().__contains__(name)

    monkeypatch.setattr("shared.retrieval.index.set", Seen, raising=False)
    Index(":memory:").update(rows)
    assert 300 <= tried < 1000


WRITER = """
import sys
from shared.retrieval import index
index.AT_ONCE = 20
def rows():
    for i in range(4000):
        if i == 1:
            print("begun", flush=True)
        yield {"source": f"d{i}", "text": "\\n\\n".join(f"# h{j}\\n\\nnumber n{i} part {j}" for j in range(7))}
index.Index(sys.argv[1]).update(rows())
"""


def test_a_killed_index_answers_and_goes_on(tmp_path):
    path = tmp_path / "x.sqlite"
    Index(path).update([{"source": "old", "text": "the old document about herons"}])
    for delay in (0.05, 0.2, 0.4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout.readline() == "begun\n"
        time.sleep(delay)
        with pytest.raises(UserError, match="another process is updating"):
            Index(path).update([{"source": "other", "text": "x"}])
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        index = Index(path)
        assert index.search("herons")[0].source == "old"
        counts = {}
        for found in index.passages():
            counts[found.source] = counts.get(found.source, 0) + 1
        assert set(counts.values()) <= {1, 7} and index.connection.execute("PRAGMA integrity_check").fetchone() == (
            "ok",
        )
    kept = len(counts) - 1
    rows = [
        {"source": f"d{i}", "text": "\n\n".join(f"# h{j}\n\nnumber n{i} part {j}" for j in range(7))}
        for i in range(900)
    ]
    last = index.update(rows)
    assert last["kept"] == min(kept, 900) > 0 and last["added"] == 900 - last["kept"]
    assert [found.source for found in index.search("n899", 7)] == ["d899"] * 7 and not index.search("herons")


def test_words_are_found_before_all_vectors_are_there(encoder, tmp_path, monkeypatch):
    index = Index(tmp_path / "x.sqlite", encoder)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index.update(DOCUMENTS)
    assert len(index) == 5 and index.by_meaning("maps") == []
    assert index.search("When does the library open?")[0].source == "b.md"
    assert index.update(DOCUMENTS)["kept"] == 3 and len(index.by_meaning("maps")) == 5
    assert len(index.by_meaning("maps", 2)) == 2 and index.by_meaning("maps", 2) == index.by_meaning("maps")[:2]


def test_what_is_refused_is_one_line(encoder, tmp_path, tiny):
    index = Index(tmp_path / "x.sqlite", encoder)
    index.update(DOCUMENTS)
    with pytest.raises(UserError, match="no document to index"):
        index.update([])
    assert len(index) == 5, "left as it was"
    for question, said in ((" \n", "empty"), ("why " * 25_000, "99,999 characters")):
        with pytest.raises(UserError, match=said):
            index.search(question)
    for question in ('" OR NEAR( *', "NOT AND OR", "'; DROP TABLE passages; --", "\x00 \ud800 a"):
        index.search(question, how="words")
    assert len(index) == 5
    with pytest.raises(UserError, match="made without an encoder"):
        Index(tmp_path / "words.sqlite")
        Index(tmp_path / "words.sqlite", encoder)
    (tmp_path / "text").write_text("no index " * 200)
    with pytest.raises(UserError, match="no index, or it cannot be written"):
        Index(tmp_path / "text")
    with pytest.raises(UserError, match="cannot be written"):
        Index(tmp_path / "nowhere" / "x.sqlite")
    other = Encoder(encoder.folder)
    other.settings = other.settings | {"pooling": "cls"}
    with pytest.raises(UserError, match="with another encoder"):
        Index(tmp_path / "x.sqlite", other)
    with pytest.raises(UserError, match="holds no encoder"):
        Encoder(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_sentence_transformers(pooling, tiny_bert, tmp_path):
    settings = SETTINGS | {"pooling": pooling, "question_prompt": "query: ", "max_length": 24}
    model, tokenizer = AutoModel.from_pretrained(tiny_bert), AutoTokenizer.from_pretrained(tiny_bert)
    model.config.retrieval = settings
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    save_settings(tmp_path, settings, model.config.hidden_size)
    texts = ["short", "a somewhat longer text about a heron", "long " * 60]
    ours, theirs = Encoder(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(ours.encode(texts, "question"), theirs.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(ours.encode(texts, "passage"), theirs.encode_document(texts), atol=1e-5)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"retrieval": None})
    )
    found = Encoder(tmp_path).settings
    assert found == settings, "what others saved is read from their files"


def test_pooling_by_hand():
    hidden, lengths = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 12.0]]), torch.tensor([2, 1])
    expected = torch.tensor([[0.6, 0.8], [5 / 13, 12 / 13]])
    assert torch.allclose(pool(hidden, lengths, "mean"), expected)
    assert pool(hidden, lengths, "cls").tolist()[0] == [1.0, 0.0]


def test_the_command_indexes_and_answers_with_places(tiny_bert, tmp_path, capsys, caplog):
    folder, index = tmp_path / "notes", tmp_path / "x.sqlite"
    folder.mkdir()
    (folder / "mill.md").write_text(MANUAL)
    pages = " ".join(f"The stork number {i} returns in its own week of March." for i in range(9))
    (folder / "page.html").write_text(f"<html><body><h1>Storks</h1><p>{pages}</p></body></html>")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    command = [str(folder), "--index", str(index), "--model", str(tiny_bert)]
    assert main(command) == 0 and "2 added" in capsys.readouterr().out
    assert (
        main(
            [
                "--index",
                str(index),
                "--model",
                str(tiny_bert),
                "--ask",
                "What does a sack cost in crowns?",
                "--most",
                "1",
            ]
        )
        == 0
    )
    assert "mill.md > Prices (notes/mill.md, line 5)\n## Empty\n\n## Prices" in capsys.readouterr().out
    (folder / "page.html").unlink()
    assert main(command) == 0 and "1 kept, 1 removed" in capsys.readouterr().out
    (folder / "stars.csv").write_text("name,magnitude\nSirius,-1.5\n")
    assert main(command) == 0
    assert "1 another kind of file, 1 table without a column text" in caplog.text
    capsys.readouterr()
    for words, said in (
        ([str(folder / "stars.csv")], "found name, magnitude. Name the one with the text: python -m shared.corpora"),
        (["--ask", "x", "--most", "0"], "--most 0: nothing would be shown"),
        (["--ask", "x"], "no such index"),
        ([str(tmp_path / "none")], "no such file or folder"),
    ):
        (tmp_path / "new.sqlite").unlink(missing_ok=True)
        assert main([*words, "--index", str(tmp_path / "new.sqlite"), "--model", str(tiny_bert)]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1, error
