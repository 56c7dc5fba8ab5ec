"""The model and what is trained of it: full, LoRA, QLoRA, P-tuning; its tokenizer. Used by train.py."""

import re
from dataclasses import fields
from pathlib import Path

import torch
from chats import PLAIN_TEMPLATE, Chat
from peft import LoraConfig, PeftModel, PromptEncoderConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    TrainingArguments,
)
from trl import SFTConfig

from shared import UserError
from shared.inference.torch_runner import carries_state, causal_architecture, keep_layout
from shared.publish import vocabulary
from shared.publish.hub import check_peft, pull
from shared.training.four_bit import four_bit
from shared.training.packed_attention import PACKED
from shared.training.sharding import refuse_sharded

# Of trl's own options: what this task does as they say, and what would be half done.
OBEYED = {"max_length", "chat_template_path", "eos_token", "pad_token", "assistant_only_loss", "completion_only_loss"}
OBEYED |= {"dataset_kwargs", "learning_rate", "activation_offloading", "dataset_num_proc"}
REFUSED = {
    "packing": "conversations share a row here wherever their model lets them, without being cut to fill it",
    "padding_free": "conversations share a row here wherever their model lets them",
    "loss_type": "the loss is the mean negative log-likelihood of the trained tokens",
}
SPARE = re.compile(r"pad|reserved|unused|extra|dummy|spare", re.I)  # names of tokens that no text contains
SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 0,
    "repetition_penalty": 1.1,
}  # as deploy/ draws unless asked otherwise


def check_method(script_args, args, resolved: dict) -> None:
    """Raises UserError where other options do not go with `--method`, and for those of trl that this task does not obey; qlora is
    LoRA with `load_in_4bit`.

    Args:
        args: trl's SFTConfig. `--assistant_only_loss true` and `--completion_only_loss true` say what is done anyway.
        resolved: the options that were set.
    """
    script_args.load_in_4bit |= script_args.method == "qlora"
    if script_args.save_merged and script_args.method in ("full", "p_tuning"):
        raise UserError(f"--save_merged: {script_args.method} leaves no adapter that can be merged.")
    if script_args.load_in_4bit and script_args.method == "full":
        raise UserError("--load_in_4bit: weights in 4 bits cannot be trained. Choose --method qlora or p_tuning.")
    if script_args.load_in_4bit or script_args.method == "p_tuning":
        what = "--load_in_4bit" if script_args.method == "lora" else f"--method {script_args.method}"
        refuse_sharded(args, what, "use --method lora, or accelerate/multi_gpu.yaml if the model fits into one GPU")
    if script_args.method != "full":
        check_peft()
    if args.max_length is None or args.max_length < 2:
        raise UserError("--max_length: write how many tokens of a row are read, for example 1024.")
    for name in ("assistant_only_loss", "completion_only_loss"):
        if name in resolved and not getattr(args, name):
            raise UserError(f"--{name} false: only replies are trained here. Leave it out.")
    defaults = SFTConfig(output_dir=args.output_dir, bf16=False)
    for option in (f.name for f in fields(SFTConfig) if f.name not in {f.name for f in fields(TrainingArguments)}):
        if option not in OBEYED and getattr(args, option) != getattr(defaults, option):
            raise UserError(
                f"--{option} {getattr(args, option)}: {REFUSED.get(option, 'not obeyed by this task')}. Leave it out."
            )
    # trl would look for them in rows that are tokenized
    args.assistant_only_loss, args.completion_only_loss = False, None


def load_tokenizer(source: Path, args=None):
    """The model's tokenizer with a chat template, changed as `--chat_template_path`, `--eos_token` and `--pad_token` say.

    Raises:
        UserError: a token that the vocabulary does not have, or a template that cannot be read.
    """
    tokenizer = vocabulary.load_tokenizer(source, adapter=True)  # of a run, too, whose folder holds an adapter alone
    path = args and args.chat_template_path
    if path and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf8")
    elif path:
        tokenizer.chat_template = vocabulary.load_tokenizer(pull(path, weights=False), adapter=True).chat_template
        if tokenizer.chat_template is None:
            raise UserError(f"--chat_template_path {path}: its tokenizer has no chat template.")
    for name in ("eos_token", "pad_token") if args else ():
        token = getattr(args, name)
        if token and token not in tokenizer.get_vocab():
            raise UserError(
                f"--{name} {token}: not in the vocabulary of {source.name}, whose model has no embedding for it."
            )
        if token:
            setattr(tokenizer, name, token)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        if tokenizer.eos_token is None:
            raise UserError(f"{source.name}: neither a chat template nor an end token. Name one: --eos_token.")
    return tokenizer


def load_chat(source: Path, args=None) -> Chat:
    """The tokenizer of `load_tokenizer` with what its template teaches, and with a token for padding.

    Raises:
        UserError: an adapter, or no model; as `load_tokenizer`.
    """
    vocabulary.check_folder(source)
    chat = Chat(load_tokenizer(source, args))
    given = args and args.pad_token
    if not given:
        choose_pad(chat, AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config().vocab_size)
    if args:  # done: trl would load the template once more
        args.chat_template_path = args.eos_token = args.pad_token = None
    return chat


