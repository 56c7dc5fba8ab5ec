"""Models of the shapes that recipes for a T4 name, with random weights, and rows as long as they may be: nothing is fetched.

Used by test_gpu_check.py.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
BGE_SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 12}
BART = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
BART |= {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
# The defaults of the other classes are the published shapes
SHAPES = {
    "SmolLM2": (AutoModelForCausalLM, LlamaConfig, SMOLLM2, torch.float32),
    "GPT-2": (AutoModelForCausalLM, GPT2Config, {}, torch.float32),
    "BERT": (AutoModelForMaskedLM, BertConfig, {}, torch.float32),
    "bge-small": (AutoModel, BertConfig, BGE_SMALL, torch.float32),
    "T5": (AutoModelForSeq2SeqLM, T5Config, {}, torch.float32),
    "BART": (AutoModelForSeq2SeqLM, BartConfig, BART, torch.float32),
    "Llama 2 7B": (AutoModelForCausalLM, LlamaConfig, {"max_position_embeddings": 4096}, torch.float16),
    "Falcon 7B": (AutoModelForCausalLM, FalconConfig, {}, torch.float16),
}
VOCABULARY = 1500  # of the tokenizer that is made here: nearly each word is one token
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "d_ff": 64}
TINY |= {
    "vocab_size": VOCABULARY,
    "num_decoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
}
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}
CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def some_words() -> list[str]:
    """A thousand words of two syllables."""
    syllables = [a + b for a in "bdfghklmnprstvwz" for b in "aeiou"]
    return random.Random(0).sample([a + b for a in syllables for b in syllables], 1000)


def write_rows(task: str, path: Path, count: int, length: int) -> Path:
    """A file with `count` rows of `length` words, few of them frequent, in the columns of a task; no two rows are alike."""
    draw, words, rows = random.Random(1), some_words(), []

    def text(length: int) -> str:
        return " ".join(draw.choices(words, [1 / (i + 1) for i in range(len(words))], k=length))

    makers = {
        "chat_sft": lambda i: {"question": f"{i} {text(length // 4)}", "answer": text(length // 2)},
        "classify_bert": lambda i: {"text": f"{i} {text(length)}", "label": ("red", "green", "blue")[i % 3]},
        "dpo_chat": lambda i: (
            {"prompt": f"{i} {text(length // 4)}"} | {name: text(length // 2) for name in ("chosen", "rejected")}
        ),
        "mlm_bert": lambda i: {"text": f"{i} {text(length)}"},
        "pretrain_gpt2": lambda i: {"text": f"{i} {text(length)}"},
        "qa_squad": lambda i: (
            {"context": f"{text(length)} {i * 7919}"} | {"question": f"Which is {i}?", "answers": f"{i * 7919}"}
        ),
        "rag_docs": lambda i: {"context": f"{i} {text(length)}", "question": f"{i} {text(length // 8)}"},
        "summarize_t5": lambda i: {"document": f"{i} {text(length)}", "summary": text(length // 6)},
    }
    for i in range(count):
        row = makers[task](i)
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows))
    return path


def save_tokenizer(shape: str, folder: Path) -> None:
    """Byte-level BPE of the words, with the special tokens and the template that a model of this shape has."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" " + " ".join(some_words())] * 3, trainer)
    pairs = dict.fromkeys(("BERT", "bge-small"), ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"))
    pairs |= {"T5": ("$A </s>", None), "BART": ("<s> $A </s>", None)}
    if shape in pairs:
        ends = [(name, names.index(name)) for name in ("<s>", "</s>")]
        single, pair = pairs[shape]
        bpe.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, cls_token="<s>", sep_token="</s>", **SPECIAL)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def empty_model(shape: str, tiny: bool):
    """A model of this shape without weights."""
    auto, config_class, sizes, _ = SHAPES[shape]
    sizes = sizes | (TINY if tiny else {}) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if tiny and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = 2
    with torch.device("meta"):
        return auto.from_config(config_class(**sizes, decoder_start_token_id=0))


def save_model(shape: str, folder: Path, device: str, tiny: bool) -> Path:
    """The folder of a model of this shape as it is published, in fp32 or fp16, with a tokenizer; of small sizes if `tiny`.

    Matrices are drawn on `device` and written one file each: no machine need hold seven billion weights.
    """
    model, dtype = empty_model(shape, tiny), SHAPES[shape][3]
    folder.mkdir(parents=True)
    files, generator = {}, torch.Generator(device).manual_seed(0)
    for name, weight in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        if weight.dim() > 1:
            value = torch.randn(weight.shape, generator=generator, device=device, dtype=dtype).mul_(0.02).cpu()
        else:  # of a norm, or a bias
            value = torch.full(weight.shape, float(name.endswith("weight")), dtype=dtype)
        files[name] = f"model-{len(files):05}.safetensors"
        save_file({name: value}, folder / files[name], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(folder)
    save_tokenizer(shape, folder)
    return folder
