"""tasks/pretrain_gpt2: packing, streaming, Muon, n-gram models, training end to end, resume, errors. Tiny models, real code."""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import blocks
import datasets
import documents
import gpt2_models
import muon
import ngrams
import numpy as np
import pytest
import task_runs
import torch
import trainer_gpt2
import transformers
from checkout import ROOT, train_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import UserError
from shared.training.arguments import parse

pretrain = train_script("pretrain_gpt2")
TASK = ROOT / "tasks" / "pretrain_gpt2"
TRAINING = "transformers.training_args:TrainingArguments"
SIZES = dict(gpt2_models.SIZES)
END = 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """600 documents with an order that a tiny model can learn: each word decides the next."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    draw = np.random.default_rng(0)
    rows = []
    for i in range(600):
        start = int(draw.integers(10))
        text = " ".join(words[(start + k) % 10] for k in range(int(draw.integers(5, 60))))
        rows.append({"text": f"Document {i * 7919} {i * 104729} counts: {text}."})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True, scope="module")
def tiny_sizes():
    """In this process the small sizes are models of a moment; commands train the real ones for a few steps."""
    gpt2_models.SIZES |= {"pico": (2, 64), "nano": (2, 64)}
    yield
    gpt2_models.SIZES.update(SIZES)


def flags(corpus, output, **options):
    options = {
        "dataset": corpus,
        "output_dir": output,
        "vocab_size": 400,
        "block_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "max_test_rows": 20,
        "max_validation_rows": 10,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "disable_tqdm": True,
    } | options
    return [f"--{name}={value}" for name, value in options.items()]


def run_main(argv):
    pretrain.main(*parse(pretrain.ScriptArguments, TRAINING, argv))


command = partial(task_runs.command, TASK / "train.py")


# Packing


def some_documents(count=40, seed=0, longest=90):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 50, int(draw.integers(0, longest))).tolist() for _ in range(count)]


@pytest.mark.parametrize("length", [1, 7, 16, 5000])
def test_no_token_is_lost_and_each_is_predicted_once(length):
    documents = some_documents()
    row = [END] + [token for ids in documents for token in (*ids, END)]
    packed = blocks.pack(documents, END, length)
    examples = [blocks.example(block, END) for block in packed]
    targets = torch.cat([e["shift_labels"] for e in examples])
    inputs = torch.cat([e["input_ids"] for e in examples])
    assert targets[targets != -100].tolist() == row[1:]
    assert inputs[: len(row) - 1].tolist() == row[:-1]
    assert (targets == -100).sum() < length  # only the end of the last block is filled up
    assert ngrams.tokens_of(packed).tolist() == row


def stream_of(documents, **options):
    rows = datasets.Dataset.from_dict({"ids": documents}).to_iterable_dataset(num_shards=3)
    options = {"most": None, "keep": 8} | options
    return blocks.BlockStream(
        rows, lambda row: row["ids"], lambda documents: list(map(list, documents)), END, 16, **options
    )


def take(stream, count):
    found = []
    for block in stream:
        found.append((block["input_ids"].tolist(), block["shift_labels"].tolist()))
        if len(found) == count:
            break
    return found


def test_stream_and_memory_give_the_same_blocks_in_the_same_order():
    documents = some_documents()
    memory = blocks.Blocks(blocks.pack(documents, END, 16), END)
    expected = [(memory[i]["input_ids"].tolist(), memory[i]["shift_labels"].tolist()) for i in range(len(memory))]
    assert take(stream_of(documents), len(memory)) == expected
    assert take(stream_of(documents), 2 * len(memory)) == 2 * expected  # a second pass begins anew
    first_seven = [blocks.example(block, END)["input_ids"].tolist() for block in blocks.pack(documents[:7], END, 16)]
    assert [inputs for inputs, _ in take(stream_of(documents, most=7), 2 * len(first_seven))] == 2 * first_seven
    assert np.array_equal(stream_of(documents).first(9), blocks.pack(documents, END, 16)[:9])


@pytest.mark.parametrize("stopped", [1, 2, 9, 30, 77, 150, 260])
def test_a_stream_goes_on_at_any_block(stopped):
    """Also in a later pass, after a document of many blocks, and after a second stop; what was trained is not read again."""
    documents = some_documents() + [list(range(1, 300))] + some_documents(20, seed=5)
    whole = take(stream_of(documents), 300)
    stream = stream_of(documents)
    assert take(stream, stopped + 3) == whole[: stopped + 3]  # three fetched ahead of the step that was saved
    state = json.loads(json.dumps(stream.state_at(stopped)))
    read = []
    again = stream_of(documents, resume=state)
    again.encode = lambda documents: read.append(1) or list(map(list, documents))
    assert take(again, 280)[stopped:] == whole[stopped:280]
    if stopped == 77:
        read.clear()
        take(stream_of(documents, resume=state), stopped)
        assert not read
    later = json.loads(json.dumps(again.state_at(278)))
    assert take(stream_of(documents, resume=later), 300)[278:] == whole[278:]


def test_lots_are_encoded_ahead_beside_training_and_in_order(monkeypatch):
    """And a stream that is left ends its thread; an error of the tokenizer arrives."""
    monkeypatch.setattr(blocks, "LOT", (3, 10**9))
    documents, lots = some_documents(), []
    whole, stream = take(stream_of(documents), 40), stream_of(documents)
    stream.encode = lambda texts: lots.append((threading.current_thread().name, len(texts))) or list(map(list, texts))
    running = iter(stream)
    first = next(running)
    assert (first["input_ids"].tolist(), first["shift_labels"].tolist()) == whole[0]
    running.close()
    assert {name for name, _ in lots} == {lots[0][0]} != {threading.current_thread().name}
    assert len(lots) > 1 and all(size == 3 for _, size in lots)
    assert lots[0][0] not in {thread.name for thread in threading.enumerate()}
    assert take(stream_of(documents), 40) == whole
    stream.encode = lambda texts: 1 // 0
    with pytest.raises(ZeroDivisionError):
        next(iter(stream))


def test_sides_depend_on_the_text_alone():
    texts = [f"document {i}" for i in range(5000)]
    sides = Counter(blocks.side(text, 1, ("test", "validation")) for text in texts)
    assert 60 < sides["test"] < 140 and 60 < sides["validation"] < 140
    assert blocks.side(texts[0], 1, ()) == "train"
    only_test = [blocks.side(text, 1, ("test",)) for text in texts]
    assert set(only_test) == {"train", "test"}


def test_a_stream_is_not_held_in_memory(tmp_path):
    """Files of 30 and of 85 MB, gzipped: reading all of the large one takes no more memory.

    Both are larger than what Arrow reads ahead, which takes 50 to 80 MB.
    """
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "import datasets, blocks, documents\n"
        "from shared.training.arguments import RunArguments\n"
        "corpus = documents.open_stream(RunArguments(dataset=sys.argv[1]), {'test': 5, 'validation': 5}, 1)\n"
        "stream = blocks.BlockStream(corpus.rows, corpus.text, lambda texts: [[len(t)] * 16 for t in texts], 0, 16, None, 8)\n"
        "count = 0\n"
        "for block in stream:\n"
        "    count += 1\n"
        "    if stream.states and stream.states[-1]['pass']: break\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    used = []
    for megabytes in (30, 85):
        path = tmp_path / f"{megabytes}.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as lines:
            for i in range(megabytes * 200):
                lines.write(json.dumps({"text": f"{i} " + "word " * 1000}) + "\n")
        ran = subprocess.run(
            [sys.executable, "-c", script, str(path), str(TASK)], capture_output=True, text=True, cwd=ROOT
        )
        assert ran.returncode == 0, ran.stderr
        count, memory = map(float, ran.stdout.split())
        assert count >= megabytes * 200
        used.append(memory)
    assert used[1] < used[0] + 35, used


def test_isolated_documents_do_not_see_each_other(tiny):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "gpt2")
    model = gpt2_models.build_model(None, "nano", tokenizer, 16, True).eval()
    ids = torch.tensor([[END, 5, 6, 7, END, 9, 8, 7], [3, 4, END, END, 2, 1, 2, 3]])
    together = trainer_gpt2.hidden_states(model, ids, END)
    parts = [[END, 5, 6, 7], [END, 9, 8, 7], [3, 4], [END], [END, 2, 1, 2, 3]]
    alone = torch.cat([trainer_gpt2.hidden_states(model, torch.tensor([part]), END) for part in parts])
    assert torch.allclose(together, alone, atol=1e-5)
    plain = gpt2_models.build_model(None, "nano", tokenizer, 16, False).eval()
    plain.load_state_dict(model.state_dict())
    seen = trainer_gpt2.hidden_states(plain, ids, END)
    assert torch.allclose(seen[:4], alone[:4], atol=1e-5) and not torch.allclose(seen[4:8], alone[4:8], atol=1e-2)


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0}
SMALL |= {"eos_token_id": 0, "pad_token_id": 0}
LLAMA = SMALL | {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8}


def saved(config, folder):
    """A model of this configuration with random weights, its head's bias too, and a tokenizer of 300 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    tokenizer = gpt2_models.load_tokenizer(None, iter(["one two three"]), 300)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.BloomConfig(**SMALL), "attention of its own"),
        (transformers.MambaConfig(**SMALL), "carries a state"),
        (
            transformers.GPTNeoConfig(**SMALL | {"num_layers": 2, "num_heads": 4}, attention_types=[[["global"], 2]]),
            "own",
        ),
        (transformers.FalconConfig(**SMALL), "attention of its own"),
        (transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "own"),
        (transformers.Gemma2Config(**LLAMA, final_logit_softcapping=None), "attention of its own"),
        (transformers.Lfm2Config(**LLAMA, full_attn_idxs=[1]), "carries a state"),
        (transformers.LlamaConfig(**LLAMA), ""),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_cannot_isolate_is_refused_and_else_reads_on(config, why, tmp_path):
    """Without --isolate_documents each takes the attention that transformers has for it, and scores as it does itself."""
    tokenizer = saved(config, tmp_path)
    ids = torch.tensor([[END, 5, 6, 7, END, 9, 8, 7]])
    model = gpt2_models.build_model(str(tmp_path), "nano", tokenizer, 16, False)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        ours = trainer_gpt2.hidden_states(model, ids, END) @ model.get_output_embeddings().weight.T
        torch.testing.assert_close(ours, own(ids).logits[0], rtol=1e-4, atol=1e-5)
    if why:
        with pytest.raises(UserError, match=f"--isolate_documents true: .*{why}"):
            gpt2_models.build_model(str(tmp_path), "nano", tokenizer, 16, True)
    else:
        assert (
            gpt2_models.build_model(str(tmp_path), "nano", tokenizer, 16, True).config._attn_implementation == "packed"
        )


