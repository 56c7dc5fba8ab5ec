"""Masking as in BERT, logits at the masked positions only, scores on fixed masks. Used by train.py.

transformers' models pass every position through the vocabulary projection, although the loss looks at 15 % of them: for a small
encoder with 30,522 tokens that projection costs as much as all layers together.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, Trainer, TrainerCallback

from shared.training.losses import finite, log_evaluation, step_mean
from shared.training.scoring import score_rows

SCORES = ("nll", "tokens", "correct", "correct_top5")


class MaskingCollator(DataCollatorForLanguageModeling):
    """Pads rows and draws masks: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Rows have `input_ids`, and for whole words `words`, the number of the word that each token belongs to (rising; anything at
    special tokens). Special tokens, [UNK] among them, are never chosen.

    The masks of a row depend on its tokens, the seed and the epoch only, so they are the same after a resume (batches are fetched
    one ahead), with any number of workers, in any micro-batch and process.
    """

    epoch = 0

    def __post_init__(self):
        super().__post_init__()
        # Upstream replaces every token of a whole word by [MASK]; BERT's whole-word release kept 80/10/10.
        self.mask_replace_prob, self.random_replace_prob = 0.8, 0.1

    def mask(self, example: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked token ids and labels (-100 where nothing is masked) of a row, (tokens,) each."""
        ids = torch.as_tensor(example["input_ids"])
        digest = hashlib.sha256(repr((self.seed, self.epoch, ids.tolist())).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        offsets = None
        if self.whole_word_mask:
            # Upstream joins tokens whose characters touch, so `foo.bar(x)` would be one word. A token that starts where the one
            # before it ends belongs to its word: word numbers in place of character offsets say just that.
            words = torch.as_tensor(example["words"])
            offsets = torch.stack([words, words], dim=-1)[None]
        masked, labels = self.torch_mask_tokens(ids[None], special[None], offsets)
        self.generator = None  # a worker that is not forked (macOS) would not get it
        return masked[0], labels[0]

    def torch_call(self, examples):
        ids, labels = zip(*map(self.mask, examples), strict=True)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class NewMasks(TrainerCallback):
    """Tells the collator the epoch, before its first batch is fetched: each epoch masks a row anew."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


def masking_collator(tokenizer, seed: int, probability: float = 0.15, whole_words: bool = False) -> MaskingCollator:
    """The collator for a share of the tokens, 0 to 1; of all words where `whole_words` is set."""
    # 1.0 keeps upstream from warning that it is about to set this; see __post_init__
    return MaskingCollator(
        tokenizer,
        mlm_probability=probability,
        whole_word_mask=whole_words,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
        seed=seed,
    )


def fix_masks(dataset, tokenizer, seed: int):
    """A data set masked once, 15 % of the tokens: columns `input_ids`, `labels` (-100 where nothing is masked), `document`.

    Each row's masks depend on its tokens and the seed only, so every model, before or after training and whatever masks it is
    trained with, is asked the same.
    """
    collator = masking_collator(tokenizer, seed)

    def mask(row):
        ids, labels = collator.mask(row)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    unused = [name for name in dataset.column_names if name not in ("input_ids", "document")]
    return dataset.map(mask, remove_columns=unused, load_from_cache_file=False)


def masked_logits(model, batch: dict) -> torch.Tensor:
    """Logits (n, vocabulary) in float32 for the n positions whose label is not -100, in the order of `labels[labels != -100]`.

    A hook hands only these positions from the encoder to the head, which works for any masked language model of transformers.
    """
    inner = getattr(model, "module", model)  # inside DistributedDataParallel
    masked = batch["labels"] != -100

    def keep_masked(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state[masked][None]
        return output

    hook = inner.base_model.register_forward_hook(keep_masked)
    try:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits[0].float()
    finally:
        hook.remove()


class MaskedTrainer(Trainer):
    """`Trainer` with the loss over masked positions; it checks each loss before the optimizer may use it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The masked tokens are counted over the whole optimizer step, for every kind of model
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "words", "length"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean nll in nats over the masked tokens of the whole optimizer step (`num_items_in_batch` of them)."""
        logits = masked_logits(model, inputs)
        targets = inputs["labels"][inputs["labels"] != -100]
        total = F.cross_entropy(logits, targets, reduction="sum")
        # A tiny batch, even a whole step, may have no mask
        count = None if num_items_in_batch is None else max(1, int(num_items_in_batch))
        return finite(
            step_mean(self, total, max(1, len(targets)), count), lambda: f" at step {self.state.global_step + 1}"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss over all masked tokens of the validation split, on fixed masks."""
        rows = score_documents(self.model, eval_dataset or self.eval_dataset, self.processing_class, self.args)
        return log_evaluation(self, rows, metric_key_prefix)


def score_documents(model, dataset, tokenizer, args, title: str = "evaluating") -> dict[str, list[float]]:
    """Scores a data set of `fix_masks`; memory does not grow with its rows, no logits are kept. Processes share the work.

    Returns:
        `{"nll": summed nats, "tokens": masked tokens, "correct": top-1 hits, "correct_top5": hits}`, an entry a document: the
        rows of one document depend on each other, so documents are what is drawn for intervals.
    """
    collator = DataCollatorForTokenClassification(tokenizer)

    def score_batch(numbers: list[int]) -> list[list[float]]:
        rows = [dataset[i] for i in numbers]
        batch = collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        logits = masked_logits(model, batch)
        masked = batch["labels"] != -100
        targets, row = batch["labels"][masked], masked.nonzero()[:, 0]
        nll = F.cross_entropy(logits, targets, reduction="none")
        hits = logits.topk(5).indices == targets[:, None]
        # Apple's GPU has no float64
        scores = torch.stack([nll, torch.ones_like(nll), hits[:, 0], hits.any(-1)]).cpu().double()
        by_row = torch.zeros(len(SCORES), len(rows), dtype=torch.float64).index_add_(1, row.cpu(), scores)
        return by_row.T.tolist()

    sums: dict[int, list[float]] = {}
    lengths = [len(ids) for ids in dataset["input_ids"]]
    add_by_document(sums, dataset["document"], score_rows(model, lengths, score_batch, args, title))
    return as_columns(sums)


def add_by_document(sums: dict[int, list[float]], documents, scores) -> None:
    """Adds each row's scores (in the order of SCORES) to those of its document."""
    for document, values in zip(documents, scores, strict=True):
        sums[document] = [a + b for a, b in zip(sums.get(document, [0.0] * len(values)), values, strict=True)]


def as_columns(sums: dict[int, list[float]]) -> dict[str, list[float]]:
    """Sums by document as lists by score, in the order of the documents."""
    return dict(zip(SCORES, map(list, zip(*(sums[document] for document in sorted(sums)), strict=True)), strict=True))


def score_most_frequent(counts: torch.Tensor, dataset) -> dict[str, list[float]]:
    """The baseline that knows how frequent each token is and nothing else, scored as by `score_documents`.

    Args:
        counts: (vocabulary,) how often each token occurs in the training split.
    """
    log_p, sums = frequency_log_probs(counts), {}
    top = counts.topk(5).indices
    for row in dataset:
        targets = torch.tensor([label for label in row["labels"] if label != -100], dtype=torch.long)
        hits = targets[:, None] == top
        scores = [-log_p[targets].sum().item(), len(targets), hits[:, 0].sum().item(), hits.sum().item()]
        add_by_document(sums, [row["document"]], [scores])
    return as_columns(sums)


def frequency_log_probs(counts: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (vocabulary,) of tokens by their counts; one is added to each, so that none is impossible."""
    return (counts + 1).double().log() - (counts + 1).double().sum().log()
