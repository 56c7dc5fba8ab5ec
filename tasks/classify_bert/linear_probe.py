"""The classifier. A linear one on the frozen encoder: what it knows before training, and where the head starts. A Trainer that
stops at NaN. Used by train.py."""

import itertools
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer

from shared import UserError
from shared.training.losses import finite, step_mean

log = logging.getLogger("taskbook")
HEAD_ROWS = 4096  # that a head starts from
PENALTY = 0.01  # of the squared weights of standardized features, of the head's start


class CheckedTrainer(Trainer):
    """`Trainer` with the mean loss over the rows of a whole optimizer step, checked before it is used; predicts in order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # BERT takes any keyword and ignores the number of rows: upstream would add up micro-batches and processes
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns.append("length")  # or the sampler would read every row to learn its length

    def _get_eval_sampler(self, eval_dataset):
        # Upstream orders evaluation rows by length too, at random, and `predict` returns them in that order.
        return SequentialSampler(eval_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy in nats over the rows of the whole optimizer step (`num_items_in_batch` of them)."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", "length")})
        smoothing = self.args.label_smoothing_factor
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        loss = step_mean(self, total, len(labels), num_items_in_batch)
        if model.training:
            finite(loss, lambda: f" at step {self.state.global_step + 1}")
        return (loss, outputs) if return_outputs else loss


def load_model(source, tokenizer, classes: list[str]) -> tuple:
    """The classifier in fp32, and whether its last layer is new: an encoder has none, another classifier one for its own labels,
    which may be as many, or these in another order.

    A tokenizer without a padding token gets the end token for it, which is hidden by the mask.

    Raises:
        UserError: the tokenizer has neither; weights of other shapes than config.json says.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"{source}: its tokenizer has no padding token, and no end token to take for it. Name one there."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        source,
        dtype="float32",
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for another number of labels
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        problem_type="single_label_classification",  # or a base for several labels a text would leave sigmoids to pipelines
    )
    other = [name for name, *_ in loaded["mismatched_keys"]]
    if body := [name for name in other if name.startswith(f"{model.base_model_prefix}.")]:
        raise UserError(f"{source}: {body[0]} has another shape than config.json says: they are of two models.")
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder scores the last token before padding
    if loaded["missing_keys"] or other:
        return model, True
    before = AutoConfig.from_pretrained(source, trust_remote_code=False).id2label
    if [before.get(i) for i in range(len(before))] == classes:
        return model, False
    last_layer(model).reset_parameters()
    return model, True


def last_layer(model) -> torch.nn.Linear:
    """The one that gives a value for each class."""
    return [part for part in model.modules() if getattr(part, "out_features", 0) == model.num_labels][-1]


def start_head(model, rows, collator, batch_size: int) -> float | None:
    """Sets the last layer to a logistic regression on what enters it: a random head would first pull the encoder anywhere (LP-FT,
    https://arxiv.org/abs/2202.10054). With dropout, as in training: there a head that leans on differences which dropout drowns
    would say anything. Of at most HEAD_ROWS rows; of few each is seen up to eight times.

    Returns:
        The accuracy on these rows; None where it is left as it is: it reads no row of features each (GPT-2 scores every token),
        or they are not finite, which training then says.
    """
    head, entered = last_layer(model), []
    hook = head.register_forward_pre_hook(lambda _, given: entered.append(given[0].float().cpu()))
    rows = rows.select(range(min(HEAD_ROWS, len(rows))))
    times, in_training = min(8, HEAD_ROWS // len(rows)), model.training
    labels = torch.tensor(rows["label"]).repeat(times)
    model.train()
    with torch.no_grad():
        batches = batches_of(rows, collator, batch_size)
        again = itertools.chain.from_iterable(itertools.repeat(batches, times))
        for batch in tqdm(again, "where the head starts", times * len(batches), disable=None, leave=False):
            model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})
    hook.remove()
    model.train(in_training)
    features = torch.cat(entered) if entered[0].dim() == 2 else None
    if features is None or not features.isfinite().all():
        return None
    middle, width = features.mean(0), features.std(0) + 1e-6
    features = (features - middle) / width
    weight = torch.zeros(features.shape[1], model.num_labels, requires_grad=True)
    bias = torch.zeros(model.num_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(features @ weight + bias, labels) + PENALTY * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        right = ((features @ weight + bias).argmax(-1) == labels).float().mean().item()
        weight = weight / width[:, None]
        head.weight.copy_(weight.T)
        if head.bias is not None:
            head.bias.copy_(bias - middle @ weight)
    log.info(
        "the head starts as a linear classifier, right on %.1f %% of %s training rows", 100 * right, f"{len(rows):,}"
    )
    return right


def batches_of(rows, collator, batch_size: int) -> DataLoader:
    """Token ids and labels of the rows, in their order."""
    rows = rows.remove_columns([name for name in rows.column_names if name not in ("input_ids", "label")])
    return DataLoader(rows, batch_size=batch_size, collate_fn=collator)


@torch.no_grad()
def mean_vectors(encoder, rows, collator, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batch by batch the mean token vectors (batch, hidden + 1; the last is 1, for the bias) and the labels (batch,), float64."""
    for batch in batches_of(rows, collator, batch_size):
        labels, batch = batch.pop("labels"), {name: value.to(encoder.device) for name, value in batch.items()}
        hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        mean = ((hidden * mask).sum(1) / mask.sum(1)).cpu().double()
        yield torch.cat([mean, torch.ones(len(mean), 1, dtype=torch.float64)], dim=1), labels


def fit_linear(encoder, rows, collator, labels: int, batch_size: int) -> torch.Tensor:
    """Ridge regression from mean token vectors to one-hot labels, in closed form: weights (hidden + 1, labels).

    Sums are kept, not vectors: memory does not grow with rows. The penalty is a thousandth of the features' mean square.
    """
    gram, target = 0.0, 0.0
    for vectors, classes in mean_vectors(encoder, rows, collator, batch_size):
        gram = gram + vectors.T @ vectors
        target = target + vectors.T @ torch.nn.functional.one_hot(classes, labels).double()
    return torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64), target)


def predict_linear(encoder, weights: torch.Tensor, rows, collator, batch_size: int) -> list[int]:
    """The class (rows,) with the largest value for each row."""
    batches = mean_vectors(encoder, rows, collator, batch_size)
    return [int(label) for vectors, _ in batches for label in (vectors @ weights).argmax(-1)]