def test_isolation_is_tried(tmp_path, monkeypatch):
    """An attention that leaves out where documents begin is found out on a row of two."""
    tokenizer = saved(transformers.LlamaConfig(**LLAMA, initializer_range=0.5), tmp_path)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def blind(*given, cu_seq_lens_q=None, **named):
        return sdpa_attention_forward(*given, **named)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "packed", blind)
    with pytest.raises(UserError, match="--isolate_documents true: .*does not score documents of a row as"):
        gpt2_models.build_model(str(tmp_path), "nano", tokenizer, 16, True)


# Model, loss and optimizer


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.GraniteConfig(**LLAMA, logits_scaling=8.0), "logits are scaled or capped"),
        (transformers.CohereConfig(**SMALL | {"intermediate_size": 64}), "logits are scaled or capped"),
        (transformers.Gemma2Config(**LLAMA), "logits are scaled or capped"),
        (transformers.PhiConfig(**SMALL, intermediate_size=64), "its head has a bias"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_whose_logits_are_no_plain_product_is_refused(config, why, tmp_path):
    """Training computes hidden states times the head's weights: the loss and the perplexity would be another model's."""
    tokenizer = saved(config, tmp_path)
    with pytest.raises(UserError, match=why):
        gpt2_models.build_model(str(tmp_path), "nano", tokenizer, 16, False)


@pytest.mark.parametrize(
    ("size", "vocabulary", "positions", "millions"),
    [
        ("pico", 0, 0, 0.9),
        ("nano", 0, 0, 1.8),
        ("mini", 0, 0, 25.2),
        ("small", 50257, 1024, 124.4),
        ("medium", 50257, 1024, 354.8),
    ],
)
def test_sizes_are_what_help_says(size, vocabulary, positions, millions):
    layers, width = SIZES[size]
    config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=width // gpt2_models.HEAD)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    count = sum(p.numel() for p in model.parameters()) - embeddings + (vocabulary + positions) * width
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert f"{size} {layers} x {width}" in pretrain.ScriptArguments.__dataclass_fields__["size"].metadata["help"]


@pytest.mark.parametrize("of", ["torch", "older torch", "trl"])
def test_loss_and_gradients_are_those_of_the_plain_computation(of, monkeypatch):
    """trl's kernel is what a GPU uses; here it computes the same in torch."""
    if of != "torch":
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    if of == "trl":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.manual_seed(0)
    hidden, head = torch.randn(1300, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (1300,))
    targets[::7] = -100
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, head))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = trainer_gpt2.loss_sum(hidden, head, targets)
        found = torch.autograd.grad(loss, (hidden, head))
        close = {"rtol": 0.03, "atol": 0.3} if autocast else {"rtol": 1e-4, "atol": 1e-4}
        assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=2e-3)
        assert all(torch.allclose(a.float(), b, **close) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_muon_moves_every_direction_alike(shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(muon.orthogonalize(torch.randn(shape)))
    # only what was next to zero may stay small: five iterations lift it by a factor of 400
    assert (singular > 0.5).float().mean() > 0.95 and singular.max() < 1.3
    weight, mine = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    theirs = torch.optim.Muon([weight], lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    ours = muon.MuonAdamW([{"params": [mine], "muon": 1}], lr=0.1, weight_decay=0)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        mine.grad = weight.grad.clone()
        theirs.step()
        ours.step()
    assert torch.nn.functional.cosine_similarity(weight.flatten(), mine.flatten(), dim=0) > 0.999  # theirs is in bf16
    assert weight.norm().item() == pytest.approx(mine.norm().item(), rel=0.01)


def test_query_key_and_value_are_orthogonalized_apart():
    torch.manual_seed(0)
    joint = torch.nn.Parameter(torch.zeros(32, 96))
    joint.grad = torch.cat([torch.randn(32, 32), 1e-3 * torch.randn(32, 64)], dim=1)
    muon.MuonAdamW([{"params": [joint], "muon": 3}], lr=1.0, weight_decay=0).step()
    norms = [part.norm().item() for part in joint.chunk(3, dim=1)]
    assert max(norms) < 1.3 * min(norms)


def test_a_step_with_infinite_gradients_is_passed_over():
    """What fp16 does now and then: GradScaler halves its scale and no weight moves, Muon's or AdamW's."""
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = muon.MuonAdamW([{"params": [p], "muon": n} for p, n in zip(weights, (1, 0), strict=True)], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for factor, moves in ((float("inf"), False), (1.0, True)):
        scaler.scale(sum((p * factor).sum() for p in weights)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all((not torch.equal(p, torch.ones(4, 4))) == moves and torch.isfinite(p).all() for p in weights)


@pytest.mark.parametrize("use_muon", [True, False])
def test_weight_decay_and_muon_go_where_they_belong(tiny, use_muon):
    model = AutoModelForCausalLM.from_pretrained(tiny / "gpt2")
    groups = muon.parameter_groups(model, use_muon, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    matrices = [names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]]
    assert len(matrices) == 2 * 4 and all(
        name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) for name in matrices
    )
    assert [group["muon"] for group in groups] == ([3, 1, 0] if use_muon else [0, 0, 0])


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_another_optimizer_is_used_or_refused(corpus, tmp_path, monkeypatch, optim):
    """And the hidden matrices alone are decayed by it, too."""
    with pytest.raises(UserError, match=f"--optim {optim} would not be used beside Muon: add --optimizer adamw"):
        run_main(flags(corpus, tmp_path / "refused", optim=optim))
    assert not (tmp_path / "refused").exists()
    made = []
    create = trainer_gpt2.PretrainTrainer.create_optimizer
    monkeypatch.setattr(
        trainer_gpt2.PretrainTrainer,
        "create_optimizer",
        lambda self, *given: made.append(create(self, *given)) or made[-1],
    )
    options = {"optim": optim, "optimizer": "adamw", "weight_decay": 0.1, "max_steps": 2, "max_test_rows": 5}
    run_main(flags(corpus, tmp_path / "run", **options))
    assert type(made[-1]).__name__.lower() == optim
    decayed = [p for group in made[-1].param_groups if group["weight_decay"] for p in group["params"]]
    assert len(decayed) == 2 * 4 and all(p.ndim == 2 and p.shape[0] in (64, 256) for p in decayed)
    assert f"| optimizer | {optim} |" in (tmp_path / "run" / "README.md").read_text()


# N-gram models


def test_trigram_is_interpolated_kneser_ney():
    """By hand, from the definition, with dictionaries."""
    draw = np.random.default_rng(0)
    tokens = np.array([0, *draw.choice([0, 1, 2, 3, 4], 60, p=[0.1, 0.4, 0.3, 0.1, 0.1])])
    model = ngrams.Trigram(tokens, 6, 0)
    row = [0, *tokens.tolist()]
    triples = Counter((0 if v == 0 else u, v, w) for u, v, w in zip(row, row[1:], row[2:], strict=False))
    pairs = Counter((v, w) for _, v, w in triples)
    words = Counter(w for _, w in pairs)

    def discount(counts):
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        return once / (once + 2 * twice)

    def probability(u, v, w):
        total = sum(words.values())
        d = discount(words) if 1 in words.values() else 0.5
        p = max(words[w] - d, 0) / total + d * len(words) / total / 6
        for counts, context in ((pairs, (v,)), (triples, (u, v))):
            after = {gram: c for gram, c in counts.items() if gram[:-1] == context}
            if after:
                d, total = discount(counts), sum(after.values())
                p = max(after.get((*context, w), 0) - d, 0) / total + d * len(after) / total * p
        return p

    for u in range(6):
        for v in range(6):
            found = model.probabilities(np.full(6, u), np.full(6, v), np.arange(6))
            assert found.sum() == pytest.approx(1) and found.min() > 0
            assert found == pytest.approx([probability(u, v, w) for w in range(6)])


def test_ngram_models_score_what_they_have_seen_better():
    tokens = np.array([0, *[1, 2, 3, 0] * 50])
    known, unknown = np.array([0, 1, 2, 3, 0]), np.array([0, 3, 2, 1, 0])
    trigram, unigram = ngrams.Trigram(tokens, 5, 0), ngrams.Unigram(tokens, 5)
    assert trigram.nll(known) < 1 < trigram.nll(unknown)
    counts = np.array([51, 51, 51, 51, 1])
    assert unigram.nll(known) == pytest.approx(-4 * math.log(51 / counts.sum()), rel=0.01)
    assert np.exp(unigram.logs).sum() == pytest.approx(1)


def test_tokenizer_is_lossless_and_the_same_each_time():
    texts = ["Returns the value.", "def f(x):\n    return naïve 🙂", "\x00tab\t"]
    made = [gpt2_models.load_tokenizer(None, iter(texts * 30), 320) for _ in range(2)]
    assert made[0].backend_tokenizer.to_str() == made[1].backend_tokenizer.to_str()
    for text in [*texts, "日本語, never seen"]:
        assert made[0].decode(made[0](text).input_ids) == text
    assert made[0].eos_token == "<|endoftext|>"
    with pytest.raises(UserError, match="--vocab_size 100"):
        gpt2_models.load_tokenizer(None, iter(texts), 100)


def test_each_token_of_a_document_is_scored_once_with_half_a_window_of_context(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "gpt2")
    model = gpt2_models.build_model(None, "nano", tokenizer, 8, False).eval()
    texts = [[5, 6, 7], list(range(1, 20)), [], list(range(1, 8)), list(range(30, 42))]
    args = transformers.TrainingArguments(per_device_eval_batch_size=3, disable_tqdm=True, bf16=False)
    scores = trainer_gpt2.score_documents(model, texts, 8, END, args)
    assert scores["tokens"] == [len(ids) + 1 for ids in texts]
    for number, ids in enumerate(texts):
        row, nll = [END, *ids, END], 0.0
        for target in range(1, len(row)):
            start = 0 if target <= 8 else (target - 9) // 4 * 4 + 4
            logits = model(torch.tensor([row[start:target]])).logits[0, -1]
            nll -= logits.log_softmax(0)[row[target]].item()
        assert scores["nll"][number] == pytest.approx(nll, rel=1e-5)


# Training end to end


WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 20}'}


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adamw"}, {"streaming": True}, {"isolate_documents": True, **WSD}], ids=str
)
def test_it_learns_and_beats_the_unigram(corpus, tmp_path, options):
    from safetensors.torch import load_file

    run_main(flags(corpus, tmp_path / "run", max_steps=60, eval_steps=30, save_steps=60, **options))
    run = tmp_path / "run"
    results = json.loads((run / "all_results.json").read_text())
    assert results["test_loss"] < results["baseline_unigram_loss"] < results["base_loss"]
    assert results["test_bits_per_byte"] < results["baseline_unigram_bits_per_byte"]
    assert results["test_perplexity_ci95"][0] < results["test_perplexity"] < results["test_perplexity_ci95"][1]
    assert ("baseline_full_trigram_loss" in results) == ("streaming" not in options)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    assert all(entry["tokens_per_second"] > 0 and 0 < entry["mfu"] < 1 for entry in logged)
    assert logged[-1]["minutes_left"] == 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9 and {sample["temperature"] for sample in samples} == {0.5, 0.8, 1.1}
    card = (run / "README.md").read_text()
    assert "Model trained from scratch" in card and "trigram" in card and str(tmp_path) not in card
    assert "fine-tuned from" not in card and "temperature 0.8" in card
    for file in ("run.yaml", "preflight.json", "loss.png", "tokenizer.json"):
        assert (run / file).stat().st_size > 0
    loaded = {}
    exec(gpt2_models.usage(str(run), 32), loaded)  # the lines on the card
    assert len(loaded["tokenizer"]) == loaded["model"].config.vocab_size == 400
    weights = load_file(run / "model.safetensors")
    torch.manual_seed(42)  # as the run began
    fresh = gpt2_models.build_model(None, "nano", loaded["tokenizer"], 32, False).state_dict()
    assert all(not torch.equal(weights[name], fresh[name]) for name in weights)
    assert not (run / "training_args.bin").exists()


def test_stream_and_memory_train_the_same_weights(corpus, tmp_path):
    """With official splits and the data in its own order, `--streaming` changes nothing."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    parts = {"train": rows[:500], "validation": rows[500:550], "test": rows[550:]}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    data.save_to_disk(tmp_path / "data of memory")
    data.shuffle(seed=42).save_to_disk(tmp_path / "data of stream")  # as official splits are, where they are held whole
    for name, options in (("memory", {"train_sampling_strategy": "sequential"}), ("stream", {"streaming": True})):
        run_main(flags(tmp_path / f"data of {name}", tmp_path / name, **options))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "stream")]
    same = weights[0] == weights[1]  # by itself: pytest would compare the bytes for minutes to show where they differ
    assert same
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("memory", "stream")]
    for name in ("test_loss", "baseline_trigram_loss", "baseline_unigram_bits_per_byte"):
        assert results[0][name] == results[1][name]


def test_it_continues_from_a_model(corpus, tiny, tmp_path):
    source = shutil.copytree(tiny / "gpt2", tmp_path / "gpt2")
    settings = json.loads((source / "generation_config.json").read_text()) | {"stop_strings": ["END"]}
    (source / "generation_config.json").write_text(json.dumps(settings))
    run_main(
        flags(
            corpus,
            tmp_path / "run",
            model_name_or_path=source,
            max_steps=8,
            lr_scheduler_type="constant",  # for so few steps
            max_test_rows=5,
            max_validation_rows=2,
        )
    )
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["test_loss"] < results["base_loss"] - 0.5
    assert "fine-tuned from `gpt2`" in (tmp_path / "run" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["stop_strings"] == ["END"]
    with pytest.raises(UserError, match="--block_length 4096"):
        run_main(flags(corpus, tmp_path / "other", model_name_or_path=tiny / "gpt2", block_length=4096))


def test_nan_stops_before_the_optimizer(corpus, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny / "gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny / "gpt2").save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="The loss became nan at step 1; this optimizer step was not made"):
        run_main(flags(corpus, tmp_path / "run", model_name_or_path=tmp_path / "broken"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


RESUMED = {"max_steps": 24, "save_steps": 4, "eval_steps": 100, "gradient_accumulation_steps": 2}
RESUMED |= {"max_train_rows": 60, "vocab_size": 300, "max_test_rows": 5}


def test_kill_and_repeat_on_a_stream_ends_with_the_same_weights(corpus, tmp_path):
    """SIGKILL in the first pass over the data, SIGTERM in the second, then on: as if nothing had happened."""
    options = {**RESUMED, "save_total_limit": 1, "streaming": True}
    whole = command(*flags(corpus, tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    argv, run = flags(corpus, tmp_path / "run", **options), tmp_path / "run"
    interrupt = partial(task_runs.interrupt, TASK / "train.py", argv, run)
    assert interrupt(4, signal.SIGKILL) == -signal.SIGKILL
    assert interrupt(16, signal.SIGTERM) == 143
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((newest / "stream.json").read_text())
    assert state["pass"] > 0 and state["rows"]  # in the middle of a later pass
    rest = command(*argv)
    assert rest.returncode == 0, rest.stderr
    assert "Resumes from" in rest.stdout
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert task_runs.losses(tmp_path / "whole") == task_runs.losses(run) and len(task_runs.losses(run)) == 24


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resume_from_an_early_checkpoint_ends_with_the_same_weights(corpus, tmp_path, optimizer):
    run, options = tmp_path / "run", {**RESUMED, "optimizer": optimizer, "save_total_limit": 10}
    run_main(flags(corpus, run, **options))
    whole, logged = (run / "model.safetensors").read_bytes(), task_runs.losses(run)
    for checkpoint in run.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-8":
            shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="belongs to another run"):
        run_main(flags(corpus, run, **options | {"optimizer": "adamw" if optimizer == "muon" else "muon"}))
    (run / "model.safetensors").unlink()
    run_main(flags(corpus, run, **options))
    assert (run / "model.safetensors").read_bytes() == whole and task_runs.losses(run) == logged


def test_out_of_memory_on_a_stream_goes_on_where_it_stood(corpus, tmp_path, monkeypatch):
    options = {"streaming": True, "max_train_rows": 40, "max_test_rows": 5, "eval_steps": 100}
    run_main(flags(corpus, tmp_path / "small", **options, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    compute_loss = trainer_gpt2.PretrainTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 1 and self.state.global_step >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_gpt2.PretrainTrainer, "compute_loss", limited)
    run_main(flags(corpus, tmp_path / "run", **options, per_device_train_batch_size=4))
    small, shrunk = task_runs.losses(tmp_path / "small"), task_runs.losses(tmp_path / "run")
    assert list(shrunk) == list(small) and shrunk == pytest.approx(small, abs=2e-3)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "stream.json").read_text())
    assert state == json.loads((tmp_path / "small" / "checkpoint-6" / "stream.json").read_text())


def test_two_processes_train_as_one_on_a_stream(corpus, tmp_path):
    options = {"streaming": True, "max_steps": 4, "per_device_train_batch_size": 2, "disable_tqdm": False}
    two = task_runs.in_two_processes("pretrain_gpt2", flags(corpus, tmp_path / "two", **options))
    one = command(*flags(corpus, tmp_path / "one", **options, gradient_accumulation_steps=2))
    task_runs.assert_like_one(two, one, tmp_path)


# What a user meets


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fp16=true"], "fp16 needs a GPU"),
        (["--size=large"], "invalid choice"),
        (["--sise=nano"], "Did you mean `size`?"),
        (["--dataset=./nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--columns", "text=body"], "--columns text=body: no column body. Columns: text"),
        (["--streaming=true", "--max_steps=-1"], "--streaming needs --max_steps"),
        (["--tokenizer=./nowhere"], "./nowhere"),
        (["--dataset=./nowhere.jsonl", "--streaming=true"], "nowhere.jsonl: no such file"),
    ],
)
def test_foreseeable_errors_are_one_line(corpus, argv, words, tmp_path):
    with pytest.raises(UserError) as stopped:
        run_main([*flags(corpus, tmp_path / "run"), *argv])
    assert words in str(stopped.value) and str(stopped.value).count("\n") < 2
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_command_is_its_last_line(corpus, tmp_path):
    stopped = command(*flags(corpus, tmp_path / "run"), "--columns", "text=body")
    assert stopped.returncode == 2 and stopped.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in stopped.stderr


def test_columns_are_mapped_and_bad_rows_counted(corpus, tmp_path):
    rows = [{"body": json.loads(line)["text"]} for line in corpus.read_text().splitlines()] + [{"body": ""}]
    path = tmp_path / "bodies.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for streaming in (False, True):
        run = tmp_path / f"run{streaming}"
        run_main([*flags(path, run, max_steps=1, streaming=streaming), "--columns", "text=body"])
        assert "dropped 1 (empty 1)" in json.loads((run / "preflight.json").read_text())["cleaning"]


def test_held_out_documents_are_never_trained_on(corpus):
    from shared.training.arguments import RunArguments

    found = documents.open_stream(RunArguments(dataset=str(corpus)), {"test": None, "validation": None}, 3)
    training = list(found.texts())
    held_out = found.held_out["test"] + found.held_out["validation"]
    assert len(held_out) > 5 and len(training) + len(held_out) == 600 and not set(training) & set(held_out)
    assert list(found.texts()) == training


def test_rows_that_turn_unusable_behind_the_first_are_said(corpus, caplog):
    found = documents.Corpus(None, {}, ("test", "validation"), "text", 42, "")
    assert found.text({"text": "as it should be"}) == "as it should be"
    assert [found.text(row) for row in [{"body": "renamed"}] * 10 + [{"text": 7}] * 20] == [None] * 30
    said = [record.message.split("passed over: ")[1] for record in caplog.records]
    assert said == ["1; the last one: missing", "10; the last one: missing"]


def test_a_stream_of_own_files_is_shown_and_split_as_given(corpus, tmp_path, caplog):
    caplog.set_level("INFO", "taskbook")
    lines = corpus.read_text().splitlines()
    parts = {"train": lines[:560], "val": lines[560:580], "test": lines[580:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    files = {f"{kind}_file": tmp_path / f"{short}.jsonl" for kind, short in (("validation", "val"), ("test", "test"))}
    options = files | {"streaming": True, "show_data": 2, "max_test_rows": 30, "max_validation_rows": 30}
    with pytest.raises(SystemExit) as ended:
        run_main(flags(tmp_path / "train.jsonl", tmp_path / "run", **options))
    assert not ended.value.code and not (tmp_path / "run").exists()
    assert "test documents 20" in caplog.text and caplog.text.count("[[trained]] marked") == 2
    run_args = parse(pretrain.ScriptArguments, TRAINING, flags(tmp_path / "train.jsonl", tmp_path / "run", **files))[2]
    found = documents.open_stream(run_args, {"test": None, "validation": None}, 3)
    held_out = {"validation": parts["val"], "test": parts["test"]}
    assert found.held_out == {name: [json.loads(line)["text"] for line in part] for name, part in held_out.items()}
    assert len(list(found.texts())) == 560


def test_dry_run_plans_and_writes_nothing(corpus, tmp_path):
    planned = command(*flags(corpus, tmp_path / "run"), "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert "steps 6" in planned.stdout and "minutes of training" in planned.stdout
    assert not (tmp_path / "run").exists()


def test_the_folder_runs_from_anywhere(corpus, tmp_path):
    copied = tmp_path / "elsewhere" / "my_model"
    shutil.copytree(TASK, copied, ignore=shutil.ignore_patterns("__pycache__"))
    ran = subprocess.run(
        [sys.executable, str(copied / "train.py"), *flags(corpus, tmp_path / "run", max_steps=1)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "README.md").exists()
