"""Data sets of the Hub, by name. Called by load.py and by shared/corpora."""

import contextlib
import logging

from shared import UserError

PARQUET = "refs/convert/parquet"  # the revision where the Hub keeps its copy of a data set
# What a number that is missing may be written as, by pandas and others
MISSING = ["", "NA", "N/A", "#N/A", "NaN", "nan", "None", "null", "NULL"]


def read(repo: str, revision: str | None, config: str | None, stream: bool = False):
    """The splits of a data set of the Hub, a `DatasetDict` or, as a stream, an `IterableDatasetDict`.

    The Hub still knows names from before there were owners (`imdb`, `squad`), and whose they are now; `datasets` does not. Its
    own parquet copies have a folder for each configuration, and no card that says so.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.text.text import Text

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs it raises, too
    if "/" not in repo:
        from huggingface_hub import HfApi

        repo = HfApi().dataset_info(repo, revision=revision).id
    where = {"data_dir": config} if revision == PARQUET else {"name": config}
    builder, where = _builder(where | {"path": repo, "revision": revision})
    if not isinstance(builder, Csv):
        found = _read(builder, stream)
        return found.filter(_not_blank) if isinstance(builder, Text) else found
    data = {}
    for options, splits in _as_written(builder, where):
        builder = datasets.load_dataset_builder(**where, **options)
        if splits:  # others would not fit these columns, nor these what a card counts
            builder.info.splits = None
            kept = {split: builder.config.data_files[split] for split in splits}
            builder.config.data_files = datasets.data_files.DataFilesDict(kept)
        data |= _read(builder, stream)
    return (datasets.IterableDatasetDict if stream else datasets.DatasetDict)(data)


def _builder(where: dict) -> tuple:
    """What reads a data set, and the arguments that made it. Without the Hub `datasets` looks for what it made of it before,
    under other names than tables have here: their files lie in the Hub's cache, and are read again.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.csv.csv import Csv

    builder = refused = None
    try:
        builder = datasets.load_dataset_builder(**where)
    except ValueError as error:
        if "Couldn't find cache" not in str(error):
            raise
        refused = error
    if refused or isinstance(builder, Cache):
        if folder := _kept(where["path"], where["revision"]):
            kept = where | {"path": folder, "revision": None}
            found = datasets.load_dataset_builder(**kept)
            if isinstance(found, Csv):
                return found, kept
        if refused:
            raise refused
    return builder, where


def _kept(repo: str, revision: str | None) -> str | None:
    """The folder in the Hub's cache with the files of a data set that were read last."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = [each for each in scan_cache_dir().repos if (each.repo_type, each.repo_id) == ("dataset", repo)]
    except CacheNotFound:
        return None
    states = [state for each in repos for state in each.revisions]
    named = [state for state in states if revision in (None, state.commit_hash, *state.refs)]
    return str(max(named, key=lambda state: state.last_modified).snapshot_path) if named else None


def _not_blank(row: dict) -> bool:
    """As of a .txt of this machine, where blank lines are no rows."""
    return bool(row["text"].strip())


def _read(builder, stream: bool):
    if stream:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def _as_written(builder, where: dict) -> list[tuple[dict, list]]:
    """What makes a .csv or .tsv read as one of this machine is, each time with the splits that it is for (none: all of them).

    `None`, `NA` and `007` are words, only an empty cell is missing; where the data set's card says types, its numbers may still
    be missing in pandas' ways. Semicolons, tabs or bars may stand between the cells, and a split may lack columns of the
    training split: a test split is often without labels.
    """
    import datasets

    options = {"keep_default_na": False, "na_values": [""]}
    if declared := builder.info.features:
        texts = [name for name, kind in declared.items() if _holds_words(kind)]
        return [(options | {"na_values": {name: [""] if name in texts else MISSING for name in declared}}, [])]
    columns = _columns(where)
    every = columns.get("train") or next(filter(None, columns.values()), [])
    between = next((each for each in "\t;|" if len(every) == 1 and each in every[0]), None)
    if between and builder.config.sep == ",":
        options["sep"] = between
        columns = _columns(where, sep=between)
        every = columns.get("train") or next(filter(None, columns.values()))
    if any(name.startswith(" ") for name in every):
        options["skipinitialspace"] = True
        columns = {split: [name.strip() for name in names] for split, names in columns.items()}
        every = [name.strip() for name in every]
    groups: dict[tuple, list] = {}
    for split, names in columns.items():
        groups.setdefault(tuple(name for name in every if name in names) or tuple(every), []).append(split)
    words = [datasets.Features(dict.fromkeys(names, datasets.Value("string"))) or None for names in groups]
    return [(options | {"features": each}, splits) for each, splits in zip(words, groups.values(), strict=True)]


def _columns(where: dict, **options) -> dict[str, list]:
    """The names in the header of each split's first file; none for a split without a row."""
    import datasets

    streams = datasets.load_dataset_builder(**where, nrows=1, **options).as_streaming_dataset()
    firsts = {split: next(iter(rows), {}) for split, rows in streams.items()}
    return {split: [name for name in row if not name.startswith("__index_level_")] for split, row in firsts.items()}


def _holds_words(kind) -> bool:
    import datasets

    return isinstance(kind, datasets.ClassLabel) or getattr(kind, "dtype", None) in ("string", "large_string")


def gated(name: str) -> str:
    """What is said of a data set that this account may not read yet."""
    return (
        f"{name} is gated: accept its terms on its page on the Hub, then log in with `hf auth login` (or set HF_TOKEN)."
    )


@contextlib.contextmanager
def refusals(name: str):
    """What `datasets` raises for a name on the Hub, as one line."""
    import datasets
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError, HFValidationError, HTTPError) as error:
        said = str(error).strip().splitlines() or [""]
        if "gated" in said[0]:
            raise UserError(gated(name)) from error
        here = "" if "/" in name else "no such file or folder, and "
        raise UserError(
            f"{name}: {here}not found on the Hub, or the Hub cannot be reached ({type(error).__name__}: {said[0][:150]})."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{name} is a script ({str(error).split()[-1]}), and code from a data set is not run. Most such data sets have a "
            f"copy in parquet: --dataset {name.partition('@')[0]}@{PARQUET}"
        ) from error
    except (datasets.exceptions.DatasetsError, ValueError, KeyError, TypeError) as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> UserError:
    """What is said of files that are not what `datasets` takes them for, or of a configuration that is not there."""
    cause = error.__cause__ or error
    said = " ".join(str(cause).split("\nExample")[0].split())
    if "onfig" in said:  # the message lists those there are
        return UserError(f"{name}: {said} Name one: --dataset_config ...")
    if "corresponds to no data" in said:
        return UserError(f"{name}: one of its splits holds no row: {said} Download its files, and name the others.")
    return UserError(
        f"{name}: `datasets` cannot read its files ({type(cause).__name__}: {said[:150]}). Download them, and name the file or "
        "folder: then the place is said, and how to mend it."
    )
