"""The tokenizer, the model of one size, and what it writes. Used by train.py."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from trainer_gpt2 import hidden_states
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from shared import UserError
from shared.inference.torch_runner import carries_state, causal_architecture
from shared.publish import vocabulary
from shared.publish.hub import pull
from shared.training.packed_attention import PACKED

END = "<|endoftext|>"
# layers, width
SIZES = {"pico": (2, 192), "nano": (4, 192), "mini": (8, 512), "small": (12, 768), "medium": (24, 1024)}
HEAD = 64  # width of an attention head, as in GPT-2
TOKENIZER_CHARACTERS = 50_000_000  # the merges of a sample this large are those of the corpus


def load_tokenizer(name: str | None, texts: Iterator[str], vocab_size: int):
    """An existing tokenizer, or byte-level BPE (as GPT-2's) trained on the texts; either has an end-of-text token.

    Raises:
        UserError: an existing tokenizer without an end token, or a vocabulary too small for the 256 bytes.
    """
    if name:
        source = pull(name)
        tokenizer = vocabulary.load_tokenizer(source, adapter=True)
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: this tokenizer has no end token to put between documents. Choose another.")
        tokenizer.model_max_length = int(1e30)  # documents may be of any length: they are cut into blocks
        return tokenizer
    if vocab_size < 300:
        raise UserError(f"--vocab_size {vocab_size}: 256 bytes and the end token need a place. Take 300 or more.")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def sample():
        left = TOKENIZER_CHARACTERS
        for text in texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
    )


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, whole and without special tokens, by all cores. A call of the tokenizer itself takes half as long
    again: it makes masks and dictionaries.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def build_model(model_name: str | None, size: str, tokenizer, block_length: int, isolate: bool):
    """A GPT-2 with random weights, or the model to continue from, in fp32. Dropout is off: a token is seen a few times only.

    Raises:
        UserError: no causal language model, blocks longer than it reads, more tokens than it has embeddings, or what
            `check_head` and `check_isolation` refuse.
    """
    if model_name is None:
        layers, width = SIZES[size]
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=block_length,
            n_embd=width,
            n_layer=layers,
            n_head=width // HEAD,
            activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one operation
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        model = GPT2LMHeadModel(config)
        model.set_attn_implementation(PACKED if isolate else "sdpa")
        return model
    source = pull(model_name)
    vocabulary.check_folder(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    architecture = causal_architecture(config, model_name)
    apart = architecture._supports_sdpa and architecture._supports_attention_backend
    if isolate and (not apart or carries_state(architecture, config)):
        raise UserError(
            f"--isolate_documents true: {model_name} ({config.model_type}) has attention of its own, or carries a state from one "
            "document to the next. Leave it out."
        )
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation=PACKED if isolate else None,  # sdpa where transformers knows it for the model
        trust_remote_code=False,
    )
    longest = getattr(model.config, "max_position_embeddings", block_length)
    if block_length > longest:
        raise UserError(f"--block_length {block_length}: {model_name} has {longest} positions. Take at most that many.")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"{model_name} has fewer embeddings than the tokenizer tokens: leave --tokenizer out.")
    check_head(model, model_name)
    if isolate:
        check_isolation(model, model_name, tokenizer.eos_token_id)
    return model


@torch.no_grad()
def check_head(model, name: str) -> None:
    """Tries on a short row whether logits are the last hidden states times the head's weights: training computes no others.

    Raises:
        UserError: they are not.
    """
    head, why = model.get_output_embeddings(), "its logits are scaled or capped behind its head"
    if getattr(head, "bias", None) is not None:
        why, same = "its head has a bias", False
    else:
        # A cap changes large logits only: the head is given its input a thousandfold.
        hook = head.register_forward_pre_hook(lambda _, given: (1000 * given[0],))
        found = model(torch.arange(8)[None], use_cache=False, output_hidden_states=True)
        hook.remove()
        same = alike(found.logits, 1000 * F.linear(found.hidden_states[-1], head.weight))
    if not same:
        raise UserError(f"{name}: {why}, and the loss here would be another model's. Continue from another model.")


@torch.no_grad()
def check_isolation(model, name: str, end: int) -> None:
    """Tries whether two documents in a row give the hidden states that each gives alone, with the model's own attention.

    Raises:
        UserError: they do not.
    """
    row = (end + torch.arange(8)) % model.get_input_embeddings().num_embeddings
    row = torch.cat([row, row.flip(0).roll(1)])  # both begin with the end token
    together = hidden_states(model, row[None], end)
    model.set_attn_implementation("eager")
    alone = torch.cat([hidden_states(model, part[None], end) for part in row.split(8)])
    model.set_attn_implementation(PACKED)
    if not alike(together, alone):
        raise UserError(
            f"--isolate_documents true: {name} does not score documents of a row as it does alone. Leave it out."
        )


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether they differ by rounding only; what is not a number is left to the first step, which it stops."""
    return not (ours - theirs).abs().mean() > 1e-3 * theirs.abs().mean()


TEMPERATURES = (0.5, 0.8, 1.1)
PROMPT, NEW = 16, 64  # tokens of a sample


@torch.no_grad()
def write_samples(base, trained, tokenizer, documents: list[list[int]], block_length: int, seed: int) -> list[dict]:
    """How both models go on from the beginnings of three documents, at each temperature; for `write_samples` of a run."""
    prompt_length = min(PROMPT, block_length // 2)
    chosen = [ids for ids in documents if len(ids) > prompt_length][:3]
    if not chosen:
        return []
    prompts = torch.tensor([[tokenizer.eos_token_id, *ids[:prompt_length]] for ids in chosen])
    most = min(NEW, block_length - prompts.shape[1])

    def go_on(model, temperature):
        torch.manual_seed(seed)
        own, ends = model.generation_config, model.generation_config.eos_token_id
        # Not what a model to continue from asks for beside
        model.generation_config = GenerationConfig(eos_token_id=ends)
        output = model.generate(
            prompts.to(model.device),
            attention_mask=torch.ones_like(prompts).to(model.device),
            do_sample=True,
            temperature=temperature,
            top_k=0,  # the whole distribution
            top_p=1.0,
            max_new_tokens=most,
            pad_token_id=tokenizer.eos_token_id,
        )
        model.generation_config = own
        return tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)

    written = {t: (go_on(base, t), go_on(trained, t)) for t in TEMPERATURES}
    return [
        {
            "prompt": tokenizer.decode(ids[:prompt_length]),
            "base": written[temperature][0][number],
            "trained": written[temperature][1][number],
            "reference": tokenizer.decode(ids[prompt_length : prompt_length + most]),
            "temperature": temperature,
        }
        for number, ids in enumerate(chosen)
        for temperature in TEMPERATURES
    ]


def usage(repo: str, block_length: int) -> str:
    """Lines that load the model and let it write, for the card; no more than it has positions for."""
    tokens = min(60, block_length // 2)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n'
        'prompt = tokenizer(tokenizer.eos_token + "The", return_tensors="pt", return_token_type_ids=False)\n'
        f"output = model.generate(**prompt, do_sample=True, temperature=0.8, max_new_tokens={tokens})\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )
