"""The results table of a README, from the runs' own files, so that it cannot drift. Called by table.py (`--readme`)."""

import re

from shared import UserError

# Of each task what stands in the table: the untrained model, the trivial baseline, the trained model
FIGURES = {
    "pretrain_gpt2": ("base_perplexity", "baseline_full_trigram_perplexity", "test_perplexity"),
    "mlm_bert": ("base_perplexity", "baseline_perplexity", "test_perplexity"),
    "classify_bert": ("base_accuracy", "baseline_accuracy", "test_accuracy"),
    "chat_sft": ("base_perplexity", "baseline_perplexity", "test_perplexity"),
    "dpo_chat": ("base_accuracy", "baseline_longer_reply_accuracy", "test_accuracy"),
    "summarize_t5": ("base_rougeL", "baseline_lead1_rougeL", "test_rougeL"),
    "qa_squad": ("base_f1", "baseline_silent_f1", "test_f1"),
    "rag_docs": ("base_fused_mrr", "baseline_bm25_mrr", "test_fused_mrr"),
}
TIMES = (("train_minutes", "run_minutes"), ("peak_memory_gb",))
IN_PERCENT = ("accuracy", "mrr")  # in all_results.json they are shares


def fill(text: str, runs: list[dict]) -> str:
    """A README whose table has the figures of these runs, with the words and as many decimals as were there.

    A row belongs to the run that is named as its first word: `| qa_squad, MiniLM | F1 | ...`; its last five cells are the
    untrained model, the trivial baseline, the trained model, the minutes (of training and in all), the memory.

    Args:
        runs: as `shared.compare.table.read_run` gives them; the name of a task's run is the task's. Others have no row.

    Raises:
        UserError: a task without a row, or not as many numbers in a cell as the run has for it.
    """
    lines = text.split("\n")
    for run in runs:
        name, results = run["name"], run["results"]
        if name not in FIGURES:
            continue
        places = [i for i, line in enumerate(lines) if re.fullmatch(rf"\| {name}\b([^|]*\|){{7}}", line)]
        if len(places) != 1:
            raise UserError(f"the table has no row, or several, that begins with {name}.")
        cells = lines[places[0]].split("|")
        for i, keys in enumerate([*((key,) for key in FIGURES[name]), *TIMES], start=3):
            cells[i] = _with_numbers(cells[i], [_figure(results, key) for key in keys], name)
        lines[places[0]] = "|".join(cells)
    return "\n".join(lines)


def _figure(results: dict, key: str) -> float:
    if key not in results:
        raise UserError(f"all_results.json: it has no {key}, which the table shows.")
    return results[key] * (100 if key.endswith(IN_PERCENT) else 1)


def _with_numbers(cell: str, numbers: list[float], name: str) -> str:
    """The first numbers of a cell replaced."""
    found = list(re.finditer(r"\d[\d,]*(?:\.\d+)?", cell))
    if len(found) < len(numbers):
        raise UserError(f"the row of {name} has no place for {len(numbers)} numbers in `{cell.strip()}`.")
    for match, number in reversed(list(zip(found, numbers, strict=False))):
        decimals = len(match[0].partition(".")[2])
        cell = f"{cell[: match.start()]}{number:,.{decimals}f}{cell[match.end() :]}"
    return cell
