"""tasks/chat_sft with the models that people bring: each family trains or is refused in one line, and packed rows are proven."""

import json
import re

import chat_families
import chats
import methods
import packing
import pytest
import replies
import torch
from chat_families import FAMILIES, build
from checkout import ROOT, train_script
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig

from shared import UserError
from shared.inference.model import load
from shared.training.arguments import parse
from shared.training.packed_attention import PACKED

chat_sft = train_script("chat_sft")
SFT = "trl.trainer.sft_config:SFTConfig"
README = ROOT / "tasks" / "chat_sft" / "README.md"
BEGIN, END = "<!-- families: written by tests/tasks/test_chat_families.py -->\n", "<!-- /families -->"


def talk(*texts: str, system: str | None = None) -> dict:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path, colours = tmp_path_factory.mktemp("rows") / "rows.jsonl", ("red", "green")
    talks = [
        talk(f"What colour has number {i * 7}?", colours[i % 2], f"And {i * 13}?", "It is red.") for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, talks)))
    return path


def run(model, data, output, **options):
    options = {
        "model_name_or_path": model,
        "dataset": data,
        "output_dir": output,
        "method": "full",
        "max_steps": 1,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
        "max_test_rows": 4,
        "max_validation_rows": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | options
    chat_sft.main(*parse(chat_sft.ScriptArguments, SFT, [f"--{name}={value}" for name, value in options.items()]))
    return json.loads((output / "all_results.json").read_text())


LINES = {}  # of the table in README.md, by family


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, rows, tmp_path):
    """It trains; each reply is trained with the token that ends it, which is saved beside the model's own stop tokens; rows that
    share a batch score as they do alone.
    """
    source = build(name, tmp_path / "model")
    chat = methods.load_chat(source)
    tokenizer, (said, answer) = chat.tokenizer, (talk("What?", "It is red.", "And?", "green"), "It is red.")
    stop = tokenizer.convert_ids_to_tokens(chat.stop)
    row = chat.tokenize(said, 512)
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    thinks = "<think>\n\n</think>\n\n" if FAMILIES[name][-1] is chat_families.QWEN3 else ""
    final = "<|channel|>final<|message|>" if name == "gpt-oss" else ""
    assert re.sub(r"\s", "", learned) == re.sub(r"\s", "", f"{final}{answer}{stop}{final}{thinks}green{stop}")
    assert chats.preflight([row], chat.stop, 512)["end_token_trained_share"] == 1
    assert tokenizer.pad_token_id not in (None, chat.stop)

    results = run(source, rows, tmp_path / "run")
    assert results["test_loss"] != results["base_loss"]
    served = GenerationConfig.from_pretrained(tmp_path / "run")
    saved = torch.tensor(served.eos_token_id).reshape(-1).tolist()
    own = GenerationConfig.from_pretrained(source).eos_token_id
    assert chat.stop in saved and own in (None, *saved)

    implementation, padded = methods.attention(source, "full")
    model = methods.load_model(source, "full", SFTConfig(bf16=False))
    collator = packing.RowCollator(pad_token_id=tokenizer.pad_token_id, padding_free=not padded)
    batch = [dict(chat.tokenize(talk("What number?" * n, "It is red. " * n), 512), row=n) for n in (2, 7)]
    why = packing.prove(model, batch, collator, exact=True)
    assert not why, why
    reference = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    nll, _, number = packing.token_losses(model.eval(), collator(batch))
    for i, row in enumerate(batch):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        alone = torch.nn.functional.cross_entropy(reference(ids).logits[0, :-1], labels[1:], reduction="none")
        assert torch.allclose(nll[number == i], alone[labels[1:] != -100], atol=2e-4)
    texts = [talk("What number?" * n) for n in (1, 4, 2)]
    together, _ = replies.reply(reference, chat, texts, served, 6)
    assert together == [replies.reply(reference, chat, [text], served, 6)[0][0] for text in texts]
    served_rows = [chat.prompt_ids(text) for text in texts]
    model = load(source)
    assert model.generate(served_rows, max_new_tokens=6) == [
        model.generate([r], max_new_tokens=6)[0] for r in served_rows
    ]
    shown = stop.replace("|", r"\|")
    LINES[name] = f"| {name} | yes | {'padded: ' + padded if padded else 'packed'} | `{shown}` |\n"


