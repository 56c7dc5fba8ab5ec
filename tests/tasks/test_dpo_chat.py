"""tasks/dpo_chat: forms of preferences, what is dropped, the reference, a run from chat_sft's adapter, errors. Tiny models."""

import json
import re
import shutil
from functools import partial

import chat_model
import drawn_replies
import pairs
import preferences
import pytest
import task_runs
import torch
from checkout import ROOT, train_script
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shared import UserError
from shared.data.encoding import PlainText
from shared.inference.model import load
from shared.training.arguments import parse

dpo_chat = train_script("dpo_chat")
DPO = "trl.trainer.dpo_config:DPOConfig"
command = partial(task_runs.command, ROOT / "tasks" / "dpo_chat" / "train.py")


def turns(*said, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def run_main(argv):
    dpo_chat.main(*parse(dpo_chat.ScriptArguments, DPO, argv))


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    """120 pairs that a tiny model can tell apart: what is chosen ends in red, what is rejected in green."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"Colour of {i} {i * 7} {i * 13}?", "chosen": f"{i} red red", "rejected": f"{i} green green"}
        for i in range(120)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags(model, data, output, **options):
    options = {
        "model_name_or_path": model,
        "dataset": data,
        "output_dir": output,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        "learning_rate": 0.005,
        "warmup_steps": 0,
        "max_validation_rows": 4,
        "max_test_rows": 12,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


HH = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Cold?\n\nAssistant: "
TALK = turns("Hi?", "Hello.", "Cold?")


@pytest.mark.parametrize(
    ("row", "mapping", "prompt"),
    [
        ({"prompt": "Cold?", "chosen": "Yes.", "rejected": "No."}, [], turns("Cold?")),
        ({"question": "Cold?", "good": "Yes.", "bad": "No."}, ["prompt=question", "chosen=good", "rejected=bad"], None),
        (
            {
                "prompt": TALK,
                "chosen": turns("Yes.", roles=("assistant",)),
                "rejected": turns("No.", roles=("assistant",)),
            },
        )
        + ([], TALK),
        ({"prompt": "Cold?", "chosen": [*TALK, *turns("", "Yes.")[1:]], "rejected": [*TALK, *turns("", "No.")[1:]]},)
        + ([], TALK),
        ({"chosen": [*TALK, *turns("", "Yes.")[1:]], "rejected": [*TALK, *turns("", "No.")[1:]]}, [], TALK),
        ({"chosen": json.dumps(turns("Cold?", "Yes.")), "rejected": str(turns("Cold?", "No."))}, [], turns("Cold?")),
        ({"chosen": HH + "Yes.", "rejected": HH + "No."}, [], TALK),
        ({"prompt": HH, "chosen": "Yes.", "rejected": "No."}, [], TALK),
        ({"prompt": "\n\nHuman: Cold?", "chosen": "Yes.", "rejected": "No."}, [], turns("Cold?")),
        (
            {"prompt": "Cold?"}
            | {side: turns(said, roles=("assistant",))[0] for side, said in (("chosen", "Yes."), ("rejected", "No."))},
            [],
            turns("Cold?"),
        ),
        (
            {"ask": {"text": "Cold?"}, "replies": ["Yes.", "No."]},
            ["prompt=ask.text", "chosen=replies.0", "rejected=replies.1"],
            turns("Cold?"),
        ),
        ({"prompt": turns("Cold?", roles=("Customer",)), "chosen": "Yes.", "rejected": "No."}, [], turns("Cold?")),
        ({"system": "Be brief.", "prompt": "Cold?", "chosen": "Yes.", "rejected": "No."},)
        + ([], [{"role": "system", "content": "Be brief."}, *turns("Cold?")]),
        ({"system_prompt": "Be brief.", "prompt": "Cold?", "chosen": "Yes.", "rejected": "No."},)
        + ([], [{"role": "system", "content": "Be brief."}, *turns("Cold?")]),
        (
            {"instruction": "Cold?", "input": "It snows.", "chosen": "Yes.", "rejected": "No."},
            ["prompt=instruction"],
            turns("Cold?\n\nIt snows."),
        ),
        ({"input": "Cold?", "chosen": "Yes.", "rejected": "No."}, ["prompt=input"], turns("Cold?")),
        (
            {
                "conversations": [{"from": "human", "value": "Cold?"}],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            [],
            turns("Cold?"),
        ),
        (
            {"prompt": "Cold?", "input": "odd", "chosen": turns("Cold?", "Yes."), "rejected": turns("Cold?", "No.")},
            [],
            turns("Cold?"),
        ),
    ],
)
def test_forms_are_recognised(row, mapping, prompt):
    found = preferences.Reader("rows", row, list(row), mapping)(row)
    assert found == {"prompt": prompt or turns("Cold?"), "chosen": "Yes.", "rejected": "No."}


def test_whole_numbers_beside_empty_cells_are_whole():
    row = {"system": float("nan"), "prompt": 2.0, "chosen": 1700.0, "rejected": 1.5}
    found = preferences.Reader("rows", row, list(row), [])(row)
    assert found == {"prompt": turns("2"), "chosen": "1700", "rejected": "1.5"}
    empty = row | {"rejected": float("nan")}
    assert preferences.Reader("rows", row, list(row), [])(empty) == "bad: no rejected reply"
    product = row | {"chosen": 123456789 * 987654321}  # beyond what a float holds
    assert preferences.Reader("rows", row, list(row), [])(product)["chosen"] == "121932631112635269"


def test_empty_lines_in_a_fence_of_code_stay():
    row = {"prompt": "Go on:", "chosen": "A\n\n\n\nB\n```\nx\n\n\ny\n```", "rejected": "No."}
    assert preferences.Reader("rows", row, list(row), [])(row)["chosen"] == "A\n\nB\n```\nx\n\n\ny\n```"


def test_the_first_indentation_of_code_stays():
    row = {"prompt": "Go on:", "chosen": "    x = 1\n    y = 2\n", "rejected": " No."}
    found = preferences.Reader("rows", row, list(row), [])(row)
    assert (found["chosen"], found["rejected"]) == ("    x = 1\n    y = 2", "No.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "bad: no chosen reply"),
        ({"rejected": ""}, "bad: no rejected reply"),
        ({"rejected": "Yes."}, "bad: chosen = rejected"),
        ({"prompt": None}, "bad: no prompt"),
        ({"chosen": {"a": 1}}, "bad: wrong type"),
        (
            {"chosen": turns("Warm?", "Yes."), "rejected": turns("Cold?", "No.")},
            "bad: other prompts in chosen and rejected",
        ),
        (
            {"chosen": turns("Warm?", "Yes."), "rejected": turns("Warm?", "No.")},
            "bad: other prompts in chosen and rejected",
        ),
        ({"chosen": turns("Cold?", "Yes."), "rejected": "No."}, "bad: other prompts in chosen and rejected"),
        ({"chosen": turns("Cold?"), "rejected": turns("Cold?")}, "bad: the last turn is not the assistant's"),
        ({"chosen": turns("Cold?", "Yes.", roles=("user", "wizard"))}, "bad: unknown role"),
        ({"prompt": turns("Cold?", roles=("ann",))}, "bad: unknown role"),
        ({"chosen": ["Cold?", "Yes."]}, "bad: a turn without a role"),
        (
            {"chosen": {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}},
            "bad: thoughts apart from their reply",
        ),
    ],
)
def test_unusable_rows_are_named(change, reason):
    row = {"prompt": "Cold?", "chosen": "Yes.", "rejected": "No."}
    found = preferences.Reader("rows", row, list(row), [])(row | change)
    assert isinstance(found, str) and found.partition("\n")[0].partition(" (")[0] == reason


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "good": "b", "bad": "c"}, "--columns chosen=good rejected=bad"),
        ({"question": "Cold?", "chosen": "Yes.", "rejected": "No."}, "--columns prompt=question"),
        ({"messages": turns("Cold?", "Yes.")}, "--rejected loop"),
    ],
)
def test_missing_columns_say_found_expected_and_how_to_map(row, words):
    with pytest.raises(UserError, match=words):
        preferences.Reader("rows", row, list(row), [])


def test_conversations_become_pairs_by_a_stated_rule():
    """The second reply is chosen, its first words in a loop rejected; two people are user and assistant."""
    talk = [("ann", "hi"), ("bob", "hello you"), ("ann", "cold?"), ("bob", "very"), ("bob", "very cold"), ("ann", "oh")]
    row = {"conversations": [{"from": who, "value": text} for who, text in [*talk, ("bob", " ")]]}
    read = preferences.Reader("rows", row, ["conversations"], [], "loop")
    loop = "very very cold very very cold very very cold very very cold"
    assert read(row) == {"prompt": turns("hi", "hello you", "cold?"), "chosen": "very\nvery cold", "rejected": loop}
    assert drawn_replies.loops(loop) and read({"conversations": row["conversations"][:1]}) == "no reply"
    assert read({"conversations": row["conversations"][:2]}) == "a reply of fewer than three words"
    three = [*row["conversations"], {"from": "cat", "value": "me too"}]
    assert read({"conversations": three}).startswith("more than two speakers")


def test_tokens_are_the_templates_and_text_stays_text(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    encoder = pairs.PairEncoder(tokenizer)
    row = {"prompt": turns("Hi?", "Hello.", "Cold?"), "chosen": "Yes <|im_end|> it is.", "rejected": "No."}
    found = encoder.tokenize(row, 256)
    assert found["prompt_ids"] == tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(found["rejected_ids"]) == "No.<|im_end|>" and found["useful"] and not found["truncated"]
    assert found["chosen_ids"].count(encoder.stop) == 1 and found["chosen_ids"][-1] == encoder.stop
    cut = encoder.tokenize(row, len(found["prompt_ids"]) + 1)
    assert cut["truncated"] and len(cut["chosen_ids"]) == 1
    assert not encoder.tokenize(row, len(found["prompt_ids"]))["useful"]


def test_a_reply_that_is_one_token_with_the_end_of_the_prompt(tiny):
    """A template without a token in front of the reply: both texts share what is the same in both, and nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    encoder = pairs.PairEncoder(tokenizer)
    found = encoder.tokenize({"prompt": turns("Cold?"), "chosen": ":) yes", "rejected": "No."}, 256)
    texts = [tokenizer.decode(found["prompt_ids"] + found[f"{side}_ids"]) for side in ("chosen", "rejected")]
    end = tokenizer.eos_token
    assert texts == [f"user:Cold?{end}assistant:{said}{end}" for said in (":) yes", "No.")] and found["useful"]
    assert found["chosen_ids"][0] != found["rejected_ids"][0]


def test_thoughts_that_the_template_cuts_off_are_not_dropped_in_silence(tiny, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    shown = "m['content'].split('</think>')[-1]"
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + " + shown
    tokenizer.chat_template += " + '<|im_end|>' }}{% endfor %}"
    row = {"prompt": turns("Cold?"), "chosen": "Yes.", "rejected": "No."}
    encoder = pairs.PairEncoder(tokenizer)
    assert encoder.fit(row) == row
    assert encoder.fit(row | {"rejected": "<think>Hm.</think>No."}).startswith("bad: a reply whose beginning")
    assert "behind its own prompt" not in caplog.text
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    assert pairs.PairEncoder(tokenizer).fit(row) == row and "behind its own prompt" in caplog.text
    tokenizer.chat_template, tokenizer.eos_token = "{% for m in messages %}{{ m['content'] }}{% endfor %}", None
    with pytest.raises(UserError, match="neither the chat template nor the tokenizer has a token that ends a reply"):
        pairs.PairEncoder(tokenizer)


def test_a_loop_is_counted():
    assert drawn_replies.loops("a b c d " * 3) and not drawn_replies.loops("a b c d " * 2)


@pytest.fixture(scope="module")
def finished(tiny, pair_file, tmp_path_factory):
    """A run of six steps on the tiny model, and its folder."""
    run = tmp_path_factory.mktemp("dpo") / "run"
    run_main(flags(tiny / "llama", pair_file, run))
    return run


def test_a_run_prefers_what_was_chosen_and_is_served(finished):
    results = json.loads((finished / "all_results.json").read_text())
    assert results["base_reward_margin"] == 0 and results["test_reward_margin"] > 0
    assert results["test_accuracy"] >= results["base_accuracy"] and results["margin_difference_ci95"][0] > 0
    for name in ("accuracy", "margin", "perplexity", "replies_that_end", "replies_that_loop"):
        assert {f"base_{name}", f"test_{name}"} <= results.keys()
    assert results["test_tokens"] > 2 * results["test_rows"], "shared.compare tells by them that rows were cut"
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    logged = [entry["loss"] for entry in history if "loss" in entry]
    assert logged[0] == pytest.approx(0.6931, abs=1e-3) and logged[-1] < logged[0] - 0.05
    assert any("eval_rewards/accuracies" in entry for entry in history)
    card = (finished / "README.md").read_text()
    assert (
        "Chosen reply preferred" in card and "Did it help? Yes: test margin" in card and "baseline longer reply" in card
    )
    assert "%" not in re.search(r"test margin \S+ -> \S+ \((.*?) interval", card)[1].replace("95 %", "")
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 3, 6]
    scores = json.loads((finished / "scores.json").read_text())
    assert scores["metric"] == "margin" and len(scores["score"]) == results["test_rows"] == 12
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "reference", "rejected", "base", "trained"} <= sample.keys()
    assert not (finished / "ref").exists() and (finished / "test.jsonl").exists()

    model = load(finished)
    assert model.task == "text-generation" and set(model.stop_ids) >= {2}
    chat = [{"role": "user", "content": "Colour of 3?"}]
    ids = AutoTokenizer.from_pretrained(finished).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert len(model.generate([ids], max_new_tokens=3)) == 1
    loaded = {}
    lines = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("outputs/run", str(finished))
    exec(lines.replace("=128", "=8, do_sample=False, repetition_penalty=1.0"), loaded)
    plain, served = PlainText(loaded["tokenizer"]), loaded["served"]
    assert served.do_sample and served.temperature == 0.7
    greedy, _ = drawn_replies.draw(loaded["model"].eval(), plain, [loaded["chat"]], served, 8, greedy=True)
    new = loaded["reply"][0, loaded["ids"].shape[1] :]
    assert greedy == [loaded["tokenizer"].decode(new, skip_special_tokens=True).strip()]
    learned = load_file(finished / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name and tensor.any() for name, tensor in learned.items())


