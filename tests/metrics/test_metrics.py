"""shared/metrics: intervals cover what they claim, and the perplexity module is right, offline and token-weighted."""

import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import shared
from shared import UserError, metrics

ROOT = Path(__file__).resolve().parents[2]


def test_shared_is_this_checkout():
    assert Path(shared.__file__).is_relative_to(ROOT)


def test_perplexity_weighs_tokens_not_rows():
    # By hand: (2 + 30 + 8) nats over (1 + 10 + 9) tokens = 2. The mean of the rows' means would be 1.963.
    found = metrics.load("perplexity").compute(predictions=[2.0, 30.0, 8.0], references=[1, 10, 9])
    assert found["loss"] == pytest.approx(2.0)
    assert found["perplexity"] == pytest.approx(math.e**2)
    assert found["perplexity_ci95"] == pytest.approx(np.exp(found["loss_ci95"]).tolist())
    # Every draw of three rows lies between the lowest and the highest row.
    assert 8 / 9 <= found["loss_ci95"][0] < 2 < found["loss_ci95"][1] <= 3


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size():
    tokens = np.array([3, 50, 7, 11])
    found = metrics.load("perplexity").compute(predictions=tokens * math.log(256), references=tokens)
    assert found["perplexity"] == pytest.approx(256)
    assert found["perplexity_ci95"] == pytest.approx([256, 256])


def test_perplexity_in_batches_and_reused():
    metric = metrics.load("perplexity")
    for _ in range(2):
        metric.add_batch(predictions=[2.0, 30.0], references=[1, 10])
        metric.add_batch(predictions=[8.0], references=[9])
        assert metric.compute()["loss"] == pytest.approx(2.0)


