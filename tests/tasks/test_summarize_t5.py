"""tasks/summarize_t5: columns, cuts, decoder start, fp16, generation, end to end for T5 and BART, resume, errors. Tiny models."""

import gc
import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from functools import partial

import articles
import numpy as np
import pytest
import seq2seq_models
import task_runs
import torch
from checkout import ROOT, train_script
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LEDConfig,
    LEDForConditionalGeneration,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from warm_start import bart_from_bert

from shared import UserError
from shared.training.arguments import parse

summarize_t5 = train_script("summarize_t5")
TASK = ROOT / "tasks" / "summarize_t5"
SEQ2SEQ = "transformers.training_args_seq2seq:Seq2SeqTrainingArguments"
COLOURS = ("red", "green", "blue")
ROWS = [
    {
        "document": f"Box {i} was opened on day {i * 7}. It is {COLOURS[i % 3]}." + " Nothing else was seen." * (i % 9),
        "summary": f"It is {COLOURS[i % 3]}.",
    }
    for i in range(150)
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """150 rows that a tiny model can learn: the colour is in the document."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders of a tiny T5, a gated one as in v1.1, and a tiny BART, with tokenizers as theirs and random weights."""
    from tokenizers import ByteLevelBPETokenizer, processors

    folder, texts = tmp_path_factory.mktemp("small"), [" ".join(row.values()) for row in ROWS]
    unnamed = Namespace(scratch_width=64, max_target_length=12, max_source_length=64)
    args = Seq2SeqTrainingArguments(output_dir=str(folder), bf16=False)
    tokenizer = seq2seq_models.load_tokenizer(None, iter(texts), 300)
    t5 = seq2seq_models.load_model(None, tokenizer, unnamed, args)
    t5.save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names).save_pretrained(folder / "bart")
    torch.manual_seed(0)
    bart = BartConfig(
        vocab_size=400,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=128,
        forced_bos_token_id=0,
    )
    BartForConditionalGeneration(bart).save_pretrained(folder / "bart")
    return folder


def flags(data, output, **options):
    options = {
        "config": TASK / "configs" / "laptop_scratch.yaml",
        "dataset": data,
        "output_dir": output,
        "max_source_length": 64,
        "max_target_length": 12,
        "scratch_width": 64,
        "scratch_vocab_size": 300,
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


def run_main(argv):
    summarize_t5.main(*parse(summarize_t5.ScriptArguments, SEQ2SEQ, argv))


command = partial(task_runs.command, TASK / "train.py")


# Data


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"id": "1", "article": "A long text.", "highlights": "Short."}, []),
        ({"document": "A long text.", "summary": "Short.", "id": "1"}, []),
        ({"id": "1", "dialogue": "A long text.", "summary": "Short."}, []),
        ({"source": ["A long", "text."], "target": ["Short."]}, []),
        ({"body": "A long text.", "title": "Short."}, ["document=body", "summary=title"]),
        ({"dialogue": "A long text.", "section_text": "Short."}, ["summary=section_text"]),
        ({"document": "no", "summary": "no", "x": "A long text.", "y": "Short."}, ["document=x", "summary=y"]),
    ],
)
def test_columns_are_recognised_or_mapped(row, mapping):
    places = articles.find_columns("mine", list(row), mapping, row)
    assert articles.to_pair(row, *places) == {"document": "A long text.", "summaries": ["Short."]}


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (["document=body", "summary=head.title"], "head.title lies inside the column head"),
        (["document=body"], "--columns document=body summary=\\.\\.\\."),
    ],
)
def test_a_mapping_that_is_not_enough_is_kept_in_the_hint(mapping, said):
    row = {"text": "A long text.", "body": "Another.", "head": {"title": "x"}}
    with pytest.raises(UserError, match=said):
        articles.find_columns("mine", list(row), mapping, row)


def test_several_references_stay_several_and_bad_ones_go():
    row = {"source": ["One.", None, "vÃ©."], "target": ["first", None, " ", "second"]}
    assert articles.to_pair(row, "source", "target") == {"document": "One. vé.", "summaries": ["first", "second"]}


