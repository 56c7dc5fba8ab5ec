"""A folder as a run leaves it, but for the model. Used by tests of what reads such folders."""

from shared.publish.results import plot_loss, write_json, write_samples


def make_run(
    folder, task="mlm_bert", rows="a" * 64, scores=None, settings="learning_rate: 0.1\n", tokenizer="{}", **results
):
    """What a run leaves, but for the model."""
    folder.mkdir(parents=True)
    about = {
        "task": task,
        "model": "pypi:minilm-l6",
        "data": "rows.csv",
        "test_rows_sha256": rows,
        "hardware": "2 cores",
    }
    results = {"run": about | {"date": "2026-11-25"}, "train_minutes": 1.25, "line": "Did it help? Yes."} | results
    write_json(folder / "all_results.json", results)
    (folder / "run.yaml").write_text(settings)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    if scores:
        write_json(folder / "scores.json", {"metric": "perplexity", "score": scores, "weight": [2] * len(scores)})
    samples = [{"prompt": "What <is>?", "base": "so it goes", "trained": f"so {folder.name} goes", "reference": None}]
    write_samples(folder / "samples.jsonl", samples)
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    plot_loss(history, folder / "loss.png")
    write_json(folder / "trainer_state.json", {"log_history": history})
    write_json(folder / "preflight.json", {"rows": 7})
    return str(folder)
