"""The chat model, and what is trained of it: a new LoRA adapter, or the one that a chat_sft run left. Used by train.py."""

from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    TrainingArguments,
)
from trl import DPOConfig

from shared import UserError
from shared.inference.torch_runner import causal_architecture, keep_layout
from shared.publish import vocabulary
from shared.publish.hub import check_peft, pull
from shared.training.four_bit import four_bit
from shared.training.sharding import refuse_sharded

# Of trl's own options: what this task does as they say. The others would be half done, and are refused.
OBEYED = {"max_length", "beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha"}
OBEYED |= {"f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "activation_offloading"}
OBEYED |= {"precompute_ref_log_probs", "precompute_ref_batch_size"}
# Losses of the difference between both replies
DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
OTHERS = {"nca_pair", "sppo_hard", "apo_zero", "apo_down"}  # losses that look at either reply
OF_A_BATCH = {"bco_pair", "aot", "aot_unpaired", "sft"}  # losses of a whole batch, which change with the micro-batch
READ_WITH = {  # options that trl reads with some values of another one, and else passes over
    "label_smoothing": ("loss_type", {"robust", "exo_pair"}),
    "discopop_tau": ("loss_type", {"discopop"}),
    "f_alpha_divergence_coef": ("f_divergence_type", {"alpha_divergence"}),
    "precompute_ref_batch_size": ("precompute_ref_log_probs", {True}),
}
DIVERGENCES = {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.1}  # as deploy/ draws unless asked


def check_options(script_args, args) -> None:
    """Raises UserError for options of trl that this task does not obey, and for those that do not go with FSDP.

    Args:
        args: trl's DPOConfig.
    """
    check_peft()
    if script_args.method == "qlora":
        refuse_sharded(
            args, "--method qlora", "use --method lora, or accelerate/multi_gpu.yaml if it fits into one GPU"
        )
    if args.precompute_ref_log_probs:
        refuse_sharded(args, "--precompute_ref_log_probs", "leave it out")
    if args.max_length is None or args.max_length < 2:
        raise UserError("--max_length: write how many tokens of a row are read, for example 1024.")
    defaults = DPOConfig(output_dir=args.output_dir, bf16=False)
    for option in (f.name for f in fields(DPOConfig) if f.name not in {f.name for f in fields(TrainingArguments)}):
        if option not in OBEYED and getattr(args, option) != getattr(defaults, option):
            raise UserError(f"--{option} {getattr(args, option)}: not obeyed by this task. Leave it out.")
    if found := OF_A_BATCH & set(args.loss_type):
        raise UserError(
            f"--loss_type {' '.join(sorted(found))}: its value depends on which pairs share a micro-batch. Take a loss of single "
            "pairs, such as sigmoid, ipo or hinge."
        )
    for option, (owner, values) in READ_WITH.items():
        held = {*args.loss_type, args.f_divergence_type, args.precompute_ref_log_probs}
        if getattr(args, option) != getattr(defaults, option) and not values & held:
            those = " or ".join(f"--{owner} {str(value).lower()}" for value in sorted(values))
            raise UserError(f"--{option} {getattr(args, option)}: it is read with {those} only. Leave it out.")
    check_losses(args.loss_type, args.label_smoothing, args.f_divergence_type)


def check_losses(losses: list[str], smoothing: float, divergence: str) -> None:
    """Raises UserError for what trl would refuse once all data are read, or in its first step."""
    if unknown := set(losses) - DIFFERENCES - OTHERS:
        known = ", ".join(sorted(DIFFERENCES | OTHERS))
        raise UserError(f"--loss_type {' '.join(sorted(unknown))}: no such loss. Known: {known}.")
    if ("exo_pair" in losses and not 0 < smoothing < 1) or ("robust" in losses and not 0 <= smoothing < 0.5):
        raise UserError(f"--label_smoothing {smoothing}: exo_pair needs some, such as 0.001, and robust less than 0.5.")
    if divergence not in DIVERGENCES:
        raise UserError(f"--f_divergence_type {divergence}: not known. Known: {', '.join(sorted(DIVERGENCES))}.")
    if divergence != "reverse_kl" and OTHERS & set(losses):
        other = " ".join(sorted(OTHERS & set(losses)))
        raise UserError(
            f"--f_divergence_type {divergence} does not go with --loss_type {other}. Leave one of them out."
        )


def base_of(source: Path, script_args, args, resolved: dict, weights: bool = True) -> tuple[Path, PeftConfig | None]:
    """The folder of the base model, and the configuration of the adapter that `source` is (None: it is a whole model).

    Raises:
        UserError: an adapter that is not LoRA alone, or whose rank is not the one asked for.
    """
    if not (source / "adapter_config.json").is_file():
        return source, None
    config = PeftConfig.from_pretrained(source)
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{source}: an adapter of type {config.peft_type.value}; preferences are trained on whole models and LoRA adapters."
        )
    if config.modules_to_save or "lm_head" in (config.target_modules or ()):
        raise UserError(
            f"{source}: its adapter also changes {', '.join(config.modules_to_save or ['lm_head'])}, which the reference cannot "
            "switch off. Merge it into its base first, and train that."
        )
    refuse_sharded(args, "an adapter that goes on", "merge it first (--save_merged of chat_sft), and train that")
    for name, own in (("lora_r", config.r), ("lora_alpha", config.lora_alpha)):
        if name in resolved and getattr(script_args, name) != own:
            raise UserError(f"--{name} {getattr(script_args, name)}: the adapter of {source} has {own}. Leave it out.")
    config.inference_mode = False  # as it was saved; a plan counts what is trained
    name = config.base_model_name_or_path or ""
    return pull(f"{name}@{config.revision}" if config.revision and not Path(name).is_dir() else name, weights), config