def test_it_goes_on_from_an_adapter_which_stays_the_reference(finished, tiny, pair_file, tmp_path, capsys):
    """What chat_sft leaves: the new run starts as good as the old one ended, changes a copy, and is resumed so."""
    old, run = json.loads((finished / "all_results.json").read_text()), tmp_path / "on"
    argv = flags(finished, pair_file, run, save_total_limit=2)
    run_main([*argv, "--dry_run", "--hardware=t4"])
    assert not run.exists() and "parameters trained 0 " not in capsys.readouterr().out
    run_main(argv)
    new = json.loads((run / "all_results.json").read_text())
    for name in ("accuracy", "perplexity"):
        assert new[f"base_{name}"] == pytest.approx(old[f"test_{name}"], rel=1e-3)
    assert new["test_reward_margin"] > 0 and "goes on from" in (run / "README.md").read_text()
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny / "llama") and config["r"] == 16
    assert load(run).task == "text-generation"
    learned = load_file(run / "adapter_model.safetensors")
    (run / "checkpoint-6").rename(tmp_path / "away")
    (run / "all_results.json").unlink()
    run_main(argv)
    again = load_file(run / "adapter_model.safetensors")
    assert learned.keys() == again.keys() and not any("ref" in name.split(".") for name in again)
    for name, tensor in learned.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-7)
    assert json.loads((run / "all_results.json").read_text())["base_margin"] == pytest.approx(new["base_margin"])
    for option, words in (({"lora_r": 4}, "--lora_r 4: the adapter of .* has 16"), ({"beta": 0.5}, "beta: 0.1 then")):
        with pytest.raises(UserError, match=words):
            run_main(flags(finished, pair_file, run, **option))