def test_perplexity_loads_by_path_without_any_connection(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import evaluate, sys\n"
        "print(evaluate.load(sys.argv[1]).compute(predictions=[2.0, 4.0], references=[1, 2])['loss'])\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}  # allowed to connect, and does not
    command = [sys.executable, "-c", code, str(ROOT / "shared" / "metrics" / "perplexity")]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "2.0", run.stderr


@pytest.mark.parametrize(
    ("nll", "tokens", "error", "words"),
    [
        ([], [], UserError, "split empty"),
        ([0.0], [0], UserError, "none with a token"),
        ([1.0, float("nan")], [1, 1], UserError, "Row 1 .* nan"),
        ([1.0, 1.0], [1], ValueError, "equal length"),
        ([1.0], [-1], ValueError, "negative"),
        ([1.0, 1.0], [0, 1], ValueError, "denominator of 0"),
    ],
)
def test_what_can_not_be_measured_is_an_error(nll, tokens, error, words):
    with pytest.raises(error, match=words):
        metrics.bootstrap_ratio(nll, tokens)


def test_unknown_metric_names_the_known():
    with pytest.raises(ValueError, match="Known: .*perplexity"):
        metrics.load("perplexty")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("metrics", "modules"):
        with monkeypatch.context() as patch:
            patch.setenv(f"HF_{name.upper()}_CACHE", str(tmp_path / "file" / name))
            with pytest.raises(
                UserError, match=rf"cache not writable: .*file/{name} \(Not a directory\)\. Set HF_HOME to"
            ):
                metrics.load("perplexity")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may be root's, who may write anywhere
    with pytest.raises(
        UserError, match=r"\(Permission denied\)\. Set HF_HOME to a folder of yours, or HF_METRICS_CACHE"
    ):
        metrics.load("perplexity")


def test_rows_without_tokens_change_nothing():
    with_them = metrics.bootstrap_ratio([2.0, 0.0, 30.0, 8.0], [1, 0, 10, 9])
    assert np.array_equal(with_them, metrics.bootstrap_ratio([2.0, 30.0, 8.0], [1, 10, 9]))


def test_interval_agrees_with_the_normal_one_for_a_mean():
    values = np.random.default_rng(0).normal(3, 1, 2000)
    error = values.std() / math.sqrt(len(values))
    low, high = metrics.ci95(metrics.bootstrap_ratio(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)


def test_interval_covers_the_truth_95_times_in_100():
    random, covered, runs, rows = np.random.default_rng(1), 0, 250, 80
    for seed in range(runs):
        tokens = random.integers(5, 200, rows)
        # Rows have a level of their own and noise by tokens, as conversations have; the true loss is 2.
        nll = tokens * random.normal(2, 0.4, rows) + random.normal(0, 1, rows) * np.sqrt(tokens)
        low, high = metrics.ci95(metrics.bootstrap_ratio(nll, tokens, resamples=300, seed=seed))
        covered += low <= 2 <= high
    # The standard error of this share is 1.4 %; the percentile interval is known to be a little narrow.
    assert 0.90 <= covered / runs <= 0.985


def test_memory_is_bounded_and_the_seed_decides():
    random = np.random.default_rng(2)
    nll, tokens = random.gamma(2, 100, 100_000), random.integers(1, 500, 100_000)
    tracemalloc.start()
    first = metrics.bootstrap_ratio(nll, tokens, resamples=50, seed=7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all draws at once would be 50 x 100,000 x 8 bytes = 40 MB, and 800 MB for 1,000
    assert np.array_equal(first, metrics.bootstrap_ratio(nll, tokens, resamples=50, seed=7))
    assert not np.array_equal(first, metrics.bootstrap_ratio(nll, tokens, resamples=50, seed=8))


def test_paired_finds_a_small_planted_difference_that_unpaired_intervals_hide():
    random = np.random.default_rng(3)
    tokens = random.integers(10, 100, 300)
    base = tokens * random.normal(3, 1, 300)  # rows differ far more than the systems do
    trained = base - tokens * random.normal(0.02, 0.05, 300)
    apart = [metrics.ci95(metrics.bootstrap_ratio(nll, tokens)) for nll in (base, trained)]
    assert apart[0][0] < apart[1][1]
    found = metrics.paired_difference(base, trained, tokens)
    assert found["difference"] == pytest.approx((trained.sum() - base.sum()) / tokens.sum())
    assert found["difference_ci95"][1] < 0
    assert found["p_value"] < 0.01
    assert found["better_rows"] == np.mean(trained < base)


def test_paired_direction_of_better():
    worse = metrics.paired_difference([1, 1, 0, 1], [0, 0, 0, 1], higher_is_better=True)
    assert (worse["difference"], worse["better_rows"], worse["rows"]) == (-0.5, 0, 4)
    assert metrics.paired_difference([1, 1, 0, 1], [0, 0, 0, 1])["better_rows"] == 0.5


def test_paired_finds_nothing_between_equal_systems():
    scores = np.random.default_rng(4).gamma(2, 0.1, 50)
    same = metrics.paired_difference(scores, scores.copy(), np.full(50, 3))
    assert (same["difference"], same["difference_ci95"], same["p_value"], same["better_rows"]) == (0, [0, 0], 1, 0)


def test_paired_false_alarms_are_about_5_in_100():
    random, alarms, runs = np.random.default_rng(5), 0, 250
    for seed in range(runs):
        base, trained = random.normal(3, 1, (2, 80))
        alarms += metrics.paired_difference(base, trained, resamples=300, seed=seed)["p_value"] < 0.05
    assert 0.015 <= alarms / runs <= 0.10


def test_paired_refuses_other_rows():
    with pytest.raises(ValueError, match="Not the same rows: 2 .* 3"):
        metrics.paired_difference([1, 2], [1, 2, 3])


def test_macro_f1_is_the_mean_over_classes():
    """By hand: F1 of class 0 is 2/3, of class 1 is 4/5, of class 2, never predicted, 0; class 3 does not occur."""
    predicted, labels = [0, 1, 1, 1, 0], [0, 1, 1, 0, 2]
    f1 = [2 * 1 / (2 + 2), 2 * 2 / (3 + 2), 0]
    assert metrics.macro_f1(predicted, labels) == pytest.approx(sum(f1) / 3)
    assert metrics.macro_f1([4, 4], [4, 4]) == 1
    assert metrics.macro_f1(np.array(["a", "b"]), np.array(["a", "c"])) == pytest.approx(1 / 3)
    drawn = [0, 0, 1, 3, 3, 4]
    weights = np.bincount(drawn, minlength=5)
    again = metrics.macro_f1([predicted[i] for i in drawn], [labels[i] for i in drawn])
    assert metrics.macro_f1(predicted, labels, weights) == pytest.approx(again)
