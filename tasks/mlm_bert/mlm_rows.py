"""Documents -> rows of token ids, what masking would make of them, prompts with a gap. Used by train.py."""

import hashlib
import math
import random
import re

import numpy as np
import torch
from datasets import Features, List, Value
from transformers.trainer_pt_utils import get_length_grouped_indices

from shared import UserError


def cut_into_rows(documents, tokenizer, max_length: int):
    """Token ids of documents, cut into rows of at most `max_length`: [CLS] piece [SEP]. No token is lost.

    The pieces of a document have the same length, to one token: a last piece of two words would teach nothing.

    Returns:
        Data set with `input_ids`, `words` (see `masking.MaskingCollator`), `document` (its number) and `length`.
    """
    before, after = tokenizer("")["input_ids"][:1], tokenizer("")["input_ids"][1:]  # [CLS] and [SEP]
    room = max_length - len(before) - len(after)

    def cut(batch, numbers):
        encoded = tokenizer(batch["text"], add_special_tokens=False)
        rows = {"input_ids": [], "words": [], "document": [], "length": []}
        for i, (number, ids) in enumerate(zip(numbers, encoded["input_ids"], strict=True)):
            words, pieces = encoded.word_ids(i), math.ceil(len(ids) / room)
            for piece in range(pieces):
                part = slice(piece * len(ids) // pieces, (piece + 1) * len(ids) // pieces)
                rows["input_ids"].append([*before, *ids[part], *after])
                rows["words"].append([*[-1] * len(before), *words[part], *[-1] * len(after)])
                rows["document"].append(number)
                rows["length"].append(len(rows["input_ids"][-1]))
        return rows

    integers = List(Value("int32"))
    features = Features(input_ids=integers, words=integers, document=Value("int32"), length=Value("int32"))
    return documents.map(
        cut,
        batched=True,
        with_indices=True,
        remove_columns=documents.column_names,
        features=features,
        load_from_cache_file=False,
    )


def count_tokens(rows, vocabulary: int) -> tuple:
    """How often each token occurs, (vocabulary,) int64, and the sha256 of all tokens in order."""
    counts, digest = np.zeros(vocabulary, dtype=np.int64), hashlib.sha256()
    for batch in rows.select_columns("input_ids").with_format("numpy").iter(batch_size=1000):
        tokens = np.concatenate(batch["input_ids"])
        counts += np.bincount(tokens, minlength=vocabulary)
        digest.update(tokens.tobytes())
    return torch.from_numpy(counts), digest.hexdigest()


def preflight(rows, collator, args) -> dict:
    """What training would see: sizes, padding, and the rates of masking observed on the first 2,000 rows.

    Raises:
        UserError: nothing would be masked.
    """
    size, lengths = args.per_device_train_batch_size, torch.tensor(rows["length"])
    if args.train_sampling_strategy == "group_by_length":
        generator = torch.Generator().manual_seed(args.seed)
        order = get_length_grouped_indices(rows["length"], size * args.gradient_accumulation_steps, generator=generator)
    else:
        order = torch.randperm(len(rows)).tolist()
    padded = sum(len(batch) * int(batch.max()) for batch in lengths[order].split(size))
    seen = masked = replaced = unchanged = special = 0
    sample, tokenizer = rows.select(range(min(2000, len(rows)))), collator.tokenizer
    specials = torch.tensor(tokenizer.all_special_ids)
    for start in range(0, len(sample), size):
        examples = [sample[i] for i in range(start, min(start + size, len(sample)))]
        plain = [{"input_ids": example["input_ids"]} for example in examples]
        batch, original = collator(examples), tokenizer.pad(plain, return_tensors="pt")["input_ids"]
        chosen = batch["labels"] != -100
        seen += int((~torch.isin(original, specials)).sum())
        masked += int(chosen.sum())
        replaced += int((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum())
        unchanged += int((batch["input_ids"] == original)[chosen].sum())
        special += int(torch.isin(original, specials)[chosen].sum())
    if not masked:
        raise UserError(
            f"preflight: none of {seen:,} tokens is masked. Raise --mlm_probability, or give longer documents."
        )
    return {
        "rows": len(rows),
        "tokens": int(lengths.sum()),
        "longest_row": int(lengths.max()),
        "padding_share": round(1 - int(lengths.sum()) / padded, 4),
        "supervised_share": round(masked / int(lengths[: len(sample)].sum()), 4),
        "masked_share": round(masked / seen, 4),
        "masked_as_mask": round(replaced / masked, 4),
        "masked_as_random": round((masked - replaced - unchanged) / masked, 4),
        "masked_unchanged": round(unchanged / masked, 4),
        "masked_special_tokens": special,
    }


def sample_prompts(texts, tokenizer, seed: int, most: int = 20) -> list[tuple[str, str]]:
    """Sentences of documents, one a document, in which one word that is a single token is replaced by the mask; and that word."""
    chosen, draw = [], random.Random(seed)
    for text in texts:
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 8 <= len(s.split()) <= 30]
        words = draw.choice(sentences).split() if sentences else []
        places = [
            i for i, w in enumerate(words) if w.isalpha() and len(w) > 3 and len(tokenizer.tokenize(f" {w}")) == 1
        ]
        if places:
            place = draw.choice(places)
            chosen.append((" ".join([*words[:place], tokenizer.mask_token, *words[place + 1 :]]), words[place]))
        if len(chosen) == most:
            break
    return chosen
