"""Masking as in BERT, logits at the masked positions only, scores on fixed masks. Used by train.py.

transformers' models pass every position through the vocabulary projection, although the loss looks at 15 % of them: for a small
encoder with 30,522 tokens that projection costs as much as all layers together.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, Trainer

from shared.training.checkpoints import SeededCollator
from shared.training.losses import finite, log_evaluation, step_mean
from shared.training.out_of_memory import within_memory

SCORES = ("nll", "tokens", "correct", "correct_top5")


class MaskingCollator(DataCollatorForLanguageModeling):
    """Pads rows and draws new masks each time: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Rows have `input_ids`, and for whole words `words`, the number of the word that each token belongs to (rising; anything at
    special tokens). Special tokens, [UNK] among them, are never chosen.
    """

    def __post_init__(self):
        super().__post_init__()
        # Upstream replaces every token of a whole word by [MASK]; BERT's whole-word release kept 80/10/10.
        self.mask_replace_prob, self.random_replace_prob = 0.8, 0.1

    def torch_call(self, examples):
        batch = self.tokenizer.pad([{"input_ids": example["input_ids"]} for example in examples], return_tensors="pt")
        special = torch.isin(batch["input_ids"], torch.tensor(self.tokenizer.all_special_ids))
        offsets = None
        if self.whole_word_mask:
            # Upstream joins tokens whose characters touch, so `foo.bar(x)` would be one word. A token that starts where the one
            # before it ends belongs to its word: word numbers in place of character offsets say just that.
            words = pad_sequence([torch.tensor(example["words"]) for example in examples], batch_first=True)
            offsets = torch.stack([words, words], dim=-1)
        batch["input_ids"], batch["labels"] = self.torch_mask_tokens(batch["input_ids"], special, offsets)
        return batch


def masking_collator(tokenizer, probability: float = 0.15, whole_words: bool = False) -> MaskingCollator:
    """The collator for a share of the tokens, 0 to 1; of all words where `whole_words` is set."""
    # 1.0 keeps upstream from warning that it is about to set this; see __post_init__
    return MaskingCollator(
        tokenizer,
        mlm_probability=probability,
        whole_word_mask=whole_words,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
    )


def fix_masks(dataset, tokenizer, seed: int):
    """A data set masked once, 15 % of the tokens: columns `input_ids`, `labels` (-100 where nothing is masked), `document`.

    Each row's masks depend on its tokens and the seed only, so every model, before or after training and whatever masks it is
    trained with, is asked the same.
    """
    collator = SeededCollator(masking_collator(tokenizer), seed)

    def mask(row):
        batch = collator([{"input_ids": row["input_ids"]}])
        return {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}

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


@within_memory
@torch.no_grad()
def score_documents(model, dataset, tokenizer, args, title: str = "evaluating") -> dict[str, list[float]]:
    """Scores a data set of `fix_masks`; memory does not grow with its rows, no logits are kept. Processes share the work.

    Returns:
        `{"nll": summed nats, "tokens": masked tokens, "correct": top-1 hits, "correct_top5": hits}`, an entry a document: the
        rows of one document depend on each other, so documents are what is drawn for intervals.
    """
    was_training = model.training
    model.eval()
    collator, lengths = DataCollatorForTokenClassification(tokenizer), [len(ids) for ids in dataset["input_ids"]]
    longest_first = sorted(range(len(dataset)), key=lambda i: -lengths[i])  # out of memory shows at once
    mine = longest_first[args.process_index :: args.world_size]
    size, sums = args.per_device_eval_batch_size, {}
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    for numbers in tqdm(batches, desc=title, disable=args.disable_tqdm or args.process_index > 0, leave=False):
        rows = [dataset[i] for i in numbers]
        batch = collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        half = torch.float16 if args.fp16 else torch.bfloat16
        with torch.autocast(model.device.type, half, enabled=args.fp16 or args.bf16):
            logits = masked_logits(model, batch)
        masked = batch["labels"] != -100
        targets, row = batch["labels"][masked], masked.nonzero()[:, 0]
        nll = F.cross_entropy(logits, targets, reduction="none")
        hits = logits.topk(5).indices == targets[:, None]
        scores = torch.stack([nll, torch.ones_like(nll), hits[:, 0], hits.any(-1)]).double()
        by_row = torch.zeros(len(SCORES), len(rows), dtype=torch.float64, device=nll.device).index_add_(1, row, scores)
        add_by_document(sums, [row["document"] for row in rows], by_row.T.tolist())
    model.train(was_training)
    if args.world_size > 1:
        everyone, sums = gather_object(list(sums.items())), {}
        add_by_document(sums, *zip(*everyone, strict=True))
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
