"""The model and what is trained of it: full, LoRA, QLoRA, P-tuning; its tokenizer and its replies. Used by train.py."""

from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from chats import PLAIN_TEMPLATE, spare_token
from peft import LoraConfig, PeftModel, PromptEncoderConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from shared import UserError
from shared.publish.hub import check_peft
from shared.training.packed_attention import PACKED


def check_method(script_args) -> None:
    """Raises UserError where other options do not go with `--method`; qlora is LoRA with `load_in_4bit`."""
    script_args.load_in_4bit |= script_args.method == "qlora"
    if script_args.save_merged and script_args.method in ("full", "p_tuning"):
        raise UserError(f"--save_merged: {script_args.method} leaves no adapter that can be merged.")
    if script_args.load_in_4bit and script_args.method == "full":
        raise UserError("--load_in_4bit: weights in 4 bits cannot be trained. Choose --method qlora or p_tuning.")
    if script_args.method != "full":
        check_peft()


def load_tokenizer(source: Path):
    """The model's tokenizer with a chat template, marked by trl where it knows the template; pad is not the end token."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = spare_token(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif not has_generation_markers(tokenizer.chat_template):
        with suppress(ValueError):  # not a template that trl knows: see chats.reply_spans
            tokenizer.chat_template = get_training_chat_template(tokenizer)
    return tokenizer


def four_bit(args) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023); computes in the precision of the run."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32,
    )


def load_model(source: Path, method: str, args, in_4bit: bool = False, empty: bool = False):
    """The base model, in fp32 or 4-bit NF4; `empty`: shapes without weights, for a plan.

    Its `config._attn_implementation` is PACKED where conversations may share a row. Not with virtual tokens in
    front of each, and not where a model has attention code of its own: Falcon builds its mask without the position ids, so
    that conversations in one row would see each other (transformers 5.23).
    """
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(source))]
    packs = architecture._supports_attention_backend and method != "p_tuning"
    if empty:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation=PACKED if packs else "sdpa",
        quantization_config=four_bit(args) if in_4bit else None,
    )
    return keep_layout(model)


def keep_layout(model):
    """On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit layer for good when it first evaluates: its products are bf16
    from then on, no gradient passes it, and its widths must be multiples of 64 in and 32 out (0.50.2). So not here.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def add_adapter(model, script_args, args):
    """Freezes the base and adds what `--method` trains."""
    if script_args.method == "full":
        return model
    if script_args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    if script_args.method == "p_tuning":
        tokens = script_args.virtual_tokens
        return get_peft_model(
            model, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, encoder_hidden_size=128)
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        lora_dropout=script_args.lora_dropout,
        target_modules="all-linear",
    )
    return get_peft_model(model, config)


def save_merged(trainer, whole, tokenizer) -> None:
    """Writes `merged/` into the run folder: the adapter merged into `whole`, its unquantized base."""
    output = Path(trainer.args.output_dir)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        PeftModel.from_pretrained(whole, str(output)).merge_and_unload().save_pretrained(output / "merged")
        tokenizer.save_pretrained(output / "merged")


def reply(model, tokenizer, conversations: list[list[dict]], max_new_tokens: int = 64) -> list[str]:
    """Greedy replies, one batch for all prompts."""
    if not conversations:
        return []
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in conversations
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
        model.device
    )
    asked = batch["input_ids"].shape[1]
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        # peft's `generate` looks for the cache by the name that it had before transformers 5.24, and so would read one token a
        # step; nor does it count positions, so that padding would change a reply
        prompt, rows = model.get_prompt(len(texts)), model.get_input_embeddings()(batch["input_ids"])
        mask = F.pad(batch["attention_mask"], (prompt.shape[1], 0), value=1)
        batch = {"inputs_embeds": torch.cat([prompt.to(rows.dtype), rows], 1), "attention_mask": mask}
        model, asked = model.get_base_model(), 0
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [text.strip() for text in tokenizer.batch_decode(out[:, asked:], skip_special_tokens=True)]


def usage(repo: str, method: str, in_4bit: bool = False) -> str:
    """The lines of Python that load what a run has left; shown on the model card."""
    loader, library = (
        ("AutoModelForCausalLM", "transformers") if method == "full" else ("AutoPeftModelForCausalLM", "peft")
    )
    names, quantized = "AutoTokenizer", ""
    if in_4bit:
        names += ", BitsAndBytesConfig"
        quantized = ", quantization_config=four_bit"
    return "\n".join(
        [
            f"from {library} import {loader}",
            f"from transformers import {names}",
            "",
            *[
                'four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
            ]
            * in_4bit,
            f'model = {loader}.from_pretrained("{repo}"{quantized})',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        ]
    )
