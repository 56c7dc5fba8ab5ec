"""Files as people have them: read right, or refused in one line that says where; loaded and as a stream alike. No training."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import datasets
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT, train_script

from shared import UserError
from shared.data.files import PIECE, describe
from shared.data.load import load_data, load_splits, load_stream
from shared.training.arguments import parse

TRAINING = "transformers.training_args:TrainingArguments"
ROWS = [{"text": "vé một", "label": "a"}, {"text": "two, too", "label": "b"}]


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the same each time: it names a test


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(path) -> list[dict]:
    """The rows that `load_data` gives, which are those of `load_stream`."""
    loaded = list(load_data(str(path))["train"])
    assert list(load_stream(str(path))["train"]) == loaded
    return loaded


def refused(path) -> str:
    """The one line with which both ways of loading stop, as a task loads."""
    said = []
    run_args = SimpleNamespace(dataset=str(path), dataset_config=None, validation_file=None, test_file=None)
    for load in (load_data, load_stream):
        with pytest.raises(UserError) as stopped:
            list(load_splits(run_args, load)["train"])
        said.append(str(stopped.value))
    assert said[0] == said[1] and str(path) in said[0] and "\n" not in said[0]
    return said[0]


CSV = 'text,label\nvé một,a\n"two, too",b\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("bom.csv", CSV.encode("utf-8-sig")),
        ("u16.csv", CSV.encode("utf-16")),
        ("u16be.csv", CSV.encode("utf-16-be")),
        ("u32.csv", CSV.encode("utf-32")),
        ("crlf.csv", CSV.replace("\n", "\r\n").encode()),
        ("CAPITAL.CSV", CSV.encode()),
        ("packed.csv.gz", packed(CSV.encode())),
        ("blank.csv", (CSV.replace("\nvé", "\n\nvé") + "\n\n").encode()),
        ("semi.csv", "text;label\nvé một;a\ntwo, too;b\n".encode()),
        ("sep.csv", "sep=;\r\ntext;label\r\nvé một;a\r\ntwo, too;b\r\n".encode("utf-8-sig")),
        ("tab.csv", "text\tlabel\nvé một\ta\ntwo, too\tb\n".encode()),
        ("t.tsv", "text\tlabel\nvé một\ta\ntwo, too\tb\n".encode()),
        ("bar.csv", "text|label\nvé một|a\ntwo, too|b".encode()),
        ("a.jsonl", lines(ROWS).encode()),
        ("bom.jsonl", lines(ROWS).encode("utf-8-sig")),
        ("A.NDJSON", lines(ROWS).encode()),
        ("u16.jsonl", lines(ROWS).encode("utf-16")),
        ("blank.jsonl", ("\n" + lines(ROWS).replace("}\n", "}\n\n \n")).encode()),
        ("lines.json", lines(ROWS).encode()),
        ("list.json", json.dumps(ROWS, indent=1).encode()),
        ("data.json", json.dumps({"data": ROWS}).encode()),
        ("version.json", json.dumps({"version": "1.0", "data": ROWS}).encode()),
        ("index.json", json.dumps({str(i): row for i, row in enumerate(ROWS)}).encode()),
        ("pandas.json", json.dumps({n: {str(i): row[n] for i, row in enumerate(ROWS)} for n in ROWS[0]}).encode()),
        (
            "split.json",
            json.dumps(
                {"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}
            ).encode(),
        ),
        ("initial.csv", 'text, label\nvé một, "a"\n"two, too", "b"\n'.encode()),
        ("cr.csv", CSV.replace("\n", "\r").encode()),
        ("gzip_by_content.csv", packed(CSV.encode())),
        ("columns.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode()),
        ("items.json", json.dumps({"made": {"by": "me"}, "items": ROWS}).encode()),
    ],
)
def test_one_table_in_many_dresses(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == ROWS


def test_words_of_a_table_stay_words(tmp_path):
    words = ["None", "NA", "null", "nan", "N/A", "-1", "007", "1.0", "1e5", "true", "2024-01-01"]
    (tmp_path / "words.csv").write_text("text,label\n" + "".join(f"x,{word}\n" for word in words) + "y,\n")
    assert [row["label"] for row in rows_of(tmp_path / "words.csv")] == [*words, None]


def test_packed_tables(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    book = openpyxl.Workbook()
    for row in ([*ROWS[0]], *([*row.values()] for row in ROWS)):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    for name in ("a.parquet", "a.xlsx"):
        (tmp_path / f"{name}.gz").write_bytes(packed((tmp_path / name).read_bytes()))
        assert rows_of(tmp_path / f"{name}.gz") == rows_of(tmp_path / name) == ROWS


def test_of_several_sheets_the_first_is_read_and_said(tmp_path):
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["a", "b"]):
        book.active.append(row)
    book.create_sheet("More").append(["text", "label"])
    book.save(tmp_path / "a.xlsx")
    assert "sheet 'Sheet', the first of 2" in describe(tmp_path / "a.xlsx")
    book.active.cell(1, 3, "text")
    book.save(tmp_path / "a.xlsx")
    assert "two columns are named text" in refused(tmp_path / "a.xlsx")
    (tmp_path / "a.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:-200])
    assert "not an Excel workbook" in refused(tmp_path / "a.xlsx")


def test_excel(tmp_path):
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["vé", "007"], ["hai", 3], [None, None], ["ba", None]):
        book.active.append(row)
    book.save(tmp_path / "book.xlsx")
    assert rows_of(tmp_path / "book.xlsx") == [
        {"text": "vé", "label": "007"},
        {"text": "hai", "label": "3"},
        {"text": "ba", "label": None},
    ]


def test_a_workbook_whose_styles_openpyxl_cannot_read(tmp_path):
    """Of several programs; openpyxl raises a TypeError."""
    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as old, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"<fill><patternFill/></fill>", b"<fill></fill>"))
    assert "not an Excel workbook" in refused(tmp_path / "a.xlsx")


def test_what_excel_hides_or_merges_and_formulas_without_a_value(tmp_path):
    """pandas and openpyxl write `=> hello` as a formula that nobody computed: the cell would be empty."""
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["lists", "of choices"]):
        book.active.append(row)
    book.active.sheet_state = "hidden"
    sheet = book.create_sheet("Data")
    for row in ([*ROWS[0]], *([*row.values()] for row in ROWS)):
        sheet.append(row)
    book.save(tmp_path / "hidden.xlsx")
    assert rows_of(tmp_path / "hidden.xlsx") == ROWS and "sheet" not in describe(tmp_path / "hidden.xlsx")
    sheet.merge_cells("C2:C3")
    book.save(tmp_path / "merged.xlsx")
    assert "of merged cells such as C2:C3 the first is filled" in describe(tmp_path / "merged.xlsx")
    sheet["A3"] = "=> hello"
    book.save(tmp_path / "formula.xlsx")
    assert "cell A3 of sheet 'Data' holds a formula without its value" in refused(tmp_path / "formula.xlsx")
    for value, text in ((b"<v>7</v>", "7"), (b"<v></v>", None)):  # computed, as Excel writes it; an empty text
        kind = b"" if text else b' t="str"'
        with zipfile.ZipFile(tmp_path / "formula.xlsx") as old, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as new:
            for name in old.namelist():
                part = re.sub(
                    rb'"A3"><f>(.*?)</f><v ?/?>(</v>)?', rb'"A3"%s><f>\1</f>%s' % (kind, value), old.read(name)
                )
                new.writestr(name, part)
        assert [row["text"] for row in rows_of(tmp_path / "a.xlsx")] == ["vé một", text]


@pytest.mark.parametrize(("name", "split"), [("test", "test"), ("valid", "validation"), ("Dev", "validation")])
def test_splits_of_one_json_are_splits(name, split, tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"version": "1.0", "train": ROWS, name: ROWS[:1]}))
    for load in (load_data, load_stream):
        found = load(str(tmp_path / "splits.json"))
        assert {name: len(list(rows)) for name, rows in found.items()} == {"train": 2, split: 1}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"label": 1}, {"label": "x"}, {"label": True}], ["1", "x", "True"]),
        ([{"label": "a"}] * 1500 + [{"label": 2, "late": "key"}], ["a"] * 1500 + ["2"]),
        ([{"label": 1}] * 1500 + [{"label": 1.5}], [1] * 1500 + [1.5]),
        ([{"label": ["a"]}, {"label": "b"}, {"label": {"c": 1}}], ['["a"]', "b", '{"c": 1}']),
        ([{"label": float("nan")}, {"label": 1.5}], [None, 1.5]),
        ([{"label": "half \ud83d character"}, {"label": "whole"}], ["half \ufffd character", "whole"]),
    ],
)
def test_rows_that_disagree_are_kept(rows, found, tmp_path):
    (tmp_path / "mixed.jsonl").write_text(lines(rows))
    assert [row["label"] for row in load_data(str(tmp_path / "mixed.jsonl"))["train"]] == found
    assert len(list(load_stream(str(tmp_path / "mixed.jsonl"))["train"])) == len(found)


def test_halves_of_characters_in_one_document(tmp_path):
    rows = [{"label": "half \ud83d character"}]
    for content in (rows, {"data": rows}, {"train": rows, "test": rows}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert rows_of(tmp_path / "a.json") == [{"label": "half \ufffd character"}]


def test_lines_of_a_text_are_rows_and_a_very_long_one_is_cut(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\n  two\n \nthree")
    assert [row["text"] for row in rows_of(tmp_path / "lines.txt")] == ["one", "  two", "three"]
    words = "seventeen words " * (3 * PIECE // 16)
    (tmp_path / "long.txt").write_text(words)
    found = [row["text"] for row in rows_of(tmp_path / "long.txt")]
    assert len(found) >= 3 and max(map(len, found)) <= PIECE and "".join(found) == words


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "l1.csv",
            "text,label\nok,a\ncaf\xe9,b\n".encode("latin-1"),
            ["line 3: not UTF-8 (byte 0xe9)", "iconv -f WINDOWS-1252"],
        ),
        ("l1.jsonl", '{"text": "\x93x\x94"}'.encode("latin-1"), ["line 1: not UTF-8 (byte 0x93)", "iconv"]),
        ("l1.txt", b"a\nb\n\xe9", ["line 3: not UTF-8"]),
        (
            "open.csv",
            b'text,label\na,b\n"c,d\n' + b"e,f\n" * 30,
            ["line 3: a quotation mark opens a cell and swallows 30"],
        ),
        ("mid.csv", b'text,label\na,b\n"c,d\n' + b"e,f\n" * 3 + b'g "h",i\n', ["line 3: a quotation mark", "Close it"]),
        ("more.csv", b"text,label\na,b\nc,d,e\n", ["line 3: 3 cells, but the header has 2 (text, label)"]),
        (
            "end.csv",
            b'text,label\na,b\n"cut off in its mid',
            ["line 3: a quotation mark opens a cell that does not end"],
        ),
        ("inches.csv", b'text,label\n5" pipe,"a\nb"\nc,d,e\n', ["line 4: 3 cells"]),
        ("objects.txt", lines(ROWS).encode("utf-8-sig"), ["its first line is a JSON object", "name it .jsonl"]),
        ("cut.json.gz", packed(json.dumps(ROWS * 500).encode())[:-20], ["cannot be read"]),
        ("l1.json", json.dumps(ROWS, ensure_ascii=False).encode("cp1258", "replace"), ["line 1: not UTF-8", "iconv"]),
        ("twice.csv", b"text,text\na,b\n", ["two columns are named text"]),
        ("empty.csv", b"", ["no header"]),
        ("cut.jsonl", lines(ROWS).encode()[:-9], ["line 2: not JSON", "may have been cut"]),
        ("bad.jsonl", b'{"a": 1}\n{oops}\n{"a": 2}\n', ["line 2: not JSON"]),
        ("scalar.jsonl", b'{"a": 1}\n3\n', ["line 2: expected an object {...}, found int"]),
        ("scalar.json", b"[1, 2]", ["row 1: expected an object {...}, found int"]),
        ("cut.csv.gz", packed(b"text,label\n" + b"abc,defgh\n" * 5000)[:-20], ["cannot be read"]),
        (
            "backslash.csv",
            b'text,label\nplain,a\n"a \\"quoted\\" word","b"\n',
            ["line 3: a quotation mark within a cell stands behind a backslash", 'Write it twice ("")'],
        ),
        ("array.jsonl", json.dumps(ROWS).encode(), ["line 1: expected an object {...}, found list", "name it .json"]),
        ("pretty.jsonl", json.dumps(ROWS, indent=1).encode(), ["line 1: not JSON", "name it .json"]),
        (
            "one_by_one.json",
            b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n',
            ["line 4: not JSON: Extra data", "jq -c . one_by"],
        ),
        ("cut.json", json.dumps(ROWS, indent=1).encode()[:-9], ["not JSON", "may have been cut"]),
        ("deep.jsonl", b'{"a": ' + b"[" * 9999 + b"]" * 9999 + b"}", ["line 1: not JSON", "recursion"]),
        ("open_header.csv", b'text,"label\na,b\nc,d\n', ["line 1: a quotation mark opens a cell and swallows 2"]),
        ("repr.jsonl", b"{'text': 'a', 'label': 'b'}\n" * 3, ["line 1: not JSON", "Python's repr", "json.dumps"]),
        ("packed.csv", b"PK\x03\x04" + bytes(99), ["a zip archive or an Office document", "unpack it"]),
        ("workbook.csv", b"\xd0\xcf\x11\xe0" + bytes(99), ["an old Office document"]),
        ("columns.csv", b"PAR1" + bytes(99), ["name it .parquet"]),
        ("paper.txt", b"%PDF-1.7\n\xff", ["python -m shared.corpora"]),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
        ("binary.txt", bytes(range(256)) * 300, ["not a text but binary data"]),
        ("no.xlsx", b"text,label\n", ["not an Excel workbook", "Save it as .csv in UTF-8"]),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path / name)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.parquet", "a whole Parquet|cannot be read"),
        ("none.jsonl", "holds no row"),
        ("old.xls", "cannot read .xls;.*Save it as .xlsx or .csv"),
        ("a.csv.zip", "cannot read .zip;.*Unpack it"),
        ("a.md", "cannot read .md;.*python -m shared.corpora"),
    ],
)
def test_damaged_and_unknown_files_are_one_line(name, words, tmp_path):
    (tmp_path / name).write_bytes(b"" if name == "none.jsonl" else b"PAR1 nonsense")
    with pytest.raises(UserError, match=words):
        load_data(str(tmp_path / name))


def test_names_of_columns_of_several_lines(tmp_path):
    """A survey's columns are its questions: `--columns` says them on one line. Nothing of the header becomes a row."""
    (tmp_path / "survey.csv").write_text('text,"What is it?\n(one word) "\r\n"two\nlines",a\nvé,b\n')
    book = openpyxl.Workbook()
    for cells in (["text", "What is it?\n(one word)"], ["two\nlines", "a"], ["vé", "b"]):
        book.active.append(cells)
    book.save(tmp_path / "survey.xlsx")
    name = "What is it? (one word)"
    for kind in ("csv", "xlsx"):
        assert rows_of(tmp_path / f"survey.{kind}") == [{"text": "two\nlines", name: "a"}, {"text": "vé", name: "b"}]
    (tmp_path / "more.csv").write_text('sep=;\n"te\nxt";label\na;b\nc;d;e\n')
    assert "line 5: 3 cells" in refused(tmp_path / "more.csv")