@pytest.mark.parametrize("write", [str, json.dumps])
def test_lists_in_cells_of_a_table_are_lists(write, caplog):
    """Exports of SciTLDR and the like; brackets and quotation marks were learnt as words."""
    caplog.set_level("INFO", "taskbook")
    row = {"source": write(["It's one.", "Two, three."]), "target": write(["first", "second"])}
    assert articles.find_columns("mine", list(row), [], row) == ("source", "target")
    assert "of several summaries the first is learnt" in caplog.text
    found = articles.to_pair(row, "source", "target")
    assert found == {"document": "It's one. Two, three.", "summaries": ["first", "second"]}


@pytest.mark.parametrize(
    ("document", "summary", "reason"),
    [
        ("x", "['a'\n 'b']", "bad: a list as text, without commas\ns = \"['a'\\n 'b']\""),
        ([{"speaker": "a"}], "x", "bad: document wrong type\nd = [{'speaker': 'a'}]"),
        (None, "x", "bad: document missing"),
        ("x", None, "bad: summary missing"),
        ("x", [], "bad: summary missing"),
        (" ", "x", "bad: document empty"),
        ("x", ["", " "], "bad: summary empty"),
        (3, "x", "bad: document wrong type\nd = 3"),
        ("x", [b"x"], "bad: summary wrong type\ns = b'x'"),
        ("\x00\x01\x02x", "x", "bad: document control characters"),
    ],
)
def test_unusable_rows_are_named(document, summary, reason):
    assert articles.to_pair({"d": document, "s": summary}, "d", "s") == reason


def test_both_ends_are_cut_and_keep_their_end_token(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "t5")
    rows = {"document": ["It is red. " * 30, "It is red."], "summaries": [["It is red. " * 9, "no"], ["It is red."]]}
    found = articles.tokenize(rows, tokenizer, "summarize: ", 20, 10)
    assert [len(ids) for ids in found["input_ids"]] == found["length"] and found["length"][0] == 20
    assert all(ids[-1] == tokenizer.eos_token_id for ids in found["input_ids"] + found["labels"])
    assert len(found["labels"][0]) == 10 and found["summary_tokens"][0] == 28 and found["document_tokens"][0] > 60
    assert tokenizer.decode(found["input_ids"][1], skip_special_tokens=True) == "summarize: It is red."
    assert tokenizer.decode(found["labels"][1], skip_special_tokens=True) == "It is red."


def test_preflight_counts_cuts_and_padding():
    from datasets import Dataset

    rows = {
        "length": [10, 2, 10, 2] * 20,
        "labels": [[1] * 4] * 80,
        "document_tokens": [30, 2, 10, 2] * 20,
        "summary_tokens": [4, 4, 4, 8] * 20,
    }
    args = Seq2SeqTrainingArguments(
        output_dir="x", per_device_train_batch_size=2, train_sampling_strategy="group_by_length", bf16=False
    )
    facts = articles.preflight(Dataset.from_dict(rows), args)
    assert facts["documents_cut_share"] == 0.25 and facts["summaries_cut_share"] == 0.25
    assert facts["document_tokens_lost_share"] == round(20 / 44, 4)
    assert facts["rows"] == 80 and facts["tokens"] == 800 and facts["supervised_share"] == 0.4
    assert facts["padding_share"] < 0.05 < 0.1 < facts["padding_share_in_random_order"]
    # Batches (10, 2), (10, 2), ... with 4 labels each: 40 of 56 positions are filled
    expected = 1 - 40 / (2 * 2 * 14)
    source, target = np.array(rows["length"]), np.array([4] * 80)
    assert articles.padding_share(source, target, args, "sequential") == pytest.approx(expected)


def test_pieces_hold_every_sentence_and_fit(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "bart")
    document = " ".join(f"Box {i} is {COLOURS[i % 3]}." for i in range(40))
    found = articles.pieces(document, tokenizer, 50)
    assert " ".join(found) == document and len(found) > 3
    assert all(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) <= 50 for piece in found)
    assert all(piece.endswith(".") for piece in found)
    assert articles.pieces("One sentence. Two.", tokenizer, 50) == ["One sentence. Two."]


def test_lead_and_novel_bigrams_have_known_answers():
    document = "Dr. Smith came in. He sat down.\nThen he left. Nobody saw it."
    assert articles.lead(document, 1) == "Dr. Smith came in."
    assert articles.lead(document, 3) == "Dr. Smith came in.\nHe sat down.\nThen he left."
    assert articles.novel_bigrams("He sat up, then he left", document) == (2, 5)  # "sat up", "up then"
    assert articles.novel_bigrams("", document) == (0, 0)


