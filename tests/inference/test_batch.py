"""shared/inference/batch.py: rows that come and go get the tokens that they get alone."""

import random

import pytest
import torch
import transformers

from shared.export import graphs, quantize
from shared.inference.batch import Batch, Row
from shared.inference.model import load
from shared.inference.onnx_runner import OnnxRunner
from shared.inference.torch_runner import TorchRunner

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SIZES |= {
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}  # random weights whose next token depends on all before it
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
KINDS = {
    "llama": ("LlamaConfig", GROUPED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    ),
    "windows": (
        "Gemma3TextConfig",
        GROUPED | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "longrope": (
        "Phi3Config",
        GROUPED | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24, "pad_token_id": 0},
    ),
    "state": ("MambaConfig", {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}),
    "alibi": (
        "BloomConfig",
        {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
    # Counts positions from the one after padding, which `generate` of transformers forgets
    "roberta": ("RobertaConfig", SIZES | {"is_decoder": True, "pad_token_id": 1}),
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Of a tiny model of each kind, or of its graph; each made when it is first asked for."""
    made = {}

    def of(name):
        kind, _, form = name.partition(" ")
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            torch.manual_seed(0)
            config = getattr(transformers, KINDS[kind][0])(**KINDS[kind][1])
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            (model.half() if form == "fp16" else model).save_pretrained(folder)
            if form.startswith("onnx"):
                graphs.export(model, folder, "text-generation", False)
            if form == "onnx-int8":
                (folder / "model.onnx").rename(folder / "whole.onnx")
                quantize.quantize(folder / "whole.onnx", folder / "model.onnx", 8, "text-generation")
            made[name] = (OnnxRunner if form.startswith("onnx") else TorchRunner)(folder, "text-generation")
        return made[name]

    return of


def test_positions_without_an_end_are_read_as_far_as_trained(tiny, tmp_path):
    """Prompts of a BLOOM were refused from 512 tokens on, which T5 was trained with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "gpt2", model_max_length=int(1e30))
    tokenizer.save_pretrained(tmp_path)
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=8, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    assert load(str(tmp_path)).context == 2048


def requests(count):
    """Rows and when they come: prompts of 1 to 70 tokens, 1 to 40 tokens to write, half of them drawn by a seed of their own."""
    choose, wanted = random.Random(1), []
    for i in range(count):
        prompt = [choose.randrange(3, 300) for _ in range(choose.choice((1, 5, 17, 30, 70)))]
        drawn = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2} if i % 2 else {}
        wanted.append((choose.randrange(30), prompt, {"most": choose.randrange(1, 40), "ends": (7, 8), **drawn}))
    return wanted


def written(runner, prompt, options, **more):
    return Row(prompt, **options, draw=torch.Generator().manual_seed(len(prompt)), **more)


@pytest.mark.parametrize("name", [*KINDS, "llama fp16", "llama onnx", "llama onnx-int8", "gpt2 onnx"])
def test_the_same_tokens_as_alone(runner, name, monkeypatch):
    for module in ("torch_runner", "onnx_runner"):
        monkeypatch.setattr(f"shared.inference.{module}.PROMPT_CHUNK", 16)
    monkeypatch.setattr("shared.inference.sampling.SHARED_PREFIX", 4)
    runner, wanted = runner(name), requests(30)
    batch, rows, together, most = Batch(runner, 0), [], [], 0
    left = [None, *(count for count in (2, 9))]  # two whose clients leave after so many tokens
    for step in range(200):
        come = [request for request in wanted if request[0] == step]
        group = []
        for _, prompt, options in come:
            limit = left.pop() if left and step % 5 == 0 and options["most"] > 10 else None
            row = written(runner, prompt, options)
            row.cancelled = lambda row=row, limit=limit: limit is not None and len(row.written) >= limit
            rows.append((row, prompt, options, limit))
            group.append(row)
        if len(group) == 2:
            batch.add(group)  # read together
        else:
            for row in group:
                batch.add([row])
        together += batch.step()
        most = max(most, len(batch.rows))
        if step > 30 and not batch.rows and not batch.reading:
            break
    assert len(together) == len(rows) == 30 and most > 5
    lengths = set()
    for row, prompt, options, limit in rows:
        alone, single = written(runner, prompt, options), Batch(runner, 0)
        single.add([alone])
        while alone.open:
            single.step()
        expected = alone.written if limit is None else alone.written[:limit]
        assert row.written == expected, (len(prompt), options)
        lengths.add(len(row.written))
    assert len(lengths) > 8
    shared = [written(runner, wanted[1][1], wanted[1][2]) for _ in range(3)]  # one prompt of three replies is read once
    batch.add(shared)
    batch.add([written(runner, wanted[2][1], wanted[2][2])])
    while batch.rows or batch.reading:
        batch.step()
    assert shared[0].written == shared[1].written == next(r.written for r, p, *_ in rows if p == wanted[1][1])


def test_positions_are_those_of_the_model_itself(runner):
    """Next to the model alone, which is given none and counts them."""
    runner = runner("roberta")
    rows = [Row(prompt, 8) for _, prompt, _ in requests(4)]
    batch = Batch(runner, 1)
    batch.add(rows)
    while batch.rows or batch.reading:
        batch.step()
    for row in rows:
        ids = torch.tensor([row.prompt])
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, runner.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert row.written == ids[0, len(row.prompt) :].tolist()


@pytest.mark.parametrize(
    "name, read",
    [(name, 20 + 5 * 45) for name in ("llama", "gpt2", "alibi")]
    + [("windows", 7 + 5 * 58)]  # of a window of 8, 7 are kept
    + [(name, 20 + 1 + 4 + 45 + 4 + 9) for name in ("llama onnx", "llama onnx-int8", "gpt2 onnx")],  # no padding
)
def test_what_prompts_begin_with_is_read_once(runner, name, read, monkeypatch):
    """As the template of a chat: prompts of any length behind it, one of them shorter than what another adds to it."""
    for module in ("torch_runner", "onnx_runner"):
        monkeypatch.setattr(f"shared.inference.{module}.PROMPT_CHUNK", 16)
    monkeypatch.setattr("shared.inference.sampling.SHARED_PREFIX", 6)
    runner, choose = runner(name), random.Random(2)
    begin, ask = [choose.randrange(3, 300) for _ in range(20)], {"most": 12, "temperature": 0.9}
    prompts = [begin + [choose.randrange(3, 300) for _ in range(n)] for n in (1, 4, 45, 4, 9)]
    alone = []
    for prompt in prompts:
        row, batch = written(runner, prompt, ask), Batch(runner, 0)
        batch.add([row])
        while row.open:
            batch.step()
        alone.append(row.written)
    rows, batch = [written(runner, prompt, ask) for prompt in (*prompts, prompts[0])], Batch(runner, 0)
    batch.add(rows)
    while batch.rows or batch.reading:
        batch.step()
    assert [row.written for row in rows] == [*alone, alone[0]]
    assert batch.tokens_read(prompts) == read and batch.tokens_read(prompts[:1]) == 21


def test_rotary_embeddings_that_switch_do_so_for_the_whole_text(runner, monkeypatch):
    """Each token is the likeliest after all before it, read at once: long prompts, and replies that pass the place. The graph,
    which cannot read anew, takes no longer text."""
    monkeypatch.setattr("shared.inference.torch_runner.PROMPT_CHUNK", 16)
    runner, of_graph = runner("longrope"), runner("longrope onnx")
    for length in (5, 20, 24, 40):
        row, batch = Row(list(range(3, 3 + length)), 8), Batch(runner, 0)
        batch.add([row])
        while row.open:
            batch.step()
        text = list(row.prompt)
        for token in row.written:
            assert runner.logits(text)[-1].argmax() == token, length
            text.append(token)
    assert of_graph.length == 24
    torch.testing.assert_close(of_graph.logits(text[:24]), runner.logits(text[:24]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama onnx"])
def test_long_prompts_of_one_length_are_read_in_pieces(runner, name, monkeypatch):
    """Together, too: ONNX Runtime takes a piece of one row only."""
    for module in ("torch_runner", "onnx_runner"):
        monkeypatch.setattr(f"shared.inference.{module}.PROMPT_CHUNK", 16)
    runner, written = runner(name), []
    for group in ([40], [80], [40, 80]):
        rows, batch = [Row([first + i for i in range(40)], 8) for first in group], Batch(runner, 0)
        batch.add(rows)
        while batch.rows or batch.reading:
            batch.step()
        written += [row.written for row in rows]
    assert written[:2] == written[2:] and len(written[0]) == 8


def test_one_that_fails_or_leaves_ends_alone(runner):
    """A prompt that cannot be read has its error, one whose client leaves is read no further, and the others go on."""
    runner, batch = runner("llama"), None
    batch = Batch(runner, 0)
    good, bad = (Row(prompt, 5, draw=torch.Generator()) for prompt in ([5, 6], [5, 9999]))
    gone = Row([5] * 600, 5, cancelled=lambda: bool(good.written))
    for row in (good, bad, gone):
        batch.add([row])
    ended = []
    while batch.rows or batch.reading:
        ended += batch.step()
    assert {id(row) for row in ended} == {id(row) for row in (good, bad, gone)}
    assert isinstance(bad.error, IndexError) and not bad.written
    assert len(good.written) == 5 and good.error is None and gone.written == []