def choose_pad(chat: Chat, embeddings: int) -> None:
    """Sets a token for padding that no text contains and that does not end a turn: padding must never teach a model to stop.

    GPT-2 has no spare token; ` SolidGoldMagikarp` is in its vocabulary but in no text (Rumbelow & Watkins 2023). Where nothing is
    spare, the end token: labels and masks keep padding out of this training, and packed rows have none.

    Args:
        embeddings: rows of the model's embedding; a token beyond cannot be read.
    """
    tokenizer, vocabulary = chat.tokenizer, chat.tokenizer.get_vocab()
    free = [token for token in tokenizer.get_added_vocab() if token not in (tokenizer.eos_token, tokenizer.unk_token)]
    free = sorted((token for token in free if token not in chat.source), key=vocabulary.get)
    spare = sorted((token for token in free if SPARE.search(token)), key=lambda token: "pad" not in token.lower())
    candidates = (tokenizer.pad_token, *spare, tokenizer.unk_token, "ĠSolidGoldMagikarp", *free, tokenizer.eos_token)
    for token in candidates:
        number = vocabulary.get(token, embeddings)
        if number < embeddings and number not in (chat.stop, tokenizer.bos_token_id):
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.stop or 0)


def attention(source: Path, method: str) -> tuple[str, str]:
    """The attention that a model can take, and why its rows are padded ("": conversations may share a row).

    A model's own attention (eager) where transformers knows no other for it, or where the fused one (sdpa) would leave
    out its soft cap or sinks. Rows are padded with virtual tokens in front of each; where attention is code of the model's own,
    as Falcon's, whose mask does not know the positions; and where layers are recurrent or convolve over the row (LFM2,
    Granite hybrids, Qwen3-Next): their state would pass from one conversation to the next. `packing.prove` looks at the
    loaded model.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    architecture, text = causal_architecture(config, source.name), config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    own = not architecture._supports_sdpa or cap
    if carries_state(architecture, config):
        return "eager" if own else "sdpa", "it has layers that carry a state along the row"
    if own:
        return "eager", "its attention is its own (eager)"
    if not architecture._supports_attention_backend:
        return "sdpa", "its attention does not know where a conversation begins"
    return ("sdpa", "virtual tokens stand before each") if method == "p_tuning" else (PACKED, "")


def load_model(source: Path, method: str, args, in_4bit: bool = False, empty: bool = False, needs: int = 0):
    """The base model, in fp32 or 4-bit NF4; `empty`: shapes without weights, for a plan.

    Its `config._attn_implementation` is PACKED where conversations may share a row: see `attention`.

    Args:
        needs: rows that the embedding must have; it grows only where all weights are trained.

    Raises:
        UserError: the rows hold ids beyond the embedding, and only an adapter would be trained; no layers for 4 bits.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    causal_architecture(config, source.name)
    size = config.get_text_config().vocab_size
    if needs > size and method != "full":
        raise UserError(
            f"the rows hold token {needs - 1}, the model has embeddings for {size:,} only: tokens were "
            "added to its tokenizer and not to the model. Train them with --method full, or take the model's own "
            "tokenizer."
        )
    packed = four_bit(config, source.name, args) if in_4bit else None
    if empty:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation=attention(source, method)[0],
        quantization_config=packed,
        trust_remote_code=False,
    )
    if needs > size:
        model.resize_token_embeddings(needs)
    return keep_layout(model)


def serve_as(model, tokenizer, stop: int) -> GenerationConfig:
    """Sets and returns what is saved in generation_config.json: where replies end, and how they are drawn.

    The model's own stop tokens stay, the one that ends a turn is added. Its own sampling stays too, where it has any;
    transformers refuses to save a temperature without `do_sample` (Vicuna), which is turned on then.
    """
    given = model.generation_config
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


def base_of(model):
    """The model under an adapter that is disabled. LoRA's stays around it: with FSDP only the outermost model gathers weights."""
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model


def save_merged(trainer, whole, tokenizer, served: GenerationConfig) -> None:
    """Writes `merged/` into the run folder: the adapter merged into `whole`, its unquantized base."""
    output, whole.generation_config = Path(trainer.args.output_dir), served
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        PeftModel.from_pretrained(whole, str(output)).merge_and_unload().save_pretrained(output / "merged")
        tokenizer.save_pretrained(output / "merged")


def usage(repo: str, method: str, in_4bit: bool = False) -> str:
    """The lines of Python that load what a run has left and reply with it; shown on the model card."""
    loader, library = (
        ("AutoModelForCausalLM", "transformers") if method == "full" else ("AutoPeftModelForCausalLM", "peft")
    )
    bits = ', bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
    # peft asks for the cache by the name that it had before transformers 5.24: with it, a token would see none before it
    cache = ", use_cache=False" if method == "p_tuning" else ""
    return "\n".join(
        [
            f"from {library} import {loader}",
            f"from transformers import AutoTokenizer, {'BitsAndBytesConfig, ' * in_4bit}GenerationConfig",
            "",
            *[f"four_bit = BitsAndBytesConfig(load_in_4bit=True{bits}"] * in_4bit,
            f'model = {loader}.from_pretrained("{repo}"{", quantization_config=four_bit" * in_4bit})',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
            f'served = GenerationConfig.from_pretrained("{repo}")  # where replies end, and how they are drawn',
            'chat = [{"role": "user", "content": "Hello!"}]',
            'ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")',
            f"reply = model.generate(input_ids=ids, generation_config=served, max_new_tokens=128{cache})",
            "print(tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True))",
        ]
    )
