"""The model that reads: windows of a batch in one row without padding, the loss over each, scores of windows. Used by train.py.

What a plain Trainer loop wastes on a CPU: dropout inside attention, which keeps torch from its fused kernel and draws a random
number for each pair of tokens, and padding.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForQuestionAnswering, Trainer

from shared import UserError
from shared.training.dropout import dropout_settings
from shared.training.losses import finite, rows_of_step, step_mean
from shared.training.packed_attention import PACKED
from shared.training.scoring import score_rows

# Models whose attention takes further arguments and whose positions count from 0 (RoBERTa's do not); others are padded.
PACKABLE = ("bert", "electra")


def load_model(source: Path, dropout: float, device):
    """An encoder with a head for two logits a token, in fp32; the head is new unless the model was trained to answer.

    Args:
        dropout: of hidden states while training. Inside attention there is none: see the top of this file.
        device: where it will run. Windows are packed on a CPU only: on a GPU a call for each would cost more than padding.

    Raises:
        UserError: the architecture has no such head.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    try:
        return AutoModelForQuestionAnswering.from_pretrained(
            source,
            **dropout_settings(config, dropout),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=PACKED if config.model_type in PACKABLE and device.type == "cpu" else None,
        )
    except ValueError as error:  # no such head for this architecture
        if "AutoModelForQuestionAnswering" not in str(error):
            raise
        raise UserError(
            f"{source}: a {config.model_type} model cannot mark answers; take BERT or another encoder."
        ) from error


def is_packed(model) -> bool:
    """Whether the model takes windows packed in one row."""
    return model.config._attn_implementation == PACKED


class WindowCollator:
    """Windows -> one packed row, or a padded batch, with the answers and which window each is."""

    def __init__(self, tokenizer, packed: bool):
        self.tokenizer, self.packed = tokenizer, packed
        self.segments = "token_type_ids" in tokenizer.model_input_names

    def __call__(self, windows: list[dict]) -> dict:
        lengths = [len(window["input_ids"]) for window in windows]
        columns = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0}
        if self.packed:
            batch = {name: np.concatenate([w[name] for w in windows])[None] for name in columns}
            batch["position_ids"] = np.concatenate([np.arange(length) for length in lengths])[None]
        else:
            batch = {
                name: np.stack(
                    [np.pad(w[name], (0, max(lengths) - len(w[name])), constant_values=pad) for w in windows]
                )
                for name, pad in columns.items()
            }
            batch["attention_mask"] = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(int)
        if not self.segments:
            del batch["token_type_ids"]
        batch = {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}
        batch["window_lengths"] = torch.tensor(lengths)
        batch["answer"] = torch.from_numpy(np.stack([w["answer"] for w in windows]))
        batch["window"] = torch.tensor([w["window"] for w in windows])
        return batch


def forward(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end logits, each (windows, longest window) in fp32, -inf behind the end of a window."""
    inputs = {k: v for k, v in batch.items() if k not in ("answer", "window", "window_lengths")}
    lengths = batch["window_lengths"]
    packed = {"cu_seq_lens_q": F.pad(lengths.cumsum(0), (1, 0))} if "position_ids" in inputs else {}
    found = model(**inputs, **packed)
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    logits = []
    for values in (found.start_logits.float(), found.end_logits.float()):
        if packed:
            logits.append(values.new_full(real.shape, -torch.inf).masked_scatter(real, values[0]))
        else:
            logits.append(values.masked_fill(~real, -torch.inf))
    return logits[0], logits[1]


class WindowTrainer(Trainer):
    """`Trainer` that takes packed windows, checks each loss before the optimizer may use it, and evaluates by answers."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args, validate, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is computed here
        self.validate = validate

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "token_type_ids", "answer", "window"]

    def _get_num_items_in_batch(self, batch_samples, device):
        """Windows of the optimizer step."""
        return rows_of_step(self, batch_samples, "window")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the windows of the whole optimizer step of the cross-entropies of first and last token, in nats."""
        answer, windows = inputs["answer"], inputs["window"]
        both = zip(forward(model, inputs), answer.T, strict=True)
        total = sum(F.cross_entropy(logits, places, reduction="sum") for logits, places in both) / 2
        loss = step_mean(self, total, len(windows), num_items_in_batch)
        return finite(
            loss, lambda: f" at step {self.state.global_step + 1}, in windows {windows.tolist()} of the training split"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """What `validate(model)` finds, by names that begin with `eval_`."""
        metrics = self.validate(self.model)
        self.log({name: value for name, value in metrics.items() if value is not None})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def score_windows(model, windows, collator, args, title: str) -> dict[str, np.ndarray]:
    """Scores every window; processes share the work.

    Returns:
        `start` and `end`: (tokens,) logits, flat as `windows.ids`; `nll`: (windows,) the loss of each, in nats.
    """
    lengths = np.diff(windows.starts)

    def score_batch(numbers: list[int]) -> list[tuple]:
        batch = {name: value.to(model.device) for name, value in collator([windows[i] for i in numbers]).items()}
        logits = forward(model, batch)
        nll = sum(F.cross_entropy(x, batch["answer"][:, i], reduction="none") for i, x in enumerate(logits)) / 2
        start, end = (values.cpu().numpy() for values in logits)
        return [
            (a[: lengths[i]], b[: lengths[i]], loss)
            for i, a, b, loss in zip(numbers, start, end, nll.tolist(), strict=True)
        ]

    start, end, nll = zip(*score_rows(model, lengths.tolist(), score_batch, args, title), strict=True)
    return {"start": np.concatenate(start), "end": np.concatenate(end), "nll": np.array(nll)}


def usage(repo: str, max_length: int) -> str:
    """The lines of Python that answer a question with what a run has left; shown on the model card."""
    return f'''import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model = AutoModelForQuestionAnswering.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
question, context = "Who signed the treaty?", "The treaty was signed by both kings in 1204."
inputs = tokenizer(
    question, context, truncation="only_second", max_length={max_length}, return_tensors="pt", return_offsets_mapping=True
)
places = inputs.pop("offset_mapping")[0]
with torch.no_grad():
    found = model(**inputs)
scores = found.start_logits[0, :, None] + found.end_logits[0, None, :]
null = found.start_logits[0, 0] + found.end_logits[0, 0]
inside = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(model.config.max_answer_length - 1)
scores[~(allowed & inside[:, None] & inside)] = -torch.inf
first, last = divmod(int(scores.argmax()), len(inside))
threshold = model.config.no_answer_threshold
answer = context[places[first, 0] : places[last, 1]].strip()
if threshold is not None and null - scores.max() > threshold:
    answer = ""
print(answer)'''