def test_metrics_count_all_references():
    found, rows = summarize_t5.compute_metrics(
        ["the cat sat", ""], ["the cat sat here", "dogs"], [["a dog ran", "the cat sat"], ["dogs"]]
    )
    assert rows["rougeL"] == [100, 0] and found["rouge1"] == 50
    assert found["empty_outputs"] == 0.5 and found["novel_bigrams"] == 0 and found["summary_words"] == 1.5
    assert "bleu_signature" in found


# Model


@pytest.mark.parametrize(("name", "start", "prefix"), [("t5", 0, "summarize: "), ("bart", 2, "")])
def test_decoder_starts_as_the_model_expects_and_padding_is_not_learnt(small, name, start, prefix):
    tokenizer = AutoTokenizer.from_pretrained(small / name)
    model = AutoModelForSeq2SeqLM.from_pretrained(small / name)
    assert seq2seq_models.prefix_of(model) == prefix
    rows = articles.tokenize(
        {"document": ["Box one.", "Box."], "summaries": [["It is red."], ["It"]]}, tokenizer, prefix, 64, 12
    )
    features = [{key: rows[key][i] for key in ("input_ids", "attention_mask", "labels")} for i in range(2)]
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(features)
    labels, decoder = batch["labels"], batch["decoder_input_ids"]
    assert decoder[:, 0].tolist() == [start, start] and model.config.decoder_start_token_id == start
    missing = len(rows["labels"][0]) - len(rows["labels"][1])
    assert missing > 0 and labels[1, -missing:].tolist() == [-100] * missing
    shifted = torch.where(labels == -100, tokenizer.pad_token_id, labels)[:, :-1]
    assert torch.equal(decoder[:, 1:], shifted)
    with torch.no_grad():
        ours = seq2seq_models.token_loss(model(**{k: v for k, v in batch.items() if k != "labels"}), labels)
        assert ours.item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)


def test_loss_weighs_tokens_not_micro_batches_and_stops_at_nan(small):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 20), torch.randint(20, (2, 6))
    labels[1, 1:] = -100
    whole = seq2seq_models.token_loss({"logits": logits}, labels)
    parts = [seq2seq_models.token_loss({"logits": logits[i : i + 1]}, labels[i : i + 1], 7) for i in range(2)]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)
    logits[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="The loss became nan; this optimizer step was not made"):
        seq2seq_models.token_loss({"logits": logits}, labels)


