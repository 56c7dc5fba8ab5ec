"""Rows of any summarization data set -> documents with their summaries -> token ids; pieces, lead sentences, padding. Pure
functions, used by train.py."""

import ast
import json
import re

import numpy as np

from shared import UserError, one_spelling
from shared.data.cleaning import clean_text, malformed
from shared.data.columns import missing, read_mapping, refuse_inside
from shared.metrics.rouge.rouge import WORD, split_sentences
from shared.training.launch import log

LIST = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)
# Columns of a document and its summary, the first pair that fits: CNN/DailyMail, XSum, SAMSum, SciTLDR.
FORMATS = (("article", "highlights"), ("document", "summary"), ("dialogue", "summary"), ("source", "target"))


def find_columns(source: str, columns: list[str], mapping: list[str], row: dict | None = None) -> tuple[str, str]:
    """The columns of the document and of the summary; `mapping` (`document=text summary=title`) comes before FORMATS.

    Args:
        source: name of the data, for the error. row: an example, for its hint.

    Raises:
        UserError: found / expected / how to map.
    """
    chosen = read_mapping(mapping, ("document", "summary"), columns)
    refuse_inside(chosen, columns)
    for names in FORMATS:
        found = chosen.get("document", names[0]), chosen.get("summary", names[1])
        if found[0] != found[1] and set(found) <= set(columns):
            if isinstance(listed((row or {}).get(found[1])), list):
                log.info(
                    "%s: %s holds lists: of several summaries the first is learnt, all are evaluated", source, found[1]
                )
            return found
    expected = f"one of {'; '.join(' and '.join(names) for names in FORMATS)}"
    raise missing(source, ("document", "summary"), columns, expected, row, chosen)


def listed(value):
    """A list of texts that a table holds as a text, `['a', 'b']` or `["a", "b"]`, as that list; anything else as it is, numpy's
    `['a' 'b']` too, of which Python would make one text."""
    if not isinstance(value, str) or not LIST.fullmatch(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if read is json.loads or str(found) == value.strip():
            return found
    return value


def to_pair(row: dict, document: str, summary: str) -> dict | str:
    """One row as `{"document": text, "summaries": [text, ...]}`, or the reason for dropping it (see `clean_rows`).

    A document that is a list is a list of sentences, which are joined. A summary that is a list holds several references:
    the first one is learnt, the evaluation counts them all.
    """
    text, references = listed(row[document]), listed(row[summary])
    for column, value in ((document, text), (summary, references)):
        if isinstance(value, str) and LIST.fullmatch(value):
            return f"bad: a list as text, without commas\n{column} = {value[:60]!r}"
    if isinstance(text, list) and all(isinstance(part, str | None) for part in text):
        text = " ".join(filter(None, text))
    references = references if isinstance(references, list) else [references]
    if reason := malformed(text, document):
        return f"bad: document {reason}"
    reasons = [malformed(reference, summary) for reference in references]
    if all(reasons):
        return f"bad: summary {reasons[0] if reasons else 'missing'}"
    summaries = [clean_text(text).strip() for text, bad in zip(references, reasons, strict=True) if not bad]
    text, summaries = clean_text(text).strip(), [summary for summary in summaries if summary]
    if not text or not summaries:
        return "bad: empty"
    return {"document": text, "summaries": summaries}


def text_of(row: dict) -> str:
    """What makes two rows near-duplicates: the document."""
    return row["document"]


def tokenize(rows: dict[str, list], tokenizer, prefix: str, max_source: int, max_target: int) -> dict[str, list]:
    """A batch of rows as token ids, cut to `max_source` and `max_target` tokens with the end token kept.

    Returns:
        `input_ids`, `attention_mask`, `labels` (of the first summary; the collator pads them with -100), `length` (source
        tokens after the cut, for grouping), and the lengths before the cut, `document_tokens` and `summary_tokens`.
    """
    sources = [prefix + document for document in rows["document"]]
    targets = [summaries[0] for summaries in rows["summaries"]]
    whole = tokenizer(sources)["input_ids"], tokenizer(text_target=targets)["input_ids"]
    encoded = tokenizer(sources, truncation=True, max_length=max_source)
    labels = tokenizer(text_target=targets, truncation=True, max_length=max_target)["input_ids"]
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
        "length": [len(ids) for ids in encoded["input_ids"]],
        "document_tokens": [len(ids) for ids in whole[0]],
        "summary_tokens": [len(ids) for ids in whole[1]],
    }


def show(row: dict, tokenizer) -> str:
    """A tokenized row as text, the summary that is learnt between brackets."""
    return f"{tokenizer.decode(row['input_ids'])}\n-> [[{tokenizer.decode(row['labels'])}]]"


