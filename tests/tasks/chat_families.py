"""Chat model families: real configurations made tiny, small tokenizers, templates that do what their makers' do.

Used by test_chat_families.py and test_chat_files.py.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# Tools are listed in the system turn, calls and results are shown between tags.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}THOUGHTS{{ m.content }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{% set f = call.function %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = QWEN.replace("THOUGHTS", "")
# Thoughts of turns before the last question are dropped, and the last reply always has a place for them.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    + QWEN.replace(
        "THOUGHTS{{ m.content }}",
        "{% set content = m.content %}{% set thoughts = '' %}"
        "{% if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}{% elif '</think>' in content %}"
        "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
        "{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}",
    )
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    + ALTERNATE
    + "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are ChatGPT.<|end|>' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant' }}{% if loop.last and m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + "
    "'<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
    "{% set role = 'developer' if m.role == 'system' else m.role %}"
    "{{ '<|start|>' + role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT: ' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Thoughts are cut off each reply, the last too, although a reply is asked for by opening them.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

MINIMAX = (
    "{% for m in messages %}{% set who = {'user': 'user name=user', 'assistant': 'ai name=MiniMax AI'} %}"
    "{{ '<beginning_of_sentence>' + who.get(m.role, m.role) + '\n' + m.content + '<end_of_sentence>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<beginning_of_sentence>ai name=MiniMax AI\n' }}{% endif %}"
)

IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TOOLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
OLD = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}

# name: model type, what differs from SIZES, special tokens, begin, end and padding token, template
FAMILIES = {
    "GPT-2": (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4},
        ["<|endoftext|>", "ĠSolidGoldMagikarp"],
        None,
        "<|endoftext|>",
        None,
        None,
    ),
    "Llama 2": ("llama", SIZES, ["<s>", "</s>", "<unk>"], "<s>", "</s>", None, LLAMA2),
    "Llama 3": (
        "llama",
        SIZES,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
        *("<|begin_of_text|>", "<|eot_id|>", None, LLAMA3),
    ),
    "Vicuna": ("llama", SIZES, ["<s>", "</s>", "<unk>"], "<s>", "</s>", "<unk>", VICUNA),
    "SmolLM2": ("llama", SIZES, IM, "<|im_start|>", "<|im_end|>", "<|im_end|>", SMOLLM2),
    "Mistral": ("mistral", SIZES | {"sliding_window": 16}, ["<s>", "</s>", "<unk>"], "<s>", "</s>", None, MISTRAL),
    "Qwen 2.5": ("qwen2", SIZES, IM + TOOLS, None, "<|im_end|>", "<|endoftext|>", QWEN25),
    "Qwen 2 base": ("qwen2", SIZES, IM, None, "<|endoftext|>", "<|endoftext|>", SMOLLM2),
    "Qwen 3": ("qwen3", SIZES, IM + TOOLS, None, "<|im_end|>", "<|endoftext|>", QWEN3),
    "Gemma 1": (
        "gemma",
        SIZES,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<pad>",
        GEMMA,
    ),
    "Gemma 2": (
        "gemma2",
        SIZES | {"attn_logit_softcapping": 2.0, "sliding_window": 16, "query_pre_attn_scalar": 16},
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        *("<bos>", "<eos>", "<pad>", GEMMA),
    ),
    "Gemma 3": (
        "gemma3_text",
        SIZES
        | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        *("<bos>", "<eos>", "<pad>", GEMMA),
    ),
    "Phi-3": (
        "phi3",
        SIZES | {"pad_token_id": None},
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        *(None, "<|endoftext|>", "<|endoftext|>", PHI3),
    ),
    "Falcon": ("falcon", OLD, ["<|endoftext|>", ">>UNUSED_1<<"], None, "<|endoftext|>", None, None),
    "OPT": (
        "opt",
        OLD | {"ffn_dim": 64, "word_embed_proj_dim": 64},
        ["<s>", "</s>", "<pad>"],
        "</s>",
        "</s>",
        "<pad>",
        None,
    ),
    "BLOOM": (
        "bloom",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4},
        ["<s>", "</s>", "<pad>"],
        "<s>",
        "</s>",
        "<pad>",
        None,
    ),
    "Pythia": (
        "gpt_neox",
        OLD | {"intermediate_size": 64},
        ["<|endoftext|>", "<|padding|>"],
        *("<|endoftext|>", "<|endoftext|>", None, None),
    ),
    "GPT-J": (
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        ["<|endoftext|>", "<|extratoken_1|>"],
        *("<|endoftext|>", "<|endoftext|>", None, None),
    ),
    "GPT-Neo": (
        "gpt_neo",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 16},
        ["<|endoftext|>", "ĠSolidGoldMagikarp"],
        *("<|endoftext|>", "<|endoftext|>", None, None),
    ),
    "MPT": (
        "mpt",
        {"d_model": 64, "n_heads": 4, "n_layers": 2},
        ["<|endoftext|>", "<|padding|>"],
        *(None, "<|endoftext|>", None, None),
    ),
    "gpt-oss": (
        "gpt_oss",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        ["<|start|>", "<|end|>", "<|return|>", "<|message|>", "<|channel|>", "<|endoftext|>"],
        *(None, "<|return|>", "<|endoftext|>", GPT_OSS),
    ),
    "GLM-4": (
        "glm4",
        SIZES,
        ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"],
        *(None, "<|endoftext|>", "<|endoftext|>", GLM4),
    ),
    "LFM2": (
        "lfm2",
        SIZES | {"layer_types": ["conv", "full_attention"]},
        IM,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        CHATML,
    ),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {k: v for k, v in SIZES.items() if k != "head_dim"}
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64, **MAMBA},
        ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|pad|>"],
        *(None, "<|end_of_text|>", "<|pad|>", GRANITE),
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        OLD
        | {"num_key_value_heads": 1, "intermediate_size": 96, "lru_width": 64, "attention_window_size": 16}
        | {"block_types": ["recurrent", "attention"]},
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        *("<bos>", "<eos>", "<pad>", GEMMA),
    ),
    "MiniMax": (
        "minimax",
        SIZES | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "block_size": 32},
        ["<end_of_sentence>", "<beginning_of_sentence>", "<pad>"],
        *("<beginning_of_sentence>", "<end_of_sentence>", "<pad>", MINIMAX),
    ),
    "Mamba": ("mamba", OLD | {"state_size": 8}, IM, None, "<|im_end|>", "<|endoftext|>", CHATML),
    "Qwen3-Next": ("qwen3_next", SIZES | MOE | LINEAR | HYBRID, IM + TOOLS, None, "<|im_end|>", "<|endoftext|>", QWEN3),
    "Qwen 3.5": ("qwen3_5_text", SIZES | LINEAR | HYBRID, IM + TOOLS, None, "<|im_end|>", "<|endoftext|>", QWEN3),
}
WORDS = "What colour has number It is red green <hello> the question system user assistant tool answer {name: find} Be brief."


def tokenizer_of(special: list[str], bos, eos, pad, template) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens, so that any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    tokenizer.add_tokens([AddedToken(token, special="think" not in token and "tool" not in token) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    if "<unk>" in special:
        made.unk_token = "<unk>"
    made.chat_template = template
    return made


def build(name: str, folder: Path, **changes) -> Path:
    """A model of a family with random weights, larger than usual so that attention counts, and its tokenizer."""
    kind, sizes, special, bos, eos, pad, template = FAMILIES[name]
    tokenizer = tokenizer_of(special, bos, eos, pad, template)
    ids = {
        key: tokenizer.convert_tokens_to_ids(token)
        for key, token in (("bos_token_id", bos), ("eos_token_id", eos))
        if token
    }
    ids["pad_token_id"] = tokenizer.pad_token_id
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **ids | sizes | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in key:
                weight.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
