"""Weights in 4 bits, for QLoRA: how they are packed, and whether a model has them. Used by chat_sft, dpo_chat and plan.py."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.falcon import modeling_falcon
from transformers.pytorch_utils import Conv1D

from shared import UserError
from shared.training.hardware import dtype_of

# transformers 5.24 packs layers of exactly these types and leaves others as they are, with a warning about something else.
# Falcon's own computes what the first of them computes.
PACKED_TYPES = (torch.nn.Linear, Conv1D)
modeling_falcon.FalconLinear = torch.nn.Linear


def packable(model) -> list[torch.nn.Module]:
    """The layers whose weights QLoRA holds in 4 bits: all that are linear, but the head."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if type(module) in PACKED_TYPES and module is not head]


def four_bit(config, name: str, args) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023); computes in the precision of the run.

    Args:
        config: of the model whose weights shall be packed.
        name: of the model, for the error.

    Raises:
        UserError: most of the model would stay as it is, such as experts that are no linear layers.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    outside = [
        *(each for each in model.modules() if isinstance(each, torch.nn.Embedding)),
        model.get_output_embeddings(),
    ]
    ids = {id(module.weight) for module in outside if module is not None}
    inner = sum(weight.numel() for weight in model.parameters() if id(weight) not in ids)
    packed = sum(module.weight.numel() for module in packable(model))
    if packed < 0.9 * inner:
        raise UserError(
            f"{name}: only {packed / inner:.0%} of its layers' weights can be held in 4 bits; the others are in layers of its "
            "own. Use --method lora without --load_in_4bit, or another model."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(args),
    )
