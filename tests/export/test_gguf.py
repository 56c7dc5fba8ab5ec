"""GGUF files in llama.cpp itself (xllamacpp): tokens, chat and stop tokens as in PyTorch; what is refused."""

import json

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared import UserError
from shared.export import gguf_file
from shared.export.formats import impossible
from shared.inference.torch_runner import load_torch

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 256}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96, "initializer_range": 0.2}
TEXTS = ["people read 1234 books", "  it's HERE!!\n\n\n  naïve 東京 12\t x", "<|im_start|>user\nWhat?<|im_end|>\n"]
TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def byte_pairs(folder, regex, **options):
    """A small byte-level BPE tokenizer that cuts words by a regular expression, as Llama 3 and Qwen have them."""
    tokenizer = Tokenizer(models.BPE(**options))
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([cut, whole]), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3 + ["what people read: 12 123 1999"], trainer)
    if options:  # Llama 3 begins each text with a token of its own
        begin = [("<|endoftext|>", 0)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=begin)
    else:
        tokenizer.normalizer = normalizers.NFC()
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    template = "{{- bos_token }}" * bool(options) + TEMPLATE
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **ends).save_pretrained(folder)


@pytest.fixture
def built(tiny, tmp_path):
    """name -> a tiny model with weights that fp16 holds, and the folder of its tokenizer."""

    def of(name):
        folder = tmp_path / "tokenizer"
        if name in ("llama", "gpt2"):
            AutoTokenizer.from_pretrained(tiny / name).save_pretrained(folder)
        else:
            regex = gguf_file.LLAMA3 if name == "llama3" else gguf_file.QWEN2
            byte_pairs(folder, regex, **({"ignore_merges": True} if name == "llama3" else {}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size = {"vocab_size": len(tokenizer) + 7, "eos_token_id": tokenizer.eos_token_id}  # more rows than tokens
        configs = {
            "llama": lambda: transformers.LlamaConfig(**SIZES, **size, tie_word_embeddings=True),
            "llama3": lambda: transformers.LlamaConfig(**SIZES, **size, attention_bias=True, mlp_bias=True),
            "qwen2": lambda: transformers.Qwen2Config(**SIZES, **size),
            "qwen3": lambda: transformers.Qwen3Config(**SIZES, **size, head_dim=32, tie_word_embeddings=True),
            "gpt2": lambda: transformers.GPT2Config(**GPT2, **size),
        }
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()
        with torch.no_grad():
            for each, parameter in model.named_parameters():
                if each.endswith("bias"):
                    parameter.normal_(std=0.2)
                parameter.copy_(parameter.half().float())
        return model, folder

    return of


def server(path):
    """llama.cpp with a GGUF file."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(path), 256, 1
    options.warmup, options.verbosity, options.cpuparams.n_threads = False, 0, 1
    return xllamacpp.Server(options)


def written(model, ids, n=12):
    """New tokens, greedily, as far as one is likelier than all others: llama.cpp multiplies in fp16."""
    settings = {
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "output_scores": True,
        "return_dict_in_generate": True,
        "eos_token_id": [],
        "pad_token_id": 0,
    }
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, **settings)
    first, second = torch.cat(out.scores).topk(2).values.T
    clear = ((first - second) > 0.02 * torch.cat(out.scores).std()).int().cumprod(0)
    new = out.sequences[0, len(ids) :][: int(clear.sum())].tolist()
    end = model.generation_config.eos_token_id
    return new[: new.index(end) + 1] if end in new else new


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "gpt2"])
def test_llama_cpp_writes_what_pytorch_writes(built, tmp_path, name):
    model, folder = built(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    assert gguf_file.cannot(model.config, folder) is None
    gguf_file.write(model, folder, tmp_path, quantized=False)
    llama_cpp = server(tmp_path / gguf_file.FILE)
    settings = {"max_tokens": 12, "temperature": 0, "return_tokens": True, "verbose": True}
    seen, prompt = [], TEXTS[0]
    for text in TEXTS:  # llama.cpp cuts the text itself; weights are random, so that other tokens would go on otherwise
        found = llama_cpp.handle_completions({"prompt": text, **settings})["__verbose"]
        ids = tokenizer(text)["input_ids"]
        assert found["tokens_evaluated"] == len(ids), text
        expected = written(model, ids)
        assert found["tokens"][: len(expected)] == expected, text
        seen += expected
    assert len(seen) > 12 and len(set(seen)) > 3
    found = llama_cpp.handle_completions({"prompt": prompt, **settings})["__verbose"]
    third = found["tokens"][2]
    if tokenizer.chat_template:
        turns = [("user", "What is 12 + 7?"), ("assistant", "19"), ("user", "And  then?")]
        messages = [{"role": role, "content": text} for role, text in turns]
        chat = llama_cpp.handle_chat_completions({"messages": messages, **settings})["__verbose"]
        assert chat["prompt"] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A second stop token
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, third]
    gguf_file.write(model, folder, tmp_path, quantized=False)
    found = server(tmp_path / gguf_file.FILE).handle_completions({"prompt": prompt, **settings})["__verbose"]
    assert found["stop_type"] == "eos" and found["tokens"].index(third) == len(found["tokens"]) - 1 <= 2
    assert (
        f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(third))}" in (tmp_path / "Modelfile").read_text()
    )


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "gpt2"])
def test_pytorch_reads_the_file_back_whole(built, tmp_path, name):
    """The gate does: with other heads than Qwen's own, other sizes than GPT-2's own, and biases."""
    model, folder = built(name)
    gguf_file.write(model, folder, tmp_path, quantized=False)
    back, ids = load_torch(tmp_path, "text-generation"), torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_eight_bits_stay_close(built, tmp_path):
    model, folder = built("llama")
    gguf_file.write(model, folder, tmp_path, quantized=True)
    found = server(tmp_path / gguf_file.FILE).handle_completions(
        {"prompt": TEXTS[0], "max_tokens": 4, "temperature": 0}
    )
    assert found["choices"][0]["text"]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_file.FILE, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        rounded = back.state_dict()[name]
        assert 0 <= (weight - rounded).abs().max() <= weight.abs().max() / 127, name


def test_the_modelfile_has_the_template_in_ollamas_language(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    text = gguf_file.modelfile(tokenizer, [tokenizer.eos_token_id])
    assert text.startswith('FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\nTEMPLATE """{{ range .Messages }}')
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in text
    assert text.endswith('SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""\n')
    assert "TEMPLATE" in gguf_file.modelfile(AutoTokenizer.from_pretrained(tiny / "gpt2"), [])
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    assert "TEMPLATE" not in gguf_file.modelfile(tokenizer, []), "no two messages are alike"


@pytest.mark.parametrize(
    "mark", ["{% generation %}", "{%- generation -%}", "{%- generation %}\n", "  {% generation %}"]
)
def test_marks_are_taken_out_of_a_template_and_it_renders_the_same(tiny, mark):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    end = mark.replace("generation", "endgeneration")
    tokenizer.chat_template = "{% for m in messages %}\n  " + mark + " {{ m.content }} " + end + " \n{% endfor %}"
    rows = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    before = tokenizer.apply_chat_template(rows, tokenize=False)
    tokenizer.chat_template = gguf_file.plain_template(tokenizer.chat_template)
    assert "generation" not in tokenizer.chat_template
    assert tokenizer.apply_chat_template(rows, tokenize=False) == before


def test_what_has_not_been_seen_to_be_the_same_is_refused_by_name(tiny, tiny_bert, tmp_path):
    def reason(config, tokenizer, **changes):
        config = config(**changes)
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
        return gguf_file.cannot(config, tokenizer)

    llama, gpt2 = transformers.LlamaConfig, tiny / "gpt2"
    assert reason(llama, gpt2, **SIZES) is None
    assert "without its sliding window" in reason(transformers.MistralConfig, gpt2, **SIZES, sliding_window=16)
    assert "of type linear" in reason(
        llama, gpt2, **SIZES, rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 1e4}
    )
    assert "another activation than gelu" in reason(llama, gpt2, **SIZES, hidden_act="gelu")
    assert "another activation than gelu_new" in reason(llama, gpt2, **SIZES, hidden_act="gelu_new"), "GPT-2's"
    assert "FalconForCausalLM is none of" in reason(transformers.FalconConfig, gpt2)
    assert "none that llama.cpp is known to repeat" in reason(llama, tiny_bert, **SIZES)
    byte_pairs(tmp_path, gguf_file.LLAMA3, ignore_merges=True)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{- bos_token }}", ""))
    assert "its texts begin with <|endoftext|> and its chats do not" in reason(llama, tmp_path, **SIZES)
    whole = json.loads((gpt2 / "tokenizer.json").read_text())
    for change in ({"pre_tokenizer": {"type": "Metaspace"}}, {"normalizer": {"type": "NFKC"}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match="none that llama.cpp is known to repeat"):
            gguf_file.pre_tokenizer(tmp_path)
    assert "continue texts only" in impossible(tiny_bert, "fill-mask")["gguf"]