def test_the_reference_may_be_computed_once(finished, tiny, pair_file, tmp_path):
    """trl's precomputed log-probabilities: the same losses as with a reference that reads each batch."""
    run_main(flags(tiny / "llama", pair_file, tmp_path / "run", precompute_ref_log_probs=True))
    ours, theirs = (task_runs.losses(run) for run in (tmp_path / "run", finished))
    assert ours == pytest.approx(theirs, rel=1e-3) and len(theirs) == 6


def test_scores_are_those_of_the_whole_logits(tiny, tmp_path):
    """What is computed at trained positions alone is what the model's own logits say, and what trl's head says."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    encoder = pairs.PairEncoder(tokenizer)
    texts = [("Cold?", "Yes.", "No, not at all."), ("A longer question, is it?", "It may be one.", "No.")]
    rows = [encoder.tokenize({"prompt": turns(p), "chosen": c, "rejected": r}, 256) for p, c, r in texts]
    model, args = (
        AutoModelForCausalLM.from_pretrained(tiny / "llama"),
        DPOConfig(str(tmp_path), bf16=False, use_cpu=True),
    )
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    batch = collator(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = model(**inputs, labels=labels, fused_lm_head=True)
        pairs.score_replies_only(model)
        ours = model(**inputs, labels=labels, fused_lm_head=True)
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["is_top1"], theirs["is_top1"])
    scores = pairs.score_pairs(model, Dataset.from_list(rows), collator, args, "test")
    for i, (row, side) in enumerate([(row, side) for side in ("chosen", "rejected") for row in rows]):
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        n = len(row[f"{side}_ids"])
        expected = logs.gather(1, ids[0, 1:, None])[-n:].sum().item()
        assert scores[side][i % 2] == pytest.approx(expected, rel=1e-4) and scores[f"{side}_tokens"][i % 2] == n


def test_four_bits_train_too(tiny, pair_file, tmp_path):
    run_main(flags(tiny / "llama", pair_file, tmp_path / "run", method="qlora", max_steps=2, max_test_rows=2))
    learned = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in learned.items() if "lora_B" in name)
    assert all(tensor.dtype == torch.float32 for tensor in learned.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "aot"}, "--loss_type aot: its value depends on which pairs share a micro-batch"),
        ({"disable_dropout": False}, "--disable_dropout False: not obeyed"),
        ({"label_smoothing": 0.2}, "read with --loss_type exo_pair or --loss_type robust only"),
        ({"discopop_tau": 0.2}, "read with --loss_type discopop only"),
        ({"f_alpha_divergence_coef": 0.9}, "read with --f_divergence_type alpha_divergence only"),
        ({"precompute_ref_batch_size": 2}, "read with --precompute_ref_log_probs true only"),
        ({"loss_type": "sigmoit"}, "--loss_type sigmoit: no such loss. Known: .*sigmoid,"),
        ({"loss_type": "exo_pair"}, "--label_smoothing 0.0: exo_pair needs some"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust less than 0.5"),
        ({"f_divergence_type": "tv"}, "--f_divergence_type tv: not known"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "does not go with --loss_type nca_pair"),
        ({"neftune_noise_alpha": 5.0}, "the reference would get noise, too"),
        ({"rejected": "loop"}, "expected messages"),
        ({"max_length": 4}, "none of .* train rows has two replies that differ within --max_length 4"),
    ],
)
def test_what_would_be_half_done_is_refused(options, words, tiny, pair_file, tmp_path):
    with pytest.raises(UserError, match=words):
        run_main(flags(tiny / "llama", pair_file, tmp_path / "run", **options))


def test_a_model_that_does_not_chat_is_refused(tiny, pair_file, tmp_path):
    with pytest.raises(UserError, match="no chat template, so no chat model"):
        run_main(flags(tiny / "gpt2", pair_file, tmp_path / "run"))


def test_a_token_without_an_embedding_may_not_be_used(tiny, pair_file, tmp_path):
    """A tokenizer may have more tokens than the model embeddings, as long as neither rows nor padding have one of those."""
    shutil.copytree(tiny / "llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<unused>"])
    tokenizer.save_pretrained(tmp_path / "base")
    run_main([*flags(tmp_path / "base", pair_file, tmp_path / "run"), "--dry_run"])
    tokenizer.pad_token = "<unused>"
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="its tokenizer has 49,153 tokens, the model 49,152 embeddings"):
        run_main([*flags(tmp_path / "base", pair_file, tmp_path / "run"), "--dry_run"])


def test_splits_of_preferences_are_taken_before_others(tiny, pair_file, tmp_path):
    """As UltraFeedback: train_prefs and test_prefs beside splits for other methods."""
    rows = [json.loads(line) for line in pair_file.read_text().splitlines()]
    parts = {"train_prefs": rows[:100], "test_prefs": rows[100:], "train_gen": [{"text": "other"}]}
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(tmp_path / "data")
    _, args, run_args = parse(dpo_chat.ScriptArguments, DPO, flags(tiny / "llama", tmp_path / "data", tmp_path / "run"))
    splits, _ = dpo_chat.load_rows(run_args, args.seed)
    assert {name: len(part) for name, part in splits.items()} == {"train": 90, "validation": 10, "test": 20}


def test_malformed_rows_over_five_percent_stop_the_run(tiny, pair_file, tmp_path):
    rows = [json.loads(line) for line in pair_file.read_text().splitlines()]
    for row in rows[:10]:
        row["rejected"] = row["chosen"]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"10 of 120 rows are unusable[\s\S]*chosen = rejected"):
        run_main(flags(tiny / "llama", tmp_path / "bad.jsonl", tmp_path / "run"))


def test_the_plan_counts_both_texts_of_a_pair(tiny, pair_file, tmp_path, capsys):
    run_main([*flags(tiny / "llama", pair_file, tmp_path / "run"), "--dry_run"])
    shown = capsys.readouterr().out
    assert "rows 96" in shown and "parameters trained" in shown and not (tmp_path / "run").exists()


def test_an_adapter_that_changes_the_head_is_refused(finished, tmp_path):
    config = json.loads((finished / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its adapter also changes lm_head, which the reference cannot switch off"):
        chat_model.base_of(tmp_path, dpo_chat.ScriptArguments(), DPOConfig(str(tmp_path), bf16=False), {})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "qlora"}, "--method qlora"),
        ({"precompute_ref_log_probs": True}, "--precompute_ref_log_probs"),
        ({}, "an adapter that goes on"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options, what, finished, pair_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_chat, "setup", lambda *_: monkeypatch.setenv("ACCELERATE_USE_FSDP", "true"))
    with pytest.raises(UserError, match=f"{what} does not go with FSDP"):
        run_main(flags(finished, pair_file, tmp_path / "run", **options))


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2})
    )
    with pytest.raises(UserError, match="an adapter of type P_TUNING"):
        chat_model.base_of(tmp_path, dpo_chat.ScriptArguments(), DPOConfig(str(tmp_path), bf16=False), {})