@pytest.mark.parametrize("says", ["A1", "A1:B3", "A1:B900"])
def test_a_workbook_that_says_a_wrong_size_is_read_whole(says, tmp_path):
    """Some exporters write `<dimension>` before they know it. `_x000D_` stands for a character that XML cannot hold."""
    book = openpyxl.Workbook()
    for cells in (["text", "label"], *([f"row {i}_x000D_", None if i == 1 else "x"] for i in range(1, 6))):
        book.active.append(cells)
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as changed:
        for part in whole.namelist():
            changed.writestr(part, whole.read(part).replace(b'"A1:B6"', f'"{says}"'.encode()))
    assert rows_of(tmp_path / "a.xlsx") == [
        {"text": f"row {i}\r", "label": None if i == 1 else "x"} for i in range(1, 6)
    ]


def test_a_type_of_parquet_that_datasets_lacks_is_one_line(tmp_path):
    table = {"text": ["a"], "m": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: cannot be read: .*map<.* Leave that column out"):
        load_data(str(tmp_path / "a.parquet"))


def test_another_version_does_not_take_what_this_one_has_read(tmp_path):
    """`datasets` keeps the rows of a file, also from one version of this project to the next."""
    shutil.copytree(ROOT / "shared", tmp_path / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "a.csv").write_text("text\nword\n")
    command = [sys.executable, "-c", "from shared.data.load import load_data; print(load_data('a.csv')['train'][0])"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def read():
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert read() == "{'text': 'word'}\n"
    code = tmp_path / "shared/data/files.py"
    code.write_text(code.read_text().replace("name: cell or None for name", "name: cell.upper() for name"))
    assert read() == "{'text': 'WORD'}\n"


def test_saved_rows_may_be_none(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="saved: one of its splits holds no row"):
        load_data(str(tmp_path / "saved"))


# Each task, by its own function that reads rows


def words(i: int) -> str:
    """Texts that are no near-duplicates of each other."""
    return " ".join(f"w{i * 31 + j * j}" for j in range(12))


def classify(path, *argv):
    argv = [f"--dataset={path}", "--max_length=16", "--min_label_rows=5", *argv]
    script, _, run_args = parse(train_script("classify_bert").ScriptArguments, TRAINING, argv)
    return train_script("classify_bert").load_rows(script, run_args, 42)


def mlm(path):
    run_args = parse(train_script("mlm_bert").ScriptArguments, TRAINING, [f"--dataset={path}"])[2]
    return train_script("mlm_bert").load_documents(run_args, 42)


def table(path, labels):
    path.write_text("text,label\n" + "".join(f"{words(i)},{label}\n" for i, label in enumerate(labels)))
    return path


@pytest.mark.parametrize(
    ("cycle", "classes"),
    [
        (["-1", "0", "1"], ["-1", "0", "1"]),
        (["None", "NA", "ok"], ["NA", "None", "ok"]),
        (["007", "042"], ["007", "042"]),
        (["0", "1"] * 40 + [""], ["0", "1"]),
        (["cs/AI", "cs/CL"], ["cs/AI", "cs/CL"]),
    ],
)
def test_classes_are_as_written(cycle, classes, tmp_path):
    path = table(tmp_path / "data.csv", (cycle * 150)[:150])
    splits, found, report = classify(path)
    assert found == classes and sum(map(len, splits.values())) == 150 - (150 // len(cycle) if "" in cycle else 0)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([1.0, 0.0, None] * 50, ["0", "1"]),
        ([1.0, 0.0, float("nan")] * 50, ["0", "1"]),
        ([-1, 0, 1] * 50, ["-1", "0", "1"]),
    ],
)
def test_numbers_of_a_parquet_are_classes(labels, found, tmp_path):
    pq.write_table(pa.table({"text": [words(i) for i in range(150)], "label": labels}), tmp_path / "a.parquet")
    assert classify(tmp_path / "a.parquet")[1] == found


def test_labels_that_are_kept_secret_are_none(tmp_path):
    rows = [{"text": words(i), "label": i % 2} for i in range(100)]
    hidden = [{"text": words(i), "label": -1} for i in range(100, 130)]
    (tmp_path / "a.json").write_text(json.dumps({"train": rows, "test": hidden}))
    splits, found, report = classify(tmp_path / "a.json")
    assert found == ["0", "1"] and "no label 30" in report
    rows = [
        {"text": words(i), "label": i % 3 - 1} for i in range(150)
    ]  # negative, neutral, positive; tested on the first alone
    (tmp_path / "b.json").write_text(json.dumps({"train": rows, "test": hidden}))
    assert classify(tmp_path / "b.json")[1] == ["-1", "0", "1"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["a", "b"], ["c"]] * 75, "is ['a', 'b']: this task gives each text one class"),
        ([{"a": 1}, {"a": 2}] * 75, "row 1: the label of 'w0"),
        (["['a', 'b']", "['a']"] * 75, "this task gives each text one class"),
        (["[0, 1]", "[1, 1]"] * 75, "this task gives each text one class"),
        ([i / 7 + 0.01 for i in range(150)], "quantities, not classes. This task does no regression"),
    ],
)
def test_what_is_no_class_is_refused_by_name(labels, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": words(i), "label": label} for i, label in enumerate(labels)))
    with pytest.raises(UserError) as stopped:
        classify(tmp_path / "a.jsonl")
    assert said in str(stopped.value)


def test_a_column_within_a_column_is_refused_where_it_is_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"data": {"text": words(i), "label": "a"}} for i in range(30)))
    with pytest.raises(UserError, match=r"data\.text lies inside the column data, and this task reads whole columns"):
        classify(tmp_path / "a.jsonl", "--columns", "text=data.text", "label=data.label")


