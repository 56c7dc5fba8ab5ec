"""The encoder that is trained to find: groups of questions and passages, their loss, vectors of texts. Used by train.py.

sentence-transformers' trainer is not used, though what is saved loads in that library. Its loss takes the other passages of a
micro-batch as the wrong ones, so a step would be another one with more accumulation, on two GPUs, or after running out of memory.
Here they are those of a group, and a group is a row: a step is the same however its rows are split.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModel, Trainer

from shared import UserError
from shared.retrieval.encoder import pool
from shared.training.dropout import dropout_settings
from shared.training.losses import finite, rows_of_step, step_mean
from shared.training.packed_attention import PACKED
from shared.training.scoring import score_rows

# Models whose attention takes further arguments and whose positions count from 0 (RoBERTa's do not); others are padded.
PACKABLE = ("bert", "electra")
TEMPERATURE = 0.05  # likenesses lie between -1 and 1: 20 times that is what the softmax over a group gets


def load_model(source: Path, dropout: float, settings: dict, device):
    """An encoder in fp32 whose configuration holds `settings` (see shared/retrieval/encoder.py), for whoever uses it.

    Args:
        dropout: of hidden states while training. Inside attention there is none: it would keep torch from its fused kernel.
        device: where it will run. Texts are packed on a CPU only: on a GPU a call for each would cost more than padding.

    Raises:
        UserError: the architecture is no encoder.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(
            f"{source}: a {config.model_type} model gives no vectors of texts; take BERT or another encoder."
        )
    packed = config.model_type in PACKABLE and device.type == "cpu"
    model = AutoModel.from_pretrained(
        source,
        **dropout_settings(config, dropout),
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=PACKED if packed else None,
    )
    if getattr(model, "pooler", None) is not None:
        # It is part of the architecture and saved with it, and no vector comes from it
        model.pooler.requires_grad_(False)
    model.config.retrieval = settings
    return model


class GroupCollator:
    """Groups, or single texts, -> one packed row or a padded batch."""

    def __init__(self, tokenizer, packed: bool):
        self.tokenizer, self.packed = tokenizer, packed

    def texts(self, texts: list[list[int]]) -> dict:
        """Token ids of texts -> what the model takes, and `text_lengths` (texts,)."""
        lengths = [len(ids) for ids in texts]
        if self.packed:
            batch = {"input_ids": torch.tensor([[i for ids in texts for i in ids]])}
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        else:
            batch = dict(self.tokenizer.pad({"input_ids": texts}, return_tensors="pt"))
        return batch | {"text_lengths": torch.tensor(lengths)}

    def __call__(self, groups: list[dict]) -> dict:
        batch = self.texts([ids for group in groups for ids in group["input_ids"]])
        batch["pairs"] = torch.tensor([len(group["document"]) for group in groups])
        batch["passages"] = torch.tensor([len(group["input_ids"]) for group in groups]) - batch["pairs"]
        batch["right"] = torch.tensor([each for group in groups for row in group["right"] for each in row])
        return batch


def embed(model, batch: dict, pooling: str) -> torch.Tensor:
    """(texts, width) vectors of length 1 in fp32."""
    lengths = batch["text_lengths"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    packed = {"cu_seq_lens_q": F.pad(lengths.cumsum(0), (1, 0))} if "position_ids" in inputs else {}
    hidden = model(**inputs, **packed).last_hidden_state
    flat = hidden[0] if packed else hidden[inputs["attention_mask"].bool()]
    return pool(flat, lengths, pooling)


def group_losses(vectors: torch.Tensor, batch: dict) -> torch.Tensor:
    """(groups,) the mean over a group's questions of the cross-entropy of finding the own passage among the wrong ones, in nats.

    Args:
        vectors: (texts, width) of `GroupCollator`'s batch: of each group the questions, then the passages, the own ones first in
            the order of the questions. Another passage that answers a question, too, is no wrong one.
    """
    losses, start, first = [], 0, 0
    for pairs, count in zip(batch["pairs"].tolist(), batch["passages"].tolist(), strict=True):
        questions, passages = vectors[start : start + pairs], vectors[start + pairs : start + pairs + count]
        right = batch["right"][first : first + pairs * count].view(pairs, count)
        too = right & ~torch.eye(pairs, count, dtype=torch.bool, device=right.device)
        scores = (questions @ passages.T / TEMPERATURE).masked_fill(too, -torch.inf)
        losses.append(F.cross_entropy(scores, torch.arange(pairs, device=scores.device)))
        start, first = start + pairs + count, first + pairs * count
    return torch.stack(losses)


class RetrieverTrainer(Trainer):
    """`Trainer` with the mean loss over groups, checked before the optimizer may use it; evaluates by the same loss."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args, pooling: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is computed here
        self.pooling = pooling

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "document", "right", "length"]

    def _get_num_items_in_batch(self, batch_samples, device):
        """Groups of the optimizer step."""
        return rows_of_step(self, batch_samples, "pairs")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean of `group_losses` over the whole optimizer step."""
        losses = group_losses(embed(model, inputs, self.pooling), inputs)
        loss = step_mean(self, losses.sum(), len(losses), num_items_in_batch)
        return finite(loss, lambda: f" at step {self.state.global_step + 1}")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The mean loss over the groups of the validation split."""
        rows = self.eval_dataset

        def score_batch(numbers: list[int]) -> list[float]:
            batch = {k: v.to(self.model.device) for k, v in self.data_collator([rows[i] for i in numbers]).items()}
            return group_losses(embed(self.model, batch, self.pooling), batch).tolist()

        losses = score_rows(self.model, list(rows["length"]), score_batch, self.args)
        metrics = {f"{metric_key_prefix}_loss": float(np.mean(losses))}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def vectors_of(model, texts: list[list[int]], collator, pooling: str, args, title: str) -> np.ndarray:
    """(texts, width) vectors of token ids; processes share the work."""

    def score_batch(numbers: list[int]) -> list[np.ndarray]:
        batch = {k: v.to(model.device) for k, v in collator.texts([texts[i] for i in numbers]).items()}
        return list(embed(model, batch, pooling).cpu().numpy())

    return np.stack(score_rows(model, [len(ids) for ids in texts], score_batch, args, title))


def least_likeness(model, pairs, collator, settings: dict, args) -> float:
    """How like 97 of 100 questions of the validation split are to their passage at least, from -1 to 1. Documents of which no
    passage is as like to a question are taken not to answer it: `settings["likeness"]` of an encoder.
    """
    asked, right = map(list, zip(*pairs, strict=True))
    vectors = vectors_of(model, asked + right, collator, settings["pooling"], args, "validation, likeness")
    return float(np.quantile((vectors[: len(asked)] * vectors[len(asked) :]).sum(1), 0.03))


def nearest(questions: np.ndarray, passages: np.ndarray, ids: np.ndarray, most: int) -> list[list[int]]:
    """For each question the ids of the passages whose vectors are the likest to its own, the best first."""
    order = np.argsort(-(questions @ passages.T), axis=1, kind="stable")[:, :most]
    return ids[order].tolist()


def usage(repo: str) -> str:
    """The lines of Python that find a passage with what a run has left; shown on the model card."""
    return f'''from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}")
passages = ["The treaty was signed by both kings in 1204.", "The bridge has nine arches."]
question = model.encode_query("Who signed the treaty?")
likeness = model.similarity(question, model.encode_document(passages))
print(passages[likeness.argmax()])'''
