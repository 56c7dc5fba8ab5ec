"""tasks/chat_sft: data formats, what is trained, isolation, each method end to end, resume, errors. Tiny models, real code."""

import json
import math
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import chats
import formats
import hub_seed
import methods
import packing
import pytest
import replies
import task_runs
import torch
import vllm_folder
from checkout import ROOT, train_script
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from shared import UserError
from shared.training.arguments import parse

chat_sft = train_script("chat_sft")
TASK = ROOT / "tasks" / "chat_sft"
SFT = "trl.trainer.sft_config:SFTConfig"


def flags(tiny, data, output, **options):
    options = {
        "model_name_or_path": tiny / "llama",
        "dataset": data,
        "output_dir": output,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


def run_main(argv):
    chat_sft.main(*parse(chat_sft.ScriptArguments, SFT, argv))


command = partial(task_runs.command, TASK / "train.py")


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes"}]}, []),
        ({"conversations": [{"from": "human", "value": "hi?"}, {"from": "gpt", "value": "yes"}]}, []),
        ({"prompt": "hi?", "completion": "yes"}, []),
        ({"prompt": [{"role": "user", "content": "hi?"}], "completion": [{"role": "assistant", "content": "yes"}]}, []),
        ({"instruction": "hi?", "input": "", "output": "yes"}, []),
        ({"question": "hi?", "answer": "yes"}, []),
        ({"title": "hi?", "body": "yes"}, ["prompt=title", "completion=body"]),
        (
            {"instruction": "hi?", "instances": [{"input": "", "output": "yes"}]},
            ["input=instances.0.input", "output=instances.0.output"],
        ),
    ],
)
def test_formats_are_recognised(row, mapping):
    found = formats.Reader("rows", list(row), mapping)(row)
    assert found == {"messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "yes"}]}


def test_instruction_and_input_are_joined():
    row = {"instruction": "Translate.", "input": "vÃ©", "output": "x"}
    found = formats.Reader("rows", list(row), [])(row)
    assert found["messages"][0]["content"] == "Translate.\n\nvé"


def test_people_become_user_and_assistant():
    turns = [
        ("ann", "hello"),
        ("ann", "is it cold?"),
        ("bob", "very"),
        ("bob", "icy"),
        ("ann", "oh"),
        ("bob", "yes"),
        ("ann", "bye"),
    ]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    found = formats.Reader("rows", ["conversations"], [], people=True)(row)["messages"]
    assert [m["content"] for m in found] == ["hello\nis it cold?", "very\nicy", "oh", "yes"]
    assert [m["role"] for m in found] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("a", "Hi!"), ("b", "hey there")], "greetings only"),
        ([("a", "is anyone here?")], "no reply"),
        ([("a", "x"), ("b", "y"), ("c", "z")], "more than two speakers"),
        ([("a", None)], "bad: missing"),
        ([("a", {"b": 3})], "bad: wrong type"),
        ([("a", "x" * 1_100_000), ("b", "y")], "bad: over 1 MB"),
        ([("a", "\x00\x01\x02\x03x"), ("b", "y")], "bad: control characters"),
        ([("a", " "), ("b", "")], "bad: empty"),
    ],
)
def test_unusable_rows_are_named(turns, reason):
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert formats.Reader("rows", ["conversations"], [], people=True)(row).partition("\n")[0] == reason


def test_unknown_columns_say_found_expected_and_how_to_map():
    with pytest.raises(
        UserError,
        match=r"found the columns query, answer; expected .*one of: messages.*--columns prompt=query completion=answer",
    ):
        formats.find_format("rows", ["query", "answer"], [])
    with pytest.raises(UserError, match="--columns prompt=q: no column q"):
        formats.find_format("rows", ["title", "body"], ["prompt=q"])


