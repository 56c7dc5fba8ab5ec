"""shared/data/load.py on names of the Hub: revisions with slashes, scripts, configurations, gates; each refusal in one line."""

import json
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import task_runs

from shared import UserError
from shared.data.load import _some, load_data, load_splits, without_media

COPY = "Skylion007/openwebtext@refs/convert/parquet"
WANTED = {  # name, configuration -> splits and their number of rows, or what the refusal says
    # first: once the copy is in its cache, `datasets` takes that instead of the script
    ("Skylion007/openwebtext", None): ["Skylion007/openwebtext is a script (openwebtext.py)", f"--dataset {COPY}"],
    (COPY, None): {"train": 60},
    (COPY, "plain_text"): {"train": 60},
    (f"{COPY}-of-old", None): ["not found on the Hub"],
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): {"train": 60},
    ("HuggingFaceFW/fineweb-edu", None): ["sample-10BT", "--dataset_config"],
    ("HuggingFaceFW/fineweb-edu", "sample-10MT"): ["sample-10BT", "--dataset_config"],
    ("films", None): {"train": 2, "test": 1},  # as imdb and squad were called once, and are still found
    ("alice/tables", "plain"): {"train": 3},
    ("alice/tables", "typed"): {"train": 2},
    ("alice/tables", "semicolons"): {"train": 2},
    ("alice/tables", "unlabelled"): {"train": 1, "test": 1},
    ("alice/lines", None): {"train": 2},
    ("alice/tables", "latin"): ["alice/tables: `datasets` cannot read its files (UnicodeDecodeError", "name the file"],
    ("alice/sounds", None): {"train": 2},  # without the package that decodes them
    ("alice/sounds-alone", None): ["alice/sounds-alone: holds pictures, sounds or documents (audio), and no text"],
    ("nosuch", None): ["nosuch: no such file or folder, and not found on the Hub"],
    ("no/such", None): ["not found on the Hub"],
    ("no/such:train", None): ["no/such:train: not found on the Hub"],
    ("https://hub.example/datasets/no/such", None): ["Write its name, no/such."],
    ("https://hub.example/datasets/no/such/tree/main", None): ["Write its name, no/such."],
    ("https://example.com/a/b/rows.csv", None): ["Download it, and name the file"],
    ("s3://bucket/rows.jsonl", None): ["Download it, and name the file"],
    ("alice/gated", None): ["alice/gated is gated: accept its terms on its page on the Hub"],
}
PROGRAM = """
import json
from types import SimpleNamespace
from shared import UserError
from shared.data.load import load_data, load_stream
found = []
for name, config in json.loads(NAMES):
    for load in (load_data, load_stream):
        try:
            data = load(name, config)
            found.append({split: sum(1 for _ in rows) for split, rows in data.items()})
            if name == "alice/tables":
                found[-1]["rows"] = list(data["train"])
        except UserError as error:
            found.append(str(error))
print(json.dumps(found))
"""


TABLES = {
    "README.md": """---
configs:
- {config_name: plain, data_files: plain.csv}
- {config_name: typed, data_files: typed.csv}
- {config_name: semicolons, data_files: semicolons.csv}
- {config_name: latin, data_files: latin.csv}
- config_name: unlabelled
  data_files: [{split: test, path: questions.csv}, {split: train, path: answers.csv}]
dataset_info:
- config_name: typed
  features:
  - {name: text, dtype: large_string}
  - {name: stars, dtype: float32}
  - {name: label, dtype: {class_label: {names: {"0": NA, "1": good}}}}
---
""",
    "plain.csv": 'text,label,left\nNone,007,\n"two\nlines",NA,\n,null,\n',
    "typed.csv": "text,stars,label\nnull,NA,NA\n,1.5,good\n",
    "semicolons.csv": "text;label\na, b, c;007\nd;NA\n",
    "questions.csv": "text\na\n",
    "answers.csv": "text, label\nb, 01\n",
    "latin.csv": "text,label\n\xe9t\xe9,1\n",
}
CELLS = {  # what is in them
    "plain": [
        {"text": "None", "label": "007", "left": None},
        {"text": "two\nlines", "label": "NA", "left": None},
        {"text": None, "label": "null", "left": None},
    ],
    "typed": [{"text": "null", "stars": None, "label": 0}, {"text": None, "stars": 1.5, "label": 1}],
    "semicolons": [{"text": "a, b, c", "label": "007"}, {"text": "d", "label": "NA"}],
    "unlabelled": [{"text": "b", "label": "01"}],
}


def write_sounds(path, columns):
    """A table with a column of sounds, also within a list, as `datasets` writes one."""
    texts = dict.fromkeys(columns, datasets.Value("string"))
    features = datasets.Features({**texts, "audio": {"takes": datasets.List(datasets.Audio(16000))}})
    sounds = [{"takes": [{"bytes": b"RIFF", "path": "a.wav"}]}] * 2
    about = {b"huggingface": json.dumps({"info": {"features": features.to_dict()}}).encode()}
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({**columns, "audio": sounds}).replace_schema_metadata(about), path)


