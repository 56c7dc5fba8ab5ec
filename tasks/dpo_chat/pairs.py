"""Preferences -> token ids, the trainer, and the scores of pairs under a model. Used by train.py."""

from functools import wraps

import torch
import torch.nn.functional as F
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from shared import UserError
from shared.data.encoding import PlainText, TemplateRefusal
from shared.training import scoring
from shared.training.launch import log
from shared.training.losses import finite


class PairEncoder:
    """Token ids of prompts and replies under a chat template; text never becomes a control token."""

    def __init__(self, tokenizer):
        self.tokenizer, self.plain = tokenizer, PlainText(tokenizer)
        probe = [{"role": "user", "content": "One?"}]
        try:
            found = self._reply(probe, "Two.")
        except TemplateRefusal as error:
            raise UserError(f"the chat template refuses a user and an assistant in turn: {error}.") from error
        if 1 not in self.plain.render([*probe, {"role": "assistant", "content": "Two."}], prompts=(1,)).prompts:
            log.warning(
                "the chat template does not show a reply behind its own prompt for one (which opens <think>, say), although "
                "it will be asked for so: give the model another template"
            )
        self.stop = found[1][-1] if found[1] and found[1][-1] in self.plain.control_ids else tokenizer.eos_token_id
        if self.stop is None:
            raise UserError("neither the chat template nor the tokenizer has a token that ends a reply.")

    def fit(self, row: dict) -> dict | str:
        """The row, or the reason for dropping it: the template refuses its prompt, or does not show all of it."""
        for side in ("chosen", "rejected"):
            messages = [*row["prompt"], {"role": "assistant", "content": row[side]}]
            try:
                shown = self.plain.render(messages, thoughts=True).content
            except TemplateRefusal as error:
                return f"bad: the chat template refuses the row: {' '.join(str(error).split())[:160]}"
            if hidden := next((m["role"] for i, m in enumerate(messages) if i not in shown), None):
                return f"bad: a turn of the {hidden} that the chat template does not show"
            if shown[len(messages) - 1][0] is None:
                return "bad: a reply whose beginning (its thoughts?) the chat template leaves out"
        return row

    def _reply(self, prompt: list[dict], reply: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the reply with the control token that ends it, where the template writes one."""
        number = len(prompt)
        messages = [*prompt, {"role": "assistant", "content": reply}]
        rendered = self.plain.render(messages, prompts=(number,), thoughts=True)
        ids, offsets = self.plain.encode_rendered(rendered)
        begin, close = rendered.content[number]
        begin = rendered.prompts.get(number, begin)
        end = next((end for start, end, _ in rendered.control if start >= close), close)
        start = next(i for i, place in enumerate(offsets) if place[1] > begin)
        stop = next((i for i, place in enumerate(offsets) if i > start and place[0] >= end), len(ids))
        return ids[:start], ids[start:stop]

    def tokenize(self, row: dict, max_length: int) -> dict:
        """`prompt_ids`, `chosen_ids` and `rejected_ids`, cut at `max_length`; whether they were; whether there is something to
        learn: room for a reply, and two that differ within it.
        """
        (prompt, chosen), (other, rejected) = (self._reply(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        same = min(len(prompt), len(other))
        while prompt[:same] != other[:same]:  # a first letter may be one token with what stands before it
            same -= 1
        prompt, chosen, rejected = prompt[:same], prompt[same:] + chosen, other[same:] + rejected
        chosen, rejected = (ids if ids[-1:] == [self.stop] else [*ids, self.stop] for ids in (chosen, rejected))
        room = max(0, max_length - len(prompt))
        truncated = max(len(chosen), len(rejected)) > room
        chosen, rejected = chosen[:room], rejected[:room]
        return {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "length": len(prompt) + max(len(chosen), len(rejected)),
            "truncated": truncated,
            "useful": chosen != rejected,
        }


def preflight(rows: list[dict], max_length: int, split: str = "train") -> dict:
    """What a run would learn (or test) with these tokenized rows of a split. A row has the tokens of both of its texts.

    Raises:
        UserError: no row has anything to learn.
    """
    useful = [row for row in rows if row["useful"]]
    if not useful:
        raise UserError(
            f"preflight: none of {len(rows):,} {split} rows has two replies that differ within --max_length {max_length}. "
            "Raise it."
        )
    prompts, chosen, rejected = (
        [len(row[f"{name}_ids"]) for row in useful] for name in ("prompt", "chosen", "rejected")
    )
    tokens = 2 * sum(prompts) + sum(chosen) + sum(rejected)
    return {
        "rows": len(useful),
        "rows_with_nothing_to_learn": len(rows) - len(useful),
        "truncated_rows": sum(row["truncated"] for row in useful),
        "tokens": tokens,
        "longest_row": max(row["length"] for row in useful),
        "supervised_share": round((sum(chosen) + sum(rejected)) / tokens, 4),
        "chosen_is_longer_share": round(sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(useful), 4),
    }


def score_replies_only(model) -> None:
    """Replaces what trl made `model(..., labels=labels, fused_lm_head=True)` compute, where there is no GPU: trl passes every
    position through the head there, prompts and padding too, of which a fifth is trained.
    """

    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return model.fused_forward(*args, labels=labels, **kwargs)
        mask = labels[:, 1:] != -100  # the position before a trained token predicts it
        positions, targets = F.pad(mask, (0, 1)), labels[:, 1:][mask]
        hidden = model.base_model(*args, **kwargs).last_hidden_state[positions]
        logits = model.get_output_embeddings()(hidden).float()
        logs = logits.log_softmax(-1)
        with torch.no_grad():
            facts = {"entropy": -(logs.exp() * logs).sum(-1), "mean_logits": logits.mean(-1)}
            facts["is_top1"] = logits.argmax(-1) == targets
        facts["log_probs"] = logs.gather(1, targets[:, None])[:, 0]
        spread = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in facts.items()}
        return FusedCausalLMOutput(label_mask=mask, **spread)

    model.fused_forward = model.forward
    model.forward = wraps(type(model).forward)(forward)


def plain_head(config) -> bool:
    """Whether logits are a product with the head and nothing else: Granite's and Cohere's are scaled, Gemma 2's capped; mixtures
    of experts have a loss of their own.
    """
    names = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    text = config.get_text_config()
    return not hasattr(text, "output_router_logits") and all(getattr(text, name, None) is None for name in names)


class PairTrainer(DPOTrainer):
    """`DPOTrainer` on tokenized rows, with the mean over all pairs of a step however they are split into micro-batches, each loss
    checked before the optimizer may use it. The reference is the model without its adapter, or with the one it came with.

    Args:
        new_adapter: whether the adapter was made for this run; trl would keep a copy of it as the reference.
    """

    loss_is_scaled_for_ga = True
    gathers_rows = True  # for the rewards that it logs

    def __init__(self, *args, new_adapter: bool, **kwargs):
        super().__init__(*args, **kwargs)
        if new_adapter:
            self.model.delete_adapter("ref")
        if self.args.device.type != "cuda" and plain_head(self.model.config):
            score_replies_only(self.model.get_base_model())

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def _set_signature_columns_if_needed(self):
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        self._signature_columns = [*names, "length"]  # by which rows are grouped

    def create_model_card(self, *args, **kwargs):
        """None here: the run writes its own card, with metrics, at the end."""

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs of the optimizer step, over all processes."""
        pairs = torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batch_samples), device=device)
        return self.accelerator.gather(pairs).sum() if self.args.world_size > 1 else pairs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss a pair over the whole optimizer step (`num_items_in_batch` of them)."""
        loss = super().compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is not None:
            # DDP averages gradients over processes, and the count is over all of them already
            loss = loss * (len(inputs["input_ids"]) // 2) * self.accelerator.num_processes / num_items_in_batch
        return finite(loss, lambda: f" at step {self.state.global_step + 1}")


def reference(model):
    """Context in which a `PairTrainer`'s model is what it was before training."""
    inner = getattr(model, "module", model)
    return use_adapter(inner, "ref" if "ref" in inner.peft_config else None)


