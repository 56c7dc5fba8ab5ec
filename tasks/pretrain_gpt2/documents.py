"""Documents of the three splits: all of a corpus that fits into memory, or a stream that is never held. Used by train.py.

Of a stream only the held-out documents are kept in memory. A hash of its text decides which side a document is on, so
nothing has to be loaded first, and the answer is the same in each pass and after a resume.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from blocks import side
from datasets import Dataset, IterableDataset

from shared import UserError
from shared.data.cleaning import CleaningReport, clean_dataset, clean_rows, document_cleaner
from shared.data.columns import find_columns
from shared.data.load import load_splits, load_stream
from shared.data.splits import report_repeated, split_dataset
from shared.training.launch import log

LOOK_FOR_HELD_OUT = 200_000  # rows read in search of held-out documents before giving up


def load_documents(run_args, seed: int) -> tuple[dict, str]:
    """Clean documents (column `text`) of the three splits, and the cleaning report as one line."""
    data = load_splits(run_args)
    names = next(iter(data.values())).column_names
    clean = document_cleaner(find_columns(run_args.dataset, names, run_args.columns, ["text"])["text"])
    cleaned, report = clean_dataset(data, clean, run_args.dataset, most=run_args.max_bad_rows)
    return split_dataset(cleaned, lambda row: row["text"], seed), str(report)


@dataclass
class Corpus:
    """What `open_stream` finds: held-out texts, and training rows with the function that turns a row into a text."""

    rows: IterableDataset
    held_out: dict[str, list[str]]
    missing: tuple[str, ...]  # splits that are taken out of the training rows
    column: str
    seed: int
    cleaning: str
    unusable: int = 0  # rows passed over, each time that they are read

    def __post_init__(self):
        self.clean = document_cleaner(self.column)

    def text(self, row: dict) -> str | None:
        """The clean text of a training row; None if it is unusable or held out."""
        found = self.clean(row)
        if isinstance(found, str):
            self.unusable += 1
            # The 1st, 10th, 100th, ...: `open_stream` has checked the first rows only
            if str(self.unusable).strip("0") == "1":
                reason = found.removeprefix("bad: ").replace("\n", ", ")
                log.warning(
                    "unusable rows of the stream, passed over: %s; the last one: %s", f"{self.unusable:,}", reason
                )
            return None
        return found["text"] if side(found["text"], self.seed, self.missing) == "train" else None

    def texts(self) -> Iterator[str]:
        """All training texts, from the beginning."""
        self.rows.load_state_dict(None)
        return (text for row in self.rows if (text := self.text(row)) is not None)


def open_stream(run_args, most: dict[str, int | None], seed: int) -> Corpus:
    """Opens the corpus and collects at most `most[split]` (2,000 where that is None) documents of validation and test.

    Official splits are kept, as in `shared.data.splits.split_dataset`: validation stands in for a test split that is missing.

    Raises:
        UserError: no training split, no documents, or none that is held out.
    """
    data = load_splits(run_args, load_stream)
    if "train" not in data:
        raise UserError(
            f"{run_args.dataset}: no train split, found {', '.join(data)}. Rename the one to learn from to train."
        )
    names = data["train"].column_names or list(next(iter(data["train"]), {}))
    if not names:
        raise UserError(f"{run_args.dataset}: the stream has no rows.")
    column = find_columns(run_args.dataset, names, run_args.columns, ["text"])["text"]
    official = {name: data[name] for name in ("test", "validation") if name in data}
    if "test" not in official and "validation" in official:
        official["test"] = official.pop("validation")
    missing = tuple(name for name in ("test", "validation") if name not in official)
    clean, report = document_cleaner(column), CleaningReport()
    held_out = {name: [] for name in ("validation", "test")}
    wanted = {name: most[name] or 2000 for name in held_out}
    for name, rows in official.items():
        cleaned = CleaningReport()
        held_out[name] = [row["text"] for row in islice(clean_rows(rows, clean, cleaned, f"{name} row"), wanted[name])]
        cleaned.check(run_args.dataset, run_args.max_bad_rows)
    learnt = []
    for row in clean_rows(data["train"], clean, report):
        chosen = side(row["text"], seed, missing)
        if chosen != "train" and len(held_out[chosen]) < wanted[chosen]:
            held_out[chosen].append(row["text"])
        elif chosen == "train" and official and report.read <= 1000:
            learnt.append(row["text"])
        enough = all(len(held_out[name]) == wanted[name] for name in missing) and report.read >= 1000
        if enough or report.read == LOOK_FOR_HELD_OUT:
            break
    report.check(run_args.dataset, run_args.max_bad_rows)
    for name, texts in held_out.items():
        if not texts and name in official:
            raise UserError(f"The official {name} split has no rows. Remove it to have one taken from train.")
        if not texts:
            raise UserError(
                f"The {name} split is empty: of {report.read:,} rows none fell to it. Give one, or more rows."
            )
    if official:
        texts = {"train": learnt} | {name: held_out[name] for name in official}
        report_repeated(
            {name: Dataset.from_dict({"text": each}) for name, each in texts.items()}, lambda row: row["text"]
        )
    cleaning = f"first {report.read:,} rows of the stream: {report}"
    return Corpus(data["train"], held_out, missing, column, seed, cleaning)