def load_tokenizer(source: Path, base: Path):
    """The tokenizer of a run, or that of its base; it needs a chat template.

    Raises:
        UserError: no tokenizer, or no chat template.
    """
    folder = source if (source / "tokenizer_config.json").is_file() else base
    tokenizer = vocabulary.load_tokenizer(folder, adapter=folder != base)
    if not tokenizer.chat_template:
        raise UserError(f"{source}: no chat template, so no chat model. Train one first with tasks/chat_sft.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # hidden by the mask, and never trained
    return tokenizer


def load_model(source: Path, base: Path, adapter: PeftConfig | None, script_args, args, empty: bool = False):
    """The base in fp32 or 4-bit NF4, frozen, with the adapter that is trained; `empty`: shapes without weights, for a plan."""
    in_4bit, config = script_args.method == "qlora", AutoConfig.from_pretrained(base, trust_remote_code=False)
    causal_architecture(config, base.name)
    packed = four_bit(config, base.name, args) if in_4bit else None
    if empty:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            quantization_config=packed,
            trust_remote_code=False,
        )
        model = keep_layout(model)
    if in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    if adapter is not None and not empty:
        model = PeftModel.from_pretrained(model, str(source), is_trainable=True)
    else:
        config = adapter or LoraConfig(
            task_type="CAUSAL_LM",
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            target_modules="all-linear",
        )
        model = get_peft_model(model, config)
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])  # not the reference
    return model


def serve_as(model, source: Path, tokenizer, stop: int) -> GenerationConfig:
    """What is saved in generation_config.json: where replies end, and how they are drawn. What `source` has of its own stays."""
    given = model.generation_config
    if (source / "generation_config.json").is_file():
        given = GenerationConfig.from_pretrained(source)
    ends = given.eos_token_id if given.eos_token_id is not None else tokenizer.eos_token_id
    ends = [end for end in dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), stop]) if end is not None]
    named = {name: getattr(given, name, None) for name in SAMPLING}
    own = {name: value for name, value in named.items() if value not in (None, 1.0, 50)}
    kept = own if own.keys() & {"temperature", "top_p"} else SAMPLING | own
    model.generation_config = GenerationConfig(
        do_sample=True,
        **{"top_k": 0, **kept},
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=given.bos_token_id if given.bos_token_id is not None else tokenizer.bos_token_id,
    )
    return model.generation_config


def usage(repo: str) -> str:
    """The lines of Python that load what a run has left and reply with it; shown on the model card."""
    return "\n".join(
        [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer, GenerationConfig",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
            f'served = GenerationConfig.from_pretrained("{repo}")  # where replies end, and how they are drawn',
            'chat = [{"role": "user", "content": "Hello!"}]',
            'ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")',
            "reply = model.generate(input_ids=ids, generation_config=served, max_new_tokens=128)",
            "print(tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True))",
        ]
    )