def test_lists_among_texts_are_said(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(lines([{"text": ["a"]}, {"text": "b"}, {"text": None}]))
    assert [row["text"] for row in load_data(str(tmp_path / "a.jsonl"))["train"]] == ['["a"]', "b", None]
    assert "column text: 1 of 3 values are lists or objects" in caplog.text


def test_binary_and_list_columns_stop_in_one_line(tmp_path):
    for value, said in ((b"\x00\xff", r"text = b'\x00\xff'"), (["a", "b"], "text = ['a', 'b']")):
        pq.write_table(pa.table({"text": [value] * 150, "label": ["a", "b"] * 75}), tmp_path / "a.parquet")
        for load in (classify, mlm):
            with pytest.raises(UserError, match="150 of 150 rows are unusable .*wrong type") as stopped:
                load(tmp_path / "a.parquet")
            assert f"first row 1, {said}\n" in str(stopped.value)


@pytest.mark.parametrize("task", ["pretrain_gpt2", "mlm_bert"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "u16.jsonl"])
def test_documents_are_read_alike(task, name, tmp_path):
    text = {
        "a.txt": "\n\n".join(words(i) for i in range(60)).encode(),
        "a.csv": ("text;x\n" + "".join(f"{words(i)};\n" for i in range(60))).encode("utf-8-sig"),
        "u16.jsonl": lines({"text": words(i)} for i in range(60)).encode("utf-16"),
    }
    (tmp_path / name).write_bytes(text[name])
    if task == "pretrain_gpt2":
        import documents

        function = documents.load_documents
    else:
        function = train_script(task).load_documents
    run_args = parse(train_script(task).ScriptArguments, TRAINING, [f"--dataset={tmp_path / name}"])[2]
    splits, report = function(run_args, 42)
    assert sum(map(len, splits.values())) == 60 and report == "read 60 = kept 60 + dropped 0"


def test_a_stream_of_the_same_file_has_the_same_documents(tmp_path):
    import documents

    (tmp_path / "a.csv").write_text("text;x\n" + "".join(f"{words(i)};\n" for i in range(300)), encoding="utf-16")
    run_args = parse(train_script("pretrain_gpt2").ScriptArguments, TRAINING, [f"--dataset={tmp_path / 'a.csv'}"])[2]
    corpus = documents.open_stream(run_args, {"validation": 5, "test": 5}, 42)
    held_out = {text for texts in corpus.held_out.values() for text in texts}
    assert (
        held_out and held_out | set(corpus.texts()) <= {words(i) for i in range(300)} and len(set(corpus.texts())) > 200
    )


def test_official_splits_of_a_stream(tmp_path, caplog):
    """What they repeat of the training rows is said, and what is wrong with them."""
    import documents

    for name, count in (("train", 80), ("test", 7), ("valid", 3)):
        rows = [{"text": words(i + 100 * (name == "valid"))} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(lines(rows))
    run_args = parse(train_script("pretrain_gpt2").ScriptArguments, TRAINING, [f"--dataset={tmp_path}"])[2]
    corpus = documents.open_stream(run_args, {"validation": None, "test": None}, 42)
    assert {name: len(texts) for name, texts in corpus.held_out.items()} == {"validation": 3, "test": 7}
    assert "7 of 7 rows of the official test split are near-duplicates of training rows" in caplog.text
    assert "validation split" not in caplog.text
    (tmp_path / "test.jsonl").write_text(lines([{"text": words(1)}, {"text": None}]))
    with pytest.raises(UserError, match="1 of 2 rows are unusable .*\n.*missing; first test row 2"):
        documents.open_stream(run_args, {"validation": None, "test": None}, 42)


def test_rows_of_questions_and_summaries_are_read_alike(tmp_path):
    qa, summaries = train_script("qa_squad"), train_script("summarize_t5")
    asked = "context,question,answers\n" + "".join(f"{words(i)} in {1700 + i}.,When?,{1700 + i}\n" for i in range(60))
    (tmp_path / "qa.csv").write_text(asked.replace(",", ";"), encoding="utf-16")
    run_args = parse(qa.ScriptArguments, TRAINING, [f"--dataset={tmp_path / 'qa.csv'}"])[2]
    splits, _ = qa.load_rows(run_args, 42)
    assert all(row["answers"]["text"] for rows in splits.values() for row in rows)
    none = asked.replace(" in ", " None in ")
    none = "\n".join([none.splitlines()[0], *(line.rsplit(",", 1)[0] + ",None" for line in none.splitlines()[1:])])
    (tmp_path / "none.csv").write_text(none)
    run_args = parse(qa.ScriptArguments, TRAINING, [f"--dataset={tmp_path / 'none.csv'}"])[2]
    assert all(row["answers"]["text"] == ["None"] for rows in qa.load_rows(run_args, 42)[0].values() for row in rows)
    (tmp_path / "sum.tsv").write_text("document\tsummary\n" + "".join(f"{words(i)}\tNA\n" for i in range(60)))
    seq2seq = "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"
    run_args = parse(summaries.ScriptArguments, seq2seq, [f"--dataset={tmp_path / 'sum.tsv'}"])[2]
    splits, _ = summaries.load_rows(run_args, 42)
    assert sum(map(len, splits.values())) == 60 and splits["train"][0]["summaries"] == ["NA"]


def test_the_help_names_each_kind_of_file():
    from shared.data.files import READERS
    from shared.training.arguments import RunArguments

    text = RunArguments.__dataclass_fields__["dataset"].metadata["help"]
    assert all(ending in text for ending in READERS)