@pytest.fixture
def found(hub, tmp_path):
    """What whole and streamed loading of each WANTED name gives, in one program, to a user who was not let in; tables once more
    without the Hub."""
    hub.create("datasets/alice/gated", gated="manual")
    hub.create("datasets/alice/films")
    hub.moved["datasets/films"] = "alice/films"
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / "films").mkdir(exist_ok=True)
        (tmp_path / "films" / f"{split}.jsonl").write_text('{"text": "a"}\n' * count)
    hub.upload("datasets/alice/films", tmp_path / "films")
    for name, columns in (("sounds", {"text": ["a", "b"]}), ("sounds-alone", {})):
        hub.create(f"datasets/alice/{name}")
        write_sounds(tmp_path / name / "train.parquet", columns)
        hub.upload(f"datasets/alice/{name}", tmp_path / name)
    hub.create("datasets/alice/tables")
    for name, text in TABLES.items():
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / name).write_bytes(text.encode("latin-1"))
    hub.upload("datasets/alice/tables", tmp_path / "tables")
    hub.create("datasets/alice/lines")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("a\n\n  \nb\n")
    hub.upload("datasets/alice/lines", tmp_path / "lines")
    (tmp_path / "program.py").write_text(PROGRAM.replace("NAMES", repr(json.dumps(list(WANTED)))))
    environment = hub.env_for("other", home=tmp_path / "home")
    done = task_runs.command(tmp_path / "program.py", **environment)
    tables = [wanted for wanted in WANTED if wanted[1] in CELLS]
    (tmp_path / "program.py").write_text(PROGRAM.replace("NAMES", repr(json.dumps(tables))))
    offline = task_runs.command(tmp_path / "program.py", **environment | {"HF_HUB_OFFLINE": "1"})
    for name in ("gated", "films", "tables", "lines", "sounds", "sounds-alone"):
        del hub.repos[f"datasets/alice/{name}"]
    del hub.moved["datasets/films"]
    found = {wanted: [] for wanted in WANTED}
    for names, program in ((list(WANTED), done), (tables, offline)):
        assert program.returncode == 0, program.stderr
        answers = iter(json.loads(program.stdout.splitlines()[-1]))
        for wanted in names:
            found[wanted] += [next(answers), next(answers)]
    return found


def test_names_of_the_hub_load_or_say_why_not(found):
    for wanted, answers in found.items():
        for answer in answers:
            if wanted[1] in CELLS:  # cells are what they are in a file of one's own
                assert answer.pop("rows") == CELLS[wanted[1]], wanted
            if isinstance(WANTED[wanted], dict):
                assert answer == WANTED[wanted], wanted
            else:
                missing = [words for words in WANTED[wanted] if words not in answer]
                assert not missing and "\n" not in answer, (wanted, missing, answer)


def test_a_folder_of_texts_names_the_command_that_reads_it(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "b.md", "c.pdf"):
        (tmp_path / "notes" / name).write_text("words")
    with pytest.raises(
        UserError, match="a folder of 3 documents.*python -m shared.corpora .*notes --output notes.jsonl.gz"
    ):
        load_data(str(tmp_path / "notes"))


def test_a_clone_of_a_data_set_names_the_folder_of_its_files(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="in a folder below: --dataset .*data$"):
        load_data(str(tmp_path))
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)  # as the Hub's cache lays it
    (tmp_path / "data").rename(tmp_path / "snapshots" / "abc" / "data")
    with pytest.raises(UserError, match="in a folder below: --dataset .*abc/data$"):
        load_data(str(tmp_path))


def test_a_folder_of_files_by_split(tmp_path):
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("dev", 1), ("test", 4)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {i}"}) for i in range(count)))
    (tmp_path / "README.md").write_text("about")
    counts = {"train": 5, "validation": 1, "test": 4}
    assert {name: len(rows) for name, rows in load_data(str(tmp_path)).items()} == counts
    arguments = SimpleNamespace(dataset=str(tmp_path), validation_file=None, test_file=None, dataset_config=None)
    assert {name: len(rows) for name, rows in load_splits(arguments).items()} == counts
    arguments.validation_file = str(tmp_path / "test.jsonl")
    assert {name: len(rows) for name, rows in load_splits(arguments).items()} == counts | {"validation": 4}
    (tmp_path / "test.csv").write_text("text\na\n")
    with pytest.raises(UserError, match="several files for the test split: test.csv, test.jsonl"):
        load_data(str(tmp_path))