def preflight(rows, args) -> dict:
    """What a run would learn from these tokenized rows, and how much of them it would not see.

    Args:
        rows: the tokenized training split. args: training arguments, for batches and sampling.

    Raises:
        UserError: no row.
    """
    if not len(rows):
        raise UserError("preflight: no row to train on. Look at --max_train_rows.")
    source, target = np.array(rows["length"]), np.array([len(labels) for labels in rows["labels"]])
    documents, summaries = np.array(rows["document_tokens"]), np.array(rows["summary_tokens"])
    strategy = args.train_sampling_strategy
    padding = {name: padding_share(source, target, args, name) for name in {"random", strategy}}
    return {
        "rows": len(rows),
        "tokens": int(source.sum() + target.sum()),
        "supervised_share": round(float(target.sum() / (source.sum() + target.sum())), 4),
        "median_document_tokens": int(np.median(documents)),
        "longest_document_tokens": int(documents.max()),
        "documents_cut_share": round(float((documents > source).mean()), 4),
        "document_tokens_lost_share": round(1 - float(source.sum() / documents.sum()), 4),
        "median_summary_tokens": int(np.median(summaries)),
        "longest_summary_tokens": int(summaries.max()),
        "summaries_cut_share": round(float((summaries > target).mean()), 4),
        "summaries_longer_than_document_share": round(float((summaries > documents).mean()), 4),
        "padding_share": round(padding[strategy], 4),
        "padding_share_in_random_order": round(padding["random"], 4),
    }


def allow_such_summaries(settings, summaries: list[list[int]]) -> None:
    """Lifts what a base's generation settings forbid and these summaries do: it was right for the data set of the base.

    BART for CNN/DailyMail writes 56 tokens or more and no three tokens twice: one that has learnt shorter summaries, or lists,
    would be made to add words.

    Args:
        settings: the model's GenerationConfig, changed in place.
        summaries: token ids of the references to learn.
    """
    settings.num_return_sequences, settings.return_dict_in_generate = 1, False  # ids of one summary a document
    lengths = sorted(map(len, summaries))
    median, n = lengths[len(lengths) // 2], settings.no_repeat_ngram_size or 0
    for name in ("min_length", "min_new_tokens"):
        if (getattr(settings, name) or 0) > median:
            log.info(
                "%s %d is not kept: half of the summaries have %d tokens or fewer",
                name,
                getattr(settings, name),
                median,
            )
            setattr(settings, name, None)
    ngrams = ([tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in summaries)
    repeating = sum(len(set(found)) < len(found) for found in ngrams) if n else 0
    if repeating > 0.05 * len(summaries):
        log.info("no_repeat_ngram_size %d is not kept: %d of %d summaries repeat one", n, repeating, len(summaries))
        settings.no_repeat_ngram_size = None


def padding_share(source: np.ndarray, target: np.ndarray, args, strategy: str) -> float:
    """Share of the positions of an epoch's batches, sources and targets together, that hold padding, 0 to 1."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator, size = torch.Generator().manual_seed(args.seed), args.per_device_train_batch_size
    if strategy == "group_by_length":
        lengths = source.tolist()
        order = LengthGroupedSampler(size * args.gradient_accumulation_steps, lengths=lengths, generator=generator)
        order = list(order)
    elif strategy == "sequential":
        order = range(len(source))
    else:
        order = torch.randperm(len(source), generator=generator).tolist()
    batches = [list(order[i : i + size]) for i in range(0, len(source), size)]
    positions = sum(len(batch) * (source[batch].max() + target[batch].max()) for batch in batches)
    return 1 - float(source.sum() + target.sum()) / float(positions)


def sentences(text: str) -> list[str]:
    """The sentences of a text, as ROUGE-Lsum sees them."""
    return [sentence.strip() for sentence in split_sentences(text).split("\n") if sentence.strip()]


def lead(document: str, count: int) -> str:
    """The first sentences of a document: the baseline that is hard to beat on news (Nenkova 2005)."""
    return "\n".join(sentences(document)[:count])


def pieces(document: str, tokenizer, most: int) -> list[str]:
    """A document as pieces of whole sentences, as many in each as fit into `most` tokens; only a longer sentence exceeds it."""
    parts = sentences(document)
    lengths = [len(ids) for ids in tokenizer([" " + part for part in parts], add_special_tokens=False)["input_ids"]]
    found, room = [], 0
    for part, length in zip(parts, lengths, strict=True):
        if length > room or not found:
            found.append(part)
            room = most - length
        else:
            found[-1] += " " + part
            room -= length
    return found


def novel_bigrams(summary: str, document: str) -> tuple[int, int]:
    """How many distinct word bigrams of a summary the document does not have, and how many there are (Narayan et al. 2018)."""
    found = [set(zip(words, words[1:], strict=False)) for words in (_words(summary), _words(document))]
    return len(found[0] - found[1]), len(found[0])


def _words(text: str) -> list[str]:
    return WORD.findall(one_spelling(text.lower()))
