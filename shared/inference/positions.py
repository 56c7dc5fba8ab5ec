"""How many tokens a model reads. Called by tasks that take an encoder, by model.py and the runners."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from shared import UserError
from shared.publish.vocabulary import check_vocabulary

MIXES = ("big_bird", "fnet", "convbert", "funnel", "mobilebert", "nystromformer", "xlnet", "yoso")
log = logging.getLogger("taskbook")


def longest_input(config, tokenizer) -> int | None:
    """Most tokens of one input, special tokens included; None where neither configuration nor tokenizer sets a limit.

    RoBERTa and its kin (XLM-R, CamemBERT, MPNet, ...) number positions from the one after padding: of 514 they read 512. The
    architecture tells, not a list of names: their table of positions has a row for padding.
    """
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    # Of one that sees pictures too (Gemma 3) the part for text has it
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # LED numbers what it reads and what it writes apart
    positions = getattr(config, "max_encoder_position_embeddings", None) or positions
    limits = [getattr(config, "max_position_embeddings", positions), tokenizer.model_max_length]
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        with torch.device("meta"):  # shapes only: no memory, no weights
            model = AutoModel.from_config(config, trust_remote_code=False)
        if first := first_position(model):
            limits.append(getattr(config, "max_position_embeddings", first) - first)
    return min((limit for limit in limits if limit and 0 < limit < 1e9), default=None)  # -1: XLNet's, without end


def first_position(model) -> int:
    """The number of a row's first token: 0, but for RoBERTa and its kin."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def mixes_padding(config) -> bool:
    """Whether what pads the rows of an encoder changes what it makes of them: Fourier transforms, convolutions, neighbours, means
    over all places, attention by the longest row's length, the last place read for the whole row; or a class that looks for the
    end of a row and knows no padding.
    """
    no_padding = getattr(config.get_text_config(), "pad_token_id", None) is None
    return no_padding or config.model_type in MIXES


def switches_at(config) -> int | None:
    """The longest text whose tokens are all turned as those of a short one, where a longer one's are all turned otherwise
    (longrope, as in Phi 3 and 4 with long contexts); None for all other rotary embeddings.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # by kind of layer
        length = each.get("original_max_position_embeddings")
        if each.get("rope_type") == "longrope" and length and length < text.max_position_embeddings:
            return length
    return None


def check_summary(config, tokens: int) -> None:
    """What an encoder-decoder writes has positions of its own, as many as its configuration says; T5's have no end.

    Raises:
        TooLong: the decoder has fewer than `tokens`.
    """
    from shared.data.encoding import TooLong

    most = getattr(config, "max_decoder_position_embeddings", None)  # LED's
    most = most or getattr(config, "max_position_embeddings", None)
    if most and tokens > most:
        raise TooLong(
            f"a summary of up to {tokens:,} tokens is wanted; this model writes at most {most:,}. Ask for fewer."
        )


def check_settings(source: Path, write: Callable) -> None:
    """Tries a model's generation_config.json before anything takes long: there are ways to write that only code of the Hub knows.

    Args:
        write: has the model write a few tokens by these settings.

    Raises:
        UserError: it cannot.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so few tokens are fewer than its min_length
            write()
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what the file asks for
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(
            f"{source}: what its generation_config.json asks for cannot be done here ({type(error).__name__}: {reason}). Take it "
            "out of that file."
        ) from error


def check_length(max_length: int, source: Path, tokenizer) -> None:
    """For encoders that a task trains; says what else of a text they do not read.

    Raises:
        UserError: the model in the folder `source` reads fewer tokens than `max_length`, these hold no text, or it has fewer
            embeddings than its tokenizer tokens.
    """
    from transformers import AutoConfig

    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise UserError(f"--max_length {max_length}: of each text {special} are special tokens. Take more.")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_vocabulary(config, tokenizer, source)
    longest = longest_input(config, tokenizer)
    if longest and max_length > longest:
        raise UserError(f"--max_length {max_length}: this model reads {longest} tokens at most.")
    words = tokenizer.tokenize("ma ma")
    if tokenizer.tokenize("má mà") == words and tokenizer.unk_token not in words:
        log.info(
            "the tokenizer reads letters without their marks, má as ma: not for Vietnamese, where they make other words"
        )