def test_splits_go_by_many_names_and_what_is_not_read_is_said(tmp_path, caplog):
    """A split under another name was left out without a word, and one drawn from train in its place."""
    caplog.set_level("INFO", "taskbook")

    def sizes(path):
        arguments = SimpleNamespace(dataset=str(path), validation_file=None, test_file=None, dataset_config=None)
        return {name: len(rows) for name, rows in load_splits(arguments).items()}

    names = ("Training-00000-of-00003", "Training-00002-of-00003", "eval", "testing", "holdout")
    (tmp_path / "files").mkdir()
    for count, name in enumerate(names, 1):
        (tmp_path / "files" / f"{name}.csv").write_text("text\n" + "".join(f"{name} {i}\n" for i in range(count)))
    assert sizes(tmp_path / "files") == {"train": 3, "validation": 3, "test": 4}
    assert "files that are not read: holdout.csv" in caplog.text
    assert "2 of 3 parts of the train split are here" in caplog.text

    rows = {
        name: datasets.Dataset.from_dict({"text": ["a"] * n}) for name, n in (("train", 5), ("dev", 2), ("extra", 1))
    }
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    assert sizes(tmp_path / "saved") == {"train": 5, "validation": 2, "extra": 1}
    assert "splits that are not read: extra" in caplog.text
    datasets.DatasetDict(rows | {"validation": rows["extra"]}).save_to_disk(tmp_path / "both")
    assert sizes(tmp_path / "both") == {"train": 5, "dev": 2, "extra": 1, "validation": 1}


def test_parts_of_a_split_may_differ_in_type(tmp_path):
    """As rows within one file may: whole numbers in one part, decimals or words in another, names of their own for numbers."""
    (tmp_path / "train1.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": null}')
    (tmp_path / "train2.csv").write_text("text,label,note\nc,x,y\n")
    for number, names in ((3, ["no", "yes"]), (4, ["yes"])):
        label = datasets.ClassLabel(names=names)
        features = datasets.Features(text=datasets.Value("string"), label=label)
        part = datasets.Dataset.from_dict({"text": ["d"] * 2, "label": [0, None]}, features)
        part.to_parquet(tmp_path / f"train{number}.parquet")
    rows = load_data(str(tmp_path))["train"]
    assert list(rows["label"]) == ["1", None, "x", "no", None, "yes", None] and list(rows["note"])[2] == "y"


def test_a_folder_of_anything_else_is_one_line(tmp_path):
    (tmp_path / "a.bin").write_text("")
    with pytest.raises(UserError, match="expected files named train, validation and test .* found a.bin"):
        load_data(str(tmp_path))


def test_data_without_a_train_split_keeps_its_columns(tmp_path):
    """So that the error is that there is none, and not that columns are missing."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a"}))
    arguments = SimpleNamespace(dataset=str(tmp_path), validation_file=None, test_file=None, dataset_config=None)
    assert {name: rows.column_names for name, rows in load_splits(arguments).items()} == {"test": ["text"]}


def test_a_split_with_other_columns_says_so(tmp_path, caplog):
    """A column of the training split is none of the others' where they lack it: it is empty there."""
    (tmp_path / "train.csv").write_text("text,label,note\na,b,c\n")
    (tmp_path / "test.csv").write_text("id,label,text\n7,b,a\n")
    arguments = SimpleNamespace(
        dataset=str(tmp_path / "train.csv"),
        validation_file=None,
        test_file=str(tmp_path / "test.csv"),
        dataset_config=None,
    )
    splits = load_splits(arguments)
    assert splits["train"].features == splits["test"].features and list(splits) == ["train", "test"]
    assert list(splits["test"]) == [{"text": "a", "label": "b", "note": None}]
    assert splits["train"][0]["note"] == "c"
    assert "columns that test lacks, empty there: note" in caplog.text
    assert "columns of test alone, not read: id" in caplog.text


def test_sounds_are_no_columns_of_a_task(tmp_path, caplog):
    caplog.set_level("INFO", "taskbook")
    write_sounds(tmp_path / "a" / "rows.parquet", {"text": ["a", "b"]})
    rows = load_data(str(tmp_path / "a" / "rows.parquet"))["train"]
    assert list(rows) == [{"text": "a"}, {"text": "b"}] and "sounds or documents, not read: audio" in caplog.text
    words = datasets.Dataset.from_dict(
        {"text": ["a"], "any": [{"b": 1}]}, datasets.Features(text=datasets.Value("string"), any=datasets.Json())
    )
    assert list(without_media(datasets.DatasetDict(train=words), "x")["train"]) == [{"text": "a", "any": {"b": 1}}]


def test_some_rows_of_a_stream_keep_their_types_or_agree_on_one():
    names = datasets.Features(label=datasets.ClassLabel(names=["bad", "good"]))
    stream = datasets.Dataset.from_dict({"label": [1, 0]}, names).to_iterable_dataset()
    assert _some(stream, 2, "x").features["label"].names == ["bad", "good"]
    mixed = datasets.IterableDataset.from_generator(lambda: iter([{"stars": 1}, {"stars": "two"}]))
    assert sorted(_some(mixed, 2, "x")["stars"]) == ["1", "two"]
