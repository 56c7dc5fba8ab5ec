"""Data sets of the Hub, by name. Called by load.py and by shared/corpora."""

import contextlib

from shared import UserError

PARQUET = "refs/convert/parquet"  # the revision where the Hub keeps its copy of a data set
MISSING = [
    "",
    "NA",
    "N/A",
    "#N/A",
    "NaN",
    "nan",
    "None",
    "null",
    "NULL",
]  # a number in a table, such as pandas writes them


def read(repo: str, revision: str | None, config: str | None, stream: bool = False):
    """The splits of a data set of the Hub, a `DatasetDict` or, as a stream, an `IterableDatasetDict`.

    The Hub still knows names from before there were owners (`imdb`, `squad`), and whose they are now; `datasets` does not. Its
    own parquet copies have a folder for each configuration, and no card that says so.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import Csv

    if "/" not in repo:
        from huggingface_hub import HfApi

        repo = HfApi().dataset_info(repo, revision=revision).id
    where = {"data_dir": config} if revision == PARQUET else {"name": config}
    where |= {"path": repo, "revision": revision}
    builder = datasets.load_dataset_builder(**where)
    if isinstance(builder, Csv):
        builder = datasets.load_dataset_builder(**where, **_as_written(builder))
    if stream:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def _as_written(builder) -> dict:
    """What makes a .csv or .tsv read as one of this machine is: `None`, `NA` and `007` are words, only an empty cell is missing.
    Where the data set's card says types, its numbers may still be missing in pandas' ways.
    """
    import datasets

    if declared := builder.info.features:
        texts = [
            name for name, kind in declared.items() if kind.dtype == "string" or isinstance(kind, datasets.ClassLabel)
        ]
        missing = {name: [""] if name in texts else MISSING for name in declared}
        return {"keep_default_na": False, "na_values": missing}
    first = next((row for rows in builder.as_streaming_dataset().values() for row in rows.take(1)), {})
    features = datasets.Features(dict.fromkeys(first, datasets.Value("string")))
    return {"keep_default_na": False, "na_values": [""], "features": features or None}


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
    except ValueError as error:
        if "onfig" not in str(error):
            raise
        said = " ".join(str(error).split("\nExample")[0].split())
        raise UserError(f"{name}: {said} Name one: --dataset_config ...") from error