def talk(*texts: str) -> dict:
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def trained(row: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_replies_are_trained_each_with_its_end(tiny, name):
    chat = methods.load_chat(tiny / name)
    tokenizer, said = chat.tokenizer, talk("one?", "two", "three?", "four")
    row = chat.tokenize(said, 512)
    assert trained(row, tokenizer) == f"two{tokenizer.eos_token}four{tokenizer.eos_token}"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == chat.stop
    facts = chats.preflight([row], chat.stop, 512)
    assert facts["end_token_trained_share"] == 1 and facts["truncated_rows"] == 0
    first_end = row["labels"].index(tokenizer.eos_token_id) + 1
    cut = chat.tokenize(said, len(row["input_ids"]) - 3)
    assert cut["truncated"] and cut["input_ids"] == row["input_ids"][:first_end]  # the last whole reply that fits
    assert f"[[two{tokenizer.eos_token}]]" in chats.show(row, tokenizer)


@pytest.mark.parametrize(
    "make", [hub_seed.smollm2_tokenizer, partial(hub_seed.llama_tokenizer, hub_seed.LLAMA2_TEMPLATE)]
)
def test_templates_without_marks_are_read_turn_by_turn(make):
    """As on the Hub: SmolLM2's and Llama 2's own templates say nothing about what the assistant says."""
    tokenizer = make()
    said = talk("Is two said?", "two", "three?", "four")
    row = chats.Chat(tokenizer).tokenize(said, 512)
    assert trained(row, tokenizer).replace(" ", "") == f"two{tokenizer.eos_token}four{tokenizer.eos_token}"
    whole = tokenizer.apply_chat_template(said["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole
    tokenizer.chat_template = "{% for m in messages[-1:] %}{{ m['content'] + eos_token }}{% endfor %}"
    assert chats.Chat(tokenizer).fit(said) == "bad: a turn of the user that the chat template does not show"


def test_preflight_stops_when_nothing_or_no_end_is_trained():
    with pytest.raises(UserError, match="none of 1 rows has a token to learn after the cut at --max_length 40"):
        chats.preflight([{"input_ids": [1, 2], "labels": [-100, -100], "truncated": True}], 9, 40)
    with pytest.raises(UserError, match="end token is trained"):
        chats.preflight([{"input_ids": [1, 2], "labels": [-100, 2], "truncated": False}], 9, 40)
    with pytest.raises(UserError, match="--max_length 40 cuts every row before its first reply ends"):
        chats.preflight([{"input_ids": [1, 2], "labels": [-100, 2], "truncated": True}], 9, 40)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_conversations_of_a_batch_do_not_see_each_other(tiny, name):
    """Packed in one row where the attention keeps them apart, padded for Falcon: the losses are those of each row alone."""
    model = methods.load_model(tiny / name, "lora", SFTConfig(bf16=False)).eval()
    packs = model.config._attn_implementation == "packed"
    assert packs == (name != "falcon")
    rows = [
        {"input_ids": list(range(start, start + n)), "labels": list(range(start, start + n)), "row": start}
        for start, n in ((10, 7), (90, 1), (30, 12))
    ]
    batch = packing.RowCollator(pad_token_id=0, padding_free=packs)(rows)
    assert batch["input_ids"].shape == ((1, 20) if packs else (3, 12))
    nll, _, conversation = packing.token_losses(model, batch)
    assert conversation.tolist() == [0] * 6 + [2] * 11
    for number in (0, 2):
        ids = torch.tensor(rows[number]["input_ids"])
        alone = model(ids[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(alone, ids[1:], reduction="none")
        assert torch.allclose(nll[conversation == number], expected, atol=1e-5)
    if packs:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "cu_seq_lens_q")}
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
        assert torch.allclose(model(**inputs, use_cache=False).logits[0], alone, atol=1e-5)


def adapted(source, method, **options):
    """The model that a run would train, as `train.py` makes it."""
    options = SimpleNamespace(
        method=method, load_in_4bit=method == "qlora", lora_r=2, lora_alpha=4, lora_dropout=0, **options
    )
    args = SFTConfig(bf16=False, gradient_checkpointing=False)
    model = methods.load_model(source, method, args, options.load_in_4bit)
    return methods.add_adapter(model, options, args)


@pytest.mark.parametrize("width", [64, 48])
def test_evaluation_does_not_change_how_four_bits_train(tiny, tmp_path, monkeypatch, width):
    """bitsandbytes on a CPU with AVX512-BF16: gradients would end at a layer that has evaluated; at 48 it would fail."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = LlamaConfig.from_pretrained(tiny / "llama", hidden_size=width, head_dim=16, vocab_size=100)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, ids = adapted(tmp_path, "qlora"), torch.arange(5, 25)[None]

    def gradients():
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    after = gradients()
    assert before and all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_replies_of_the_untrained_model_follow_the_settings_of_the_run(tiny):
    """And not its own: `--method full` loads it anew, with all that its generation_config.json asks for."""
    chat = methods.load_chat(tiny / "llama")
    trained, base = (AutoModelForCausalLM.from_pretrained(tiny / "llama") for _ in range(2))
    base.generation_config.update(stop_strings=["END"], no_repeat_ngram_size=1)
    served = methods.serve_as(trained, chat.tokenizer, chat.stop)
    talks = [{"messages": [{"role": "user", "content": "What colour has it?"}]}]
    assert replies.reply(base, chat, talks, served, 12) == replies.reply(trained, chat, talks, served, 12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_virtual_tokens_reply_as_without_cache_and_padding(tiny, name):
    chat = methods.load_chat(tiny / name)
    model = adapted(tiny / name, "p_tuning", virtual_tokens=4).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.3)  # each token counts
    talks = [{"messages": [{"role": "user", "content": "What colour has it? " * n}]} for n in (1, 3, 2)]
    found, _ = replies.reply(model, chat, talks, GenerationConfig(eos_token_id=chat.stop), 12)
    assert len(set(found)) == 3
    for talk, reply in zip(talks, found, strict=True):
        ids = torch.tensor([chat.prompt_ids(talk)])
        asked = ids.shape[1]
        while ids.shape[1] < asked + 12 and ids[0, -1] != chat.stop:
            last = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, last.view(1, 1)], 1)
        assert reply == chat.tokenizer.decode(ids[0, asked:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "full"),
        ("llama", "lora"),
        ("llama", "qlora"),
        ("llama", "p_tuning"),
        ("falcon", "lora"),
        ("gpt2", "lora"),
    ],
)
def test_each_method_learns_and_reloads_to_the_same_replies(tiny, data, tmp_path, name, method):
    from safetensors.torch import load_file

    merged = method in ("lora", "qlora")
    run_main(
        flags(
            tiny,
            data,
            tmp_path / "run",
            model_name_or_path=tiny / name,
            method=method,
            max_steps=12,
            save_merged=merged,
        )
    )
    run = tmp_path / "run"
    results = json.loads((run / "all_results.json").read_text())
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] and results["test_loss"] < results["base_loss"]
    assert results["test_perplexity_ci95"][0] < results["test_perplexity"] < results["test_perplexity_ci95"][1]
    for file in ("README.md", "run.yaml", "preflight.json", "loss.png", "samples.jsonl"):
        assert (run / file).stat().st_size > 0
    assert not (run / "training_args.bin").exists()
    before = load_file(tiny / name / "model.safetensors")
    if method == "full":
        after = load_file(run / "model.safetensors")
        assert all(not torch.equal(before[key], after[key]) for key in before)  # every weight moved
        model = AutoModelForCausalLM.from_pretrained(run)
    else:
        moved = load_file(run / "adapter_model.safetensors")
        assert all(torch.isfinite(value).all() and value.abs().max() > 0 for value in moved.values())
        loaded = {}
        lines = methods.usage(str(run), method, in_4bit=method == "qlora")  # on the card; greedy here
        exec(lines.replace("=128", "=32, do_sample=False, repetition_penalty=1.0"), loaded)
        model = methods.keep_layout(loaded["model"])
        if method != "qlora":
            frozen = {
                key.removeprefix("base_model.model."): value
                for key, value in model.get_base_model().state_dict().items()
            }
            assert all(
                torch.equal(value, frozen[key.replace(".base_layer", "")])
                for key, value in before.items()
                if key in frozen
            )
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    chat, served = chats.Chat(methods.load_tokenizer(run)), GenerationConfig.from_pretrained(run)
    assert served.do_sample and (served.temperature, served.top_p) == (0.7, 0.95)
    most = replies.room(chat, [{"messages": [{"role": "assistant", "content": s["reference"]}]} for s in samples])
    greedy, _ = replies.reply(model.eval(), chat, [{"messages": s["messages"]} for s in samples], served, most)
    assert greedy == [sample["trained_greedy"] for sample in samples]
    if method != "full":
        hello, _ = replies.reply(model, chat, [{"messages": loaded["chat"]}], served, 32)
        new = loaded["reply"][0, loaded["ids"].shape[1] :]
        assert hello == [chat.tokenizer.decode(new, skip_special_tokens=True).strip()]
    assert 0 <= results["test_replies_that_loop"] <= 1 and results["base_replies_that_end"] == 0
    assert "Replies that end by themselves: 0% -> " in (run / "README.md").read_text()
    tokenizer = chat.tokenizer
    if method == "lora":
        ids = tokenizer("What colour has 5 35 65?", return_tensors="pt").input_ids
        whole = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
        assert torch.allclose(whole(ids).logits, model(ids).logits, atol=1e-4)
        assert vllm_folder.differs(run / "merged") == [] or name != "llama"
        card = (run / "README.md").read_text()
        assert "Did it help?" in card and "metrics:" in card and str(tmp_path) not in card


def test_another_run_in_the_same_folder_leaves_nothing_of_the_one_before(tiny, data, tmp_path):
    """An adapter that stays beside a fully trained model would be loaded in its place, by transformers, too."""
    run = tmp_path / "run"

    def train(**options) -> set[str]:
        ran = command(*flags(tiny, data, run, max_steps=1, **options))
        assert ran.returncode == 0, ran.stderr[-2000:]
        return {path.name for path in run.iterdir()}

    assert "merged" in train(save_merged=True)
    (run / "notes.txt").write_text("mine")
    left = train(method="full", resume="never")
    assert not left & {"adapter_config.json", "adapter_model.safetensors", "merged"}, left
    assert left > {"notes.txt", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    left = train(resume="never")
    assert not left & {"config.json", "model.safetensors"} and "adapter_config.json" in left, left


def test_a_run_repeats_from_its_own_configuration(tiny, data, tmp_path):
    run_main(flags(tiny, data, tmp_path / "a", max_steps=3, lora_r=4))
    run_main([f"--config={tmp_path / 'a' / 'run.yaml'}", f"--output_dir={tmp_path / 'b'}"])
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in "ab"]
    assert results[0]["test_loss"] == results[1]["test_loss"]


def test_nan_stops_before_the_optimizer_and_names_the_rows(tiny, data, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny / "llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(tiny / "llama").save_pretrained(broken)
    with pytest.raises(UserError, match=r"The loss became nan at step 1, in rows \[\d+.*not made"):
        run_main(flags(tiny, data, tmp_path / "run", model_name_or_path=broken))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_bad_rows_are_dropped_and_many_stop_the_run(tiny, data, tmp_path):
    rows = data.read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text(
        "\n".join(
            [*rows, json.dumps({"question": "", "answer": None}), json.dumps({"question": {"x": 5}, "answer": "x"})]
        )
    )
    run_main(flags(tiny, few, tmp_path / "run", max_steps=1))
    assert "kept 120 + dropped 2" in json.loads((tmp_path / "run" / "preflight.json").read_text())["cleaning"]
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(rows + [json.dumps({"question": "", "answer": ""})] * 10))
    with pytest.raises(UserError, match="10 of 130 rows are unusable"):
        run_main(flags(tiny, many, tmp_path / "other", max_steps=1))


def test_kill_and_repeat_ends_with_the_same_weights(tiny, data, tmp_path):
    """With dropout, gradient accumulation and packing: SIGKILL after a checkpoint, SIGTERM after a later one, then on."""
    options = {
        "max_steps": 24,
        "lora_dropout": 0.1,
        "save_steps": 4,
        "eval_steps": 100,
        "gradient_accumulation_steps": 2,
        "save_total_limit": 1,
    }
    whole = command(*flags(tiny, data, tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    argv, run = flags(tiny, data, tmp_path / "run", **options), tmp_path / "run"
    interrupt = partial(task_runs.interrupt, TASK / "train.py", argv, run)
    assert interrupt(4, signal.SIGKILL) == -signal.SIGKILL
    assert interrupt(12, signal.SIGTERM) == 143
    rest = command(*argv)
    assert rest.returncode == 0, rest.stderr
    assert "Resum" in rest.stdout or "resum" in rest.stdout
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    losses = [task_runs.losses(tmp_path / name) for name in ("whole", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 24


def test_the_folder_runs_from_anywhere(tiny, data, tmp_path):
    copied = tmp_path / "elsewhere" / "my chat"
    shutil.copytree(TASK, copied, ignore=shutil.ignore_patterns("__pycache__"))
    ran = subprocess.run(
        [sys.executable, str(copied / "train.py"), *flags(tiny, data, tmp_path / "run", max_steps=1)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["run"]["task"] == "my chat"
    assert "'tasks/my chat/train.py' --config" in (tmp_path / "run" / "run.yaml").read_text()


def test_unknown_keys_stop_before_torch(tmp_path):
    config = tmp_path / "typo.yaml"
    config.write_text("# comment\nmethod: lora\nlerning_rate: 1\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for argv, words in (
        ([f"--config={config}"], f"{config}, line 3: unknown key `lerning_rate`. Did you mean `learning_rate`?"),
        (["--metod=lora"], "Unknown flag --metod. Did you mean `method`?"),
        (["--config=none.yaml"], "--config none.yaml: no such file"),
    ):
        stopped = command(*argv, PYTHONPATH=str(tmp_path))
        assert stopped.returncode == 2 and words in stopped.stderr and "Traceback" not in stopped.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fp16=true"], "fp16 needs a GPU"),
        (["--method=lorra"], "invalid choice"),
        (["--method=full", "--load_in_4bit=true"], "--load_in_4bit: weights in 4 bits cannot be trained"),
        (["--model_name_or_path=./nowhere"], "./nowhere: no such folder"),
        (["--dataset=./nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--dataset=pypi:chitchatt"], "pypi:chitchat"),
    ],
)
def test_foreseeable_errors_are_one_line(argv, words, tmp_path, tiny):
    stopped = command(f"--model_name_or_path={tiny / 'llama'}", f"--output_dir={tmp_path / 'run'}", *argv)
    assert stopped.returncode == 2 and words in stopped.stderr and "Traceback" not in stopped.stderr, stopped.stderr


def test_help_is_complete_and_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    shown = command("--help", PYTHONPATH=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    for option in (
        "--method",
        "--columns",
        "--dry_run",
        "--resume",
        "--learning_rate",
        "--gradient_accumulation_steps",
        "--max_length",
    ):
        assert f"\n  {option}\n" in shown.stdout


def test_dry_run_plans_and_writes_nothing(tiny, data, tmp_path):
    planned = command(
        *flags(tiny, data, tmp_path / "run"), "--dry_run", "--hardware=t4", "--fp16=true", "--method=qlora"
    )
    assert planned.returncode == 0, planned.stderr
    assert "on T4: about" in planned.stdout and "of 15 GB" in planned.stdout  # fp16, and no GPU here
    assert "steps 6" in planned.stdout and "minutes of training" in planned.stdout
    assert not (tmp_path / "run").exists()


def test_the_unigram_baseline_is_the_smoothed_share_of_each_token():
    found = packing.unigram_scores([[-100, 1, 1, 2], [5, -100, 3]], [[9, 1, -100, 3], [0, -100, 2]], vocabulary=4)
    # 4 trained tokens (1, 1, 2, 3) and 4 ids: shares (1, 3, 2, 2) / 8
    assert found["nll"] == pytest.approx([math.log(8 / 3) + math.log(4), math.log(4)])
    assert found["tokens"] == [2, 1] and found["correct"] == [1, 0]