def score_pairs(model, dataset, collator: DataCollatorForPreference, args, title: str) -> dict[str, list[float]]:
    """Scores both replies of every row; processes share the work.

    Returns:
        `chosen` and `rejected` (summed log-probabilities in nats), `chosen_tokens` and `rejected_tokens`, one entry a row.
    """

    def score_batch(rows: list[int]) -> list[list[float]]:
        batch = {name: value.to(model.device) for name, value in collator([dataset[i] for i in rows]).items()}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.float().sum(1)
        tokens = (labels[:, 1:] != -100).sum(1)
        return torch.stack([*found.chunk(2), *tokens.chunk(2)]).cpu().double().T.tolist()

    found = scoring.score_rows(model, list(dataset["length"]), score_batch, args, title)
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    return dict(zip(names, map(list, zip(*found, strict=True)), strict=True))


def show(row: dict, tokenizer) -> str:
    """The text of a row, between brackets the replies that are compared."""
    prompt, chosen, rejected = (tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
    return f"{prompt}[[{chosen}]]\nrejected: [[{rejected}]]"


def margins(scores: dict) -> list[float]:
    """For each pair, how much likelier the chosen reply is, in nats a token: long replies are unlikely as a whole."""
    columns = (scores[name] for name in ("chosen", "chosen_tokens", "rejected", "rejected_tokens"))
    return [chosen / n - rejected / m for chosen, n, rejected, m in zip(*columns, strict=True)]


def preferred(scores: dict) -> list[float]:
    """For each pair, 1 where the chosen reply is the likelier one a token."""
    return [float(margin > 0) for margin in margins(scores)]