@pytest.mark.parametrize("kind", ["bert", "bart", "xlnet"])
def test_what_does_not_continue_a_text_is_refused(kind, rows, tmp_path):
    """transformers loads each of them for it; BERT and XLNet would see what they are to predict."""
    source = build("SmolLM2", tmp_path / "model")
    tokenizer = methods.load_tokenizer(source)
    sizes = {"d_model": 64, "d_inner": 64, "n_layer": 1, "n_head": 4, "decoder_layers": 1} | chat_families.OLD
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **sizes)
    if kind == "bart":
        config.save_pretrained(source)
    else:
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
    with pytest.raises(UserError, match="no causal language model|has an encoder and a decoder") as stopped:
        run(source, rows, tmp_path / "run")
    assert str(stopped.value).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "implementation", "words"),
    [
        ("LFM2", PACKED, "packed rows give other losses than rows alone"),
        ("Granite 4 hybrid", PACKED, "packed rows give other losses than rows alone"),
        ("gpt-oss", PACKED, "its own attention (eager) gives other losses than packed"),
        ("Mistral", PACKED, ""),
    ],
)
def test_the_proof_finds_what_no_configuration_tells(name, implementation, words, tmp_path):
    """Models forced into packed rows: those that would leak, or lose their sinks, are found by their losses."""
    source = build(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation=implementation)
    chat = methods.load_chat(source)
    batch = [dict(chat.tokenize(talk("What number?" * n, "It is red. " * n), 512), row=n) for n in (6, 7)]
    collator = packing.RowCollator(pad_token_id=0, padding_free=True)
    why = packing.prove(model, batch, collator, exact=True)
    assert words in why and bool(why) == bool(words) and collator.padding_free == (not words), why
    assert model.config._attn_implementation == ("eager" if "own" in words else implementation)


def test_rows_of_two_tokens_are_no_proof_against_a_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build("SmolLM2", tmp_path), attn_implementation=PACKED)
    row = {"input_ids": [5, 6], "labels": [-100, 6], "row": 0}
    assert packing.prove(model, [row], packing.RowCollator(pad_token_id=0, padding_free=True), exact=True) == ""


def options(**values) -> SFTConfig:
    return SFTConfig(output_dir="x", bf16=False, **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"packing": True}, "--packing True: conversations share a row"),
        ({"padding_free": True}, "--padding_free True: conversations share a row"),
        ({"loss_type": "dft"}, "--loss_type dft: the loss is"),
        ({"truncation_mode": "keep_end"}, "--truncation_mode keep_end: not obeyed"),
        ({"assistant_only_loss": False}, "--assistant_only_loss false: only replies are trained"),
        ({"completion_only_loss": False}, "--completion_only_loss false: only replies are trained"),
        ({"assistant_only_loss": True, "completion_only_loss": True}, ""),
        ({"max_length": 384, "learning_rate": 1.0}, ""),
    ],
)
def test_options_of_trl_are_obeyed_or_refused(values, words):
    args, script = options(**values), chat_sft.ScriptArguments()
    if not words:
        methods.check_method(script, args, values)
        assert not args.assistant_only_loss and args.completion_only_loss is None  # said, done, and not trl's business
        return
    with pytest.raises(UserError, match=re.escape(words)):
        methods.check_method(script, args, values)