def test_a_bart_from_a_bert_reads_like_it_and_learns_in_its_decoder_only(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model, bert = bart_from_bert(str(tiny_bert), tokenizer, decoder_layers=1), AutoModel.from_pretrained(tiny_bert)
    ids = tokenizer(["What is it?", "It is a red box."], padding=True, return_tensors="pt")
    inputs = {name: ids[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = model.eval().model.encoder(**inputs)[0], bert.eval()(**inputs)[0]
    inside = inputs["attention_mask"].bool()
    assert torch.allclose(ours[inside], theirs[inside], atol=1e-3) and ours.std() > 0.1
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()(**inputs, labels=ids["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".encoder." not in name}


@pytest.mark.parametrize(("activation", "scale"), [("relu", 300), ("gated-gelu", 60)])
def test_fp16_overflows_plainly_and_not_with_fp32_feed_forward(small, activation, scale):
    """Feed-forward activations scaled beyond 65,504, as T5's are: fp16 autocast gives infinity, ours what fp32 gives."""
    config = AutoModelForSeq2SeqLM.from_pretrained(small / "t5").config
    config.feed_forward_proj = activation
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k not in ("dense_act_fn", "is_gated_act")})
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    layers = [module for name, module in model.named_modules() if name.endswith("DenseReluDense")]
    largest = []
    with torch.no_grad():
        for layer in layers:
            for weight in layer.parameters():
                weight *= scale
            layer.register_forward_hook(lambda module, inputs, out: largest.append(out.abs().max().item()))
    batch = {"input_ids": torch.arange(3, 40)[None], "labels": torch.arange(3, 12)[None]}
    with torch.no_grad():
        exact = model(**batch)
        assert 65504 < max(largest) < float("inf")
        with torch.autocast("cpu", torch.float16):
            plain = model(**batch)
        assert not torch.isfinite(plain.logits).all() and not torch.isfinite(plain.loss)
        seq2seq_models.keep_feed_forward_in_fp32(model, "cpu")
        largest.clear()
        with torch.autocast("cpu", torch.float16):
            ours = model(**batch)
        assert max(largest) > 65504 and np.isfinite(largest).all()
        assert torch.isfinite(ours.logits).all() and ours.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    with torch.autocast("cpu", torch.float16):
        seq2seq_models.token_loss(model(**batch), batch["labels"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_fp16_runs_of_a_t5_are_protected_and_of_bart_need_not_be(small):
    """`load_model` itself does it, so that no recipe can forget it."""
    script_args = Namespace(max_source_length=64, max_target_length=12, scratch_width=64)
    args = Namespace(fp16=True, fsdp=None, seed=1, generation_num_beams=1, device=torch.device("cpu"))
    for name in ("t5", "bart"):
        tokenizer = AutoTokenizer.from_pretrained(small / name)
        model = seq2seq_models.load_model(str(small / name), tokenizer, script_args, args)
        with torch.autocast("cpu", torch.float16):
            kinds = {
                module(torch.zeros(1, 1, 64)).dtype
                for path, module in model.named_modules()
                if path.endswith(("DenseReluDense", "fc1"))
            }
        assert kinds == {torch.float32 if name == "t5" else torch.float16}
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_summaries_keep_order_and_memory(small):
    """Batches are sorted by length inside; what is alive when the last batch starts does not grow with the rows."""
    tokenizer = AutoTokenizer.from_pretrained(small / "t5")
    script_args = Namespace(max_source_length=64, max_target_length=12, scratch_width=64, long_documents="cut")
    args = Seq2SeqTrainingArguments(
        output_dir="x", per_device_eval_batch_size=4, disable_tqdm=True, bf16=False, generation_num_beams=2
    )
    model = seq2seq_models.load_model(str(small / "t5"), tokenizer, script_args, args).eval()
    model.generation_config.suppress_tokens = [0, 1, 2]  # random weights would say nothing
    alive, sizes, generate = [], [], model.generate

    def watched(**inputs):
        if len(sizes) % 9 == 1:
            gc.collect()
            alive.append(sum(it.numel() for it in gc.get_objects() if issubclass(type(it), torch.Tensor)))
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    model.generate = watched
    documents = [row["document"] for row in ROWS]
    texts = seq2seq_models.summarize(model, tokenizer, documents, script_args, args)
    assert max(sizes) == 4 and len(texts) == len(documents) and all(isinstance(text, str) and text for text in texts)
    assert len(alive) == 5 and max(alive) - min(alive) < 9 * 4 * 12  # ids of nine batches: none was left behind
    del model.generate
    alone = [seq2seq_models.summarize(model, tokenizer, [document], script_args, args)[0] for document in documents[:6]]
    assert texts[:6] == alone


@pytest.mark.parametrize(
    ("settings", "summaries", "kept"),
    [
        ({"min_length": 16}, [[5, 6, 7]] * 9, (None, None)),
        ({"min_length": 3}, [[5, 6, 7]] * 9, (3, None)),
        ({"min_length": 56, "no_repeat_ngram_size": 3}, [[5, 6, 7, 5, 6, 7]] * 9, (None, None)),
        ({"no_repeat_ngram_size": 3}, [[5, 6, 7, 5, 6, 8]] * 9, (None, 3)),
        ({"no_repeat_ngram_size": 3}, [[*range(9)]] * 99 + [[5, 6, 7] * 3], (None, 3)),
        ({}, [[5, 5, 5]] * 9, (None, None)),
    ],
)
def test_a_base_must_not_forbid_summaries_like_those_it_learns(settings, summaries, kept):
    settings = GenerationConfig(**settings)
    articles.allow_such_summaries(settings, summaries)
    assert (settings.min_length or None, settings.no_repeat_ngram_size or None) == kept


def test_a_run_from_a_base_for_long_summaries_writes_short_ones(small, pairs, tmp_path):
    """As facebook/bart-large-cnn: its shortest summary is longer than these."""
    shutil.copytree(small / "bart", tmp_path / "base")
    settings = GenerationConfig.from_pretrained(tmp_path / "base")
    settings.min_length, settings.no_repeat_ngram_size = 11, 3
    settings.num_beams = settings.num_return_sequences = (
        2  # several of each would be taken for those of other documents
    )
    settings.save_pretrained(tmp_path / "base")
    options = {"max_steps": 1, "max_test_rows": 2, "max_train_rows": 16, "max_validation_rows": 2}
    run_main(flags(pairs, tmp_path / "run", model_name_or_path=tmp_path / "base", **options))
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert not saved.get("min_length") and saved["no_repeat_ngram_size"] == 3
    assert saved.get("num_return_sequences", 1) == 1


def test_chunks_are_summarized_one_by_one_and_joined(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "t5")
    args = Seq2SeqTrainingArguments(output_dir="x", per_device_eval_batch_size=3, disable_tqdm=True, bf16=False)
    script_args = Namespace(max_source_length=32, max_target_length=6, scratch_width=64, long_documents="chunk")
    model = seq2seq_models.load_model(str(small / "t5"), tokenizer, script_args, args)
    model.generation_config.suppress_tokens = [0, 1, 2]  # random weights would say nothing
    document = " ".join(f"Box {i} was opened on day {i}." for i in range(12))
    room = 32 - len(tokenizer("summarize: ")["input_ids"])
    split = articles.pieces(document, tokenizer, room)
    assert len(split) > 2
    chunked = seq2seq_models.summarize(model, tokenizer, ["Box.", document], script_args, args)
    parts = [seq2seq_models.summarize(model, tokenizer, [piece], script_args, args)[0] for piece in split]
    assert chunked[1] == " ".join(parts) and all(parts)
    script_args.long_documents = "cut"
    assert seq2seq_models.summarize(model, tokenizer, [document], script_args, args)[0] != chunked[1]


def test_the_tokenizer_of_a_run_from_scratch_is_always_the_same():
    texts = [" ".join(row.values()) for row in ROWS]
    built = [seq2seq_models.load_tokenizer(None, iter(texts), 300).backend_tokenizer.to_str() for _ in range(3)]
    assert built[0] == built[1] == built[2]


# Runs


@pytest.mark.parametrize("name", ["scratch", "t5", "bart", "bert"])
def test_each_model_learns_and_reloads_to_the_same_summaries(small, tiny_bert, pairs, tmp_path, name):
    from safetensors.torch import load_file

    run, named = tmp_path / "run", {"model_name_or_path": tiny_bert if name == "bert" else small / name}
    named = {} if name == "scratch" else named
    run_main(
        flags(
            pairs,
            run,
            max_steps=60,
            eval_steps=30,
            save_steps=60,
            learning_rate=0.003,
            generation_num_beams=2,
            **named,
        )
    )
    results = json.loads((run / "all_results.json").read_text())
    assert results["test_loss"] < results["base_loss"] / 2 and results["test_rougeL"] > results["base_rougeL"] + 20
    assert results["test_rougeL_ci95"][0] <= results["test_rougeL"] <= results["test_rougeL_ci95"][1]
    for key in ("rouge1", "rouge2", "rougeLsum", "bleu", "summary_words", "novel_bigrams", "empty_outputs"):
        assert f"test_{key}" in results and f"base_{key}" in results and f"baseline_lead1_{key}" in results
    rows = [json.loads(line) for line in (run / "test.jsonl").read_text().splitlines()]
    assert results["test_tokens"] >= len(rows) == 15, "shared.compare tells by them that rows were cut"
    assert results["test_rows"] == 15 and results["test_bleu_signature"].startswith("nrefs:1|")
    card = (run / "README.md").read_text()
    assert "Did it help?" in card and "Lead-1" in card and "Lead-3" in card and str(tmp_path) not in card
    assert (summarize_t5.NO_SUMMARIZER in card) == (name == "scratch")
    assert not (run / "training_args.bin").exists() and (run / "loss.png").stat().st_size > 0
    if name in ("t5", "bart"):
        before, after = load_file(small / name / "model.safetensors"), load_file(run / "model.safetensors")
        still = {key for key in before if key in after and torch.equal(before[key], after[key])}
        assert still <= {"final_logits_bias", "lm_head.weight"}
    expected = (
        None if name in ("bart", "bert") else {"summarization": {"prefix": "summarize: "}}
    )  # for whoever serves the model
    assert json.loads((run / "config.json").read_text()).get("task_specific_params") == expected
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 15
    prefix, loaded = "" if name in ("bart", "bert") else "summarize: ", {}
    lines = seq2seq_models.usage(str(run), prefix, 64)
    assert lines.replace(str(run), f"outputs/{run.name}") in card
    exec(lines.replace('"..."', repr(samples[0]["prompt"])).replace("print(", "text = ("), loaded)
    assert loaded["text"].strip() == samples[0]["trained"]


def test_the_validation_is_measured_as_the_test_split_whatever_its_batches(small, tmp_path):
    """Of summaries of unequal length batches of one row gave another loss; a model that writes kept upstream's defaults."""
    rows = [row | {"summary": row["summary"] + " Nothing else was seen." * (i % 3)} for i, row in enumerate(ROWS)]
    files = {}
    for name, part in (("train", rows[:100]), ("validation", rows[100:112]), ("test", rows[100:112])):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(map(json.dumps, part)))
    options = {"validation_file": files["validation"], "test_file": files["test"], "model_name_or_path": small / "t5"}
    options |= {"metric_for_best_model": "rougeL", "max_steps": 2, "eval_steps": 1, "label_smoothing_factor": 0.1}
    settings = []
    for size, generate in ((1, True), (8, True), (5, False)):
        run, more = tmp_path / f"{size}", {"per_device_eval_batch_size": size, "predict_with_generate": generate}
        more |= {} if generate else {"metric_for_best_model": "perplexity"}
        run_main(flags(files["train"], run, **options | more))
        results = json.loads((run / "all_results.json").read_text())
        for name in ("loss", "perplexity", *(["rougeL", "rouge1"] if generate else [])):
            evaluated = task_runs.logged(run, f"eval_{name}")
            assert sorted(evaluated) == [0, 1, 2]
            assert evaluated[2] == pytest.approx(results[f"test_{name}"], rel=1e-5), (size, name)
            assert evaluated[0] == pytest.approx(results[f"base_{name}"], rel=1e-5), (size, name)
        settings.append(json.loads((run / "generation_config.json").read_text()))
    assert settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_files_and_row_limits(small, tmp_path, kind):
    from datasets import Dataset

    rows = Dataset.from_list(ROWS).rename_columns({"document": "text", "summary": "title"})
    getattr(rows, f"to_{kind}")(str(tmp_path / f"rows.{kind}"))
    options = {"max_train_rows": 20, "max_test_rows": 3, "max_steps": 1, "model_name_or_path": small / "t5"}
    run_main(
        [*flags(tmp_path / f"rows.{kind}", tmp_path / "run", **options), "--columns", "document=text", "summary=title"]
    )
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["rows"] == 20
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["test_rows"] == 3


def test_bad_rows_are_dropped_and_many_stop_the_run(small, tmp_path):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text("\n".join(map(json.dumps, [*ROWS, {"document": "x", "summary": None}])))
    run_main(flags(few, tmp_path / "run", max_steps=1, model_name_or_path=small / "t5"))
    assert "kept 150 + dropped 1" in json.loads((tmp_path / "run" / "preflight.json").read_text())["cleaning"]
    many.write_text("\n".join(map(json.dumps, [*ROWS, *[{"document": "", "summary": "x"}] * 20])))
    with pytest.raises(UserError, match="20 of 170 rows are unusable"):
        run_main(flags(many, tmp_path / "other", max_steps=1, model_name_or_path=small / "t5"))


def test_kill_and_repeat_ends_with_the_same_weights(pairs, tmp_path):
    """From scratch, with dropout, accumulation and batches grouped by length: SIGKILL after a checkpoint, then on."""
    options = {
        "max_steps": 24,
        "save_steps": 4,
        "eval_steps": 100,
        "gradient_accumulation_steps": 2,
        "save_total_limit": 1,
        "max_test_rows": 2,
    }
    whole = command(*flags(pairs, tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    assert summarize_t5.NO_SUMMARIZER in whole.stdout
    argv, run = flags(pairs, tmp_path / "run", **options), tmp_path / "run"
    killed = task_runs.interrupt(TASK / "train.py", argv, run, 8, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    rest = command(*argv)
    assert rest.returncode == 0 and "Resumes from" in rest.stdout, rest.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match="train sampling strategy: group_by_length then, random now"):
        run_main([*argv, "--train_sampling_strategy=random"])


def test_nan_stops_before_the_optimizer(small, pairs, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(small / "bart")
    with torch.no_grad():
        model.model.shared.weight[5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(small / "bart").save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="The loss became nan"):
        run_main(flags(pairs, tmp_path / "run", model_name_or_path=tmp_path / "broken"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_trainer_uses_grouped_batches(small, pairs, tmp_path):
    """The padding that preflight reports is that of the batches which are trained."""
    tokenizer = AutoTokenizer.from_pretrained(small / "t5")
    from datasets import Dataset

    rows = Dataset.from_list([articles.to_pair(row, "document", "summary") for row in ROWS])
    rows = rows.map(
        lambda batch: articles.tokenize(batch, tokenizer, "", 64, 12), batched=True, remove_columns=rows.column_names
    )
    measured = {}
    for strategy in ("random", "group_by_length"):
        args = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, train_sampling_strategy=strategy, bf16=False
        )
        model = AutoModelForSeq2SeqLM.from_pretrained(small / "t5")
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        trainer = Seq2SeqTrainer(model, args, collator, rows, processing_class=tokenizer)
        batches = list(trainer.get_train_dataloader())
        positions = sum(batch["attention_mask"].numel() + batch["labels"].numel() for batch in batches)
        filled = sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
        measured[strategy] = 1 - filled / positions
        assert articles.preflight(rows, args)["padding_share"] == pytest.approx(measured[strategy], abs=0.08)
    assert measured["group_by_length"] < measured["random"] / 2


def test_the_folder_runs_from_anywhere(pairs, tmp_path):
    copied = tmp_path / "elsewhere" / "my_summaries"
    shutil.copytree(TASK, copied, ignore=shutil.ignore_patterns("__pycache__"))
    argv = flags(pairs, tmp_path / "run", max_steps=1, max_test_rows=2)
    ran = task_runs.command(copied / "train.py", *argv, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "README.md").exists()


def test_dry_run_plans_and_writes_nothing(pairs, tmp_path, capsys):
    run_main([*flags(pairs, tmp_path / "run"), "--dry_run"])
    planned = capsys.readouterr().out
    assert "steps 4" in planned and "minutes of training" in planned
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp16": "true"}, "fp16 needs a GPU"),
        ({"long_documents": "fold"}, "invalid choice"),
        ({"model_name_or_path": "./nowhere"}, "./nowhere"),
        ({"scratch_width": 100}, "--scratch_width 100: give a multiple of 64"),
        (
            {"model_name_or_path": "bart", "max_source_length": 1024},
            "reads at most 128 tokens: lower --max_source_length",
        ),
        ({"model_name_or_path": "llama"}, "is a llama model; expected an encoder-decoder (T5, BART)"),
        ({"columns": "document=nothing"}, "no column nothing"),
        ({"model_name_or_path": "stops"}, "what its generation_config.json asks for cannot be done here"),
    ],
)
def test_foreseeable_errors_are_one_line(options, words, tmp_path, small, tiny, pairs):
    folders = {"bart": small / "bart", "llama": tiny / "llama", "stops": tmp_path / "stops"}
    settings = json.loads((shutil.copytree(small / "bart", folders["stops"]) / "generation_config.json").read_text())
    (folders["stops"] / "generation_config.json").write_text(json.dumps(settings | {"stop_strings": ["END"]}))
    options = {key: folders.get(value, value) for key, value in options.items()}
    with pytest.raises(UserError) as stopped:
        run_main(flags(pairs, tmp_path / "run", **options))
    assert words in str(stopped.value) and len(str(stopped.value).splitlines()) <= 2
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (97, 12, "reads at most 96 tokens: lower --max_source_length .now 97"),
        (96, 33, "writes at most 32 tokens: lower --max_target_length .now 33"),
        (96, 32, None),
    ],
)
def test_led_has_positions_of_two_lengths(source, target, words, small, tmp_path):
    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    sizes |= {"max_encoder_position_embeddings": 96, "max_decoder_position_embeddings": 32, "d_model": 16}
    LEDForConditionalGeneration(LEDConfig(vocab_size=400, attention_window=16, **sizes)).save_pretrained(tmp_path)
    lengths = Namespace(max_source_length=source, max_target_length=target)
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), bf16=False)
    with pytest.raises(UserError, match=words) if words else nullcontext():
        seq2seq_models.load_model(tmp_path, AutoTokenizer.from_pretrained(small / "bart"), lengths, args)


def test_a_misspelt_key_stops_before_torch():
    python = [sys.executable, "-X", "importtime", TASK / "train.py", "--max_sorce_length=3"]
    stopped = subprocess.run(python, capture_output=True, text=True)
    assert stopped.returncode == 2 and "Did you mean `max_source_length`?" in stopped.stderr
    imported = {line.rpartition("|")[2].strip() for line in stopped.stderr.splitlines()}
    assert "shared.training.launch" in imported and not imported & {"torch", "transformers"}