def test_template_end_and_pad_by_option(rows, tmp_path):
    """What is saved is what was trained."""
    source, template = build("Qwen 2 base", tmp_path / "model"), tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
    )
    run(source, rows, tmp_path / "run", chat_template_path=template, eos_token="<|im_end|>", pad_token="<|im_start|>")
    saved = methods.load_tokenizer(tmp_path / "run")
    assert saved.chat_template == template.read_text() and saved.eos_token == "<|im_end|>"
    assert saved.pad_token == "<|im_start|>"
    assert saved.eos_token_id in GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id
    chat = methods.load_chat(source, options(chat_template_path=str(build("Gemma 1", tmp_path / "gemma"))))
    assert "<start_of_turn>" in chat.tokenizer.chat_template
    for name in ("eos_token", "pad_token"):
        with pytest.raises(UserError, match=f"--{name} <no>: not in the vocabulary"):
            methods.load_chat(source, options(**{name: "<no>"}))


def test_tokens_without_an_embedding(rows, tmp_path):
    """Added to the tokenizer and not to the model: the embedding grows, or the adapter is refused; padding is found elsewhere."""
    source = build("SmolLM2", tmp_path / "model")
    tokenizer = methods.load_tokenizer(source)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(source)
    assert methods.load_chat(source).tokenizer.pad_token_id < size
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")
    tokenizer.save_pretrained(source)
    with pytest.raises(UserError, match=rf"the rows hold token {size + 1}, the model has embeddings for {size} only"):
        run(source, rows, tmp_path / "lora", method="lora")
    assert not (tmp_path / "lora").exists()
    run(source, rows, tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert model.get_input_embeddings().num_embeddings == size + 2
    assert size + 1 in model.generation_config.eos_token_id


def test_a_generation_configuration_that_cannot_be_saved_is_mended(rows, tmp_path):
    source = build("Vicuna", tmp_path / "model")
    config = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.9, "top_p": 0.6}
    (source / "generation_config.json").write_text(json.dumps(config))
    run(source, rows, tmp_path / "run", save_strategy="steps", save_steps=1)
    served = GenerationConfig.from_pretrained(tmp_path / "run")
    assert (served.do_sample, served.temperature, served.top_p) == (True, 0.9, 0.6)


def test_an_adapter_keeps_where_its_replies_end(rows, tmp_path):
    """The base knows <|endoftext|> only; who loads the adapter, as deploy does, must stop at <|im_end|>."""
    source = build("Qwen 2 base", tmp_path / "model")
    run(source, rows, tmp_path / "run", method="lora")
    model = load(tmp_path / "run")
    ends = [model.tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert sorted(model.stop_ids) == sorted(ends)


def test_a_reply_also_ends_at_the_end_token_of_the_tokenizer(tmp_path):
    """A model that was fine-tuned elsewhere: <|im_end|> is its tokenizer's, the settings are still its base's."""
    source = build("Qwen 2 base", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(source)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert sorted(load(source).stop_ids) == sorted(ends)


def test_loops_and_ends_are_counted():
    assert replies.loops("I think it would be " * 3) and not replies.loops("I think it would be " * 2)
    found = replies.counts(["a b a b", "c d"], [True, False], ["one two three", "four five six"], "test")
    assert found == {
        "test_replies_that_end": 0.5,
        "test_replies_that_loop": 0.0,
        "test_distinct_2": 0.75,
        "test_length_to_reference": 1.0,
    }
    assert replies.counts([], [], [], "test") == {} and replies.in_words({}, {}) == ""
    base = replies.counts(["a b c d " * 3, "c d"], [True, True], ["one", "two"], "base")
    assert replies.in_words(found, base) == "Replies that end by themselves: 100% -> 50%; that loop: 50% -> 0%."


def test_readme_has_the_table():
    """Run with all of `test_family`; where the table differs it is written anew, and the test fails once."""
    if LINES.keys() != FAMILIES.keys():
        return
    head = "| family | trained | rows of a batch | token that ends a reply |\n|---|---|---|---|\n"
    table = f"{BEGIN}\n{head}{''.join(LINES[name] for name in FAMILIES)}\n{END}"
    text = README.read_text(encoding="utf8")
    written = re.sub(re.escape(BEGIN) + r".*?" + re.escape(END), lambda _: table, text, flags=re.DOTALL)
    README.write_text(written, encoding="utf8")
    assert BEGIN in text and written == text, f"{README} is out of date and was written anew"
