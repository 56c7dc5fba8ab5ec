"""`python -m shared.compare`: one table, the best marked only where numbers can be compared, two runs in detail."""

import json
import re
from pathlib import Path

import pytest
import task_runs
from checkout import ROOT
from finished_run import make_run

from shared.compare.readme import FIGURES
from shared.compare.table import main
from shared.publish.results import write_samples


def shown(capsys, *argv) -> list[dict]:
    main([str(each) for each in argv])
    lines = [
        re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        for line in capsys.readouterr().out.splitlines()
        if line[:1] == "|"
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_best_is_marked_on_the_same_rows_alone(tmp_path, capsys):
    same = {"test_perplexity": 12.5, "test_perplexity_ci95": [11.6, 13.3], "base_perplexity": 4149.0}
    runs = [
        make_run(tmp_path / "one", **same, baseline_trigram_perplexity=43.6),
        make_run(tmp_path / "two", **same | {"test_perplexity": 11.0}),
        make_run(tmp_path / "other_rows", rows="b" * 64, **same | {"test_perplexity": 1.0}),
        make_run(
            tmp_path / "other_tokenizer",
            tokenizer='{"model": 1}',
            **same | {"test_perplexity": 2.0, "test_bits_per_byte": 1.1},
        ),
        make_run(
            tmp_path / "classes", task="classify_bert", test_accuracy=0.7, test_macro_f1=0.6, baseline_macro_f1=0.1
        ),
    ]
    table = {row["Model"].split(" ")[0]: row for row in shown(capsys, *runs)}
    assert list(table) == ["classes", "one", "other_rows", "other_tokenizer", "two"], "by task, then by name"
    assert table["one"]["Perplexity"] == "12.5 (11.6 to 13.3); before 4,149; trigram 43.6"
    assert [name for name, row in table.items() if "**" in row["Perplexity"]] == ["two"]
    assert table["classes"]["Macro-F1"] == "0.600; baseline 0.100" and table["classes"]["Perplexity"] == ""
    assert table["one"]["Training"] == "1.2 min" and table["one"]["Hardware"] == "2 cores"


def test_a_metric_of_other_rows_is_compared_on_those(tmp_path, capsys):
    """A chat model's ROUGE-L is of the mixture's summaries, its perplexity of the conversations."""
    runs = [
        make_run(
            tmp_path / name, test_perplexity=9.0 + i, test_rougeL=0.2 + i / 10, metric_rows_sha256={"rougeL": rows}
        )
        for i, (name, rows) in enumerate({"one": "a" * 64, "two": "a" * 64, "three": "b" * 64}.items())
    ]
    table = {row["Model"].split(" ")[0]: row for row in shown(capsys, *runs)}
    assert [name for name, row in table.items() if "**" in row["Perplexity"]] == ["one"]
    assert [name for name, row in table.items() if "**" in row["ROUGE-L"]] == ["two"]


def test_runs_of_one_name_are_told_apart_and_equals_are_both_best(tmp_path, capsys, monkeypatch):
    """The same folder, named twice, is one run; rows of which another number of tokens was scored are not compared."""
    made = [make_run(tmp_path / who / "run", scores=[4.0] * 12, test_perplexity=9.0) for who in ("ann", "bob")]
    make_run(tmp_path / "cut", scores=[1.0] * 12, test_perplexity=2.0)
    (tmp_path / "cut" / "scores.json").write_text((tmp_path / "cut" / "scores.json").read_text().replace("2", "1"))
    monkeypatch.chdir(made[1])
    table = {row["Model"].split(" ")[0]: row["Perplexity"] for row in shown(capsys, *made, tmp_path / "cut", ".", "./")}
    assert table == {"ann/run": "**9.00**", "bob/run": "**9.00**", "cut": "2.00"}
    main(made)
    assert "paired test over 12 rows: bob/run is better on 0%" in capsys.readouterr().out
    main([".", "../../ann/../bob/run"])
    out = capsys.readouterr().out
    assert out.count("| run (from") == 1 and "**" not in out, out


def test_two_runs_in_detail_and_a_report_that_can_be_mailed(tmp_path, capsys):
    one = make_run(tmp_path / "one", scores=[4.0, 5, 6] * 5, test_perplexity=9.0)
    two = make_run(tmp_path / "two", scores=[3.0, 4, 5] * 5, test_perplexity=8.0, settings="learning_rate: 0.2\n")
    main([one, two, "--output", str(tmp_path / "new" / "compare.md"), "--html", str(tmp_path / "compare.html")])
    out = capsys.readouterr().out
    assert "`learning_rate`: 0.1 in one, 0.2 in two" in out and "one: so one goes" in out
    assert "paired test over 15 rows: two is better on 100%; difference in loss -0.500 to -0.500 (95 %): clear" in out
    assert (tmp_path / "new" / "compare.md").read_text() == out
    page = (tmp_path / "compare.html").read_text()
    assert "so <mark>two</mark> goes" in page and "What &lt;is&gt;?" in page and page.count("data:image/png") == 2
    assert not re.search(r"https?:|src=\"(?!data:)|<script", page)
    three = make_run(tmp_path / "three", scores=[3.0] * 15, rows="c" * 64, test_perplexity=8.0)
    main([one, three])
    assert "no paired test: they were not scored on the same rows" in capsys.readouterr().out


def test_a_paired_test_wants_what_was_scored_to_be_the_same_and_ten_rows(tmp_path, capsys):
    def said(name, scores, **results) -> str:
        """Of two runs, the second of which differs in `results`."""
        make_run(tmp_path / name / "one", scores=scores, test_perplexity=9.0, rows=results.get("rows", "a" * 64))
        make_run(tmp_path / name / "two", scores=[each - 1 for each in scores], test_perplexity=8.0, **results)
        main([str(tmp_path / name / run) for run in ("one", "two")])
        return re.search("- ((no )?paired test.*)", capsys.readouterr().out)[1]

    assert said("few", [4.0] * 3).endswith("(95 %): not clear, fewer than 10 rows show nothing")
    assert said("many", [4.0] * 10).endswith("(95 %): clear")
    assert "is unknown, the runs are of an older version" in said("old", [4.0] * 12, rows=None)
    assert "another tokenizer" in said("tokenizer", [4.0] * 12, tokenizer='{"model": 1}')
    cut = '{"truncation": {"max_length": 8}, "padding": {"pad_id": 0}}'
    assert said("cut", [4.0] * 12, tokenizer=cut).endswith("clear"), "the same tokenizer"


def test_ranks_are_compared_among_as_many_passages(tmp_path, capsys):
    runs = []
    for i, (name, passages) in enumerate({"one": 90, "two": 90, "few": 9}.items()):
        about = {"task": "rag_docs", "test_rows": 12, "documents": passages // 3, "passages": passages}
        run = Path(make_run(tmp_path / name, test_mrr=0.5 + i / 10, test_recall_at_5=0.5 + i / 10, **about))
        (run / "scores.json").write_text(json.dumps({"metric": "mrr", "score": [0.5 + i / 10] * 12, "weight": None}))
        runs.append(str(run))
    table = {row["Model"].split(" ")[0]: row for row in shown(capsys, *runs)}
    for metric in ("MRR", "Recall at 5"):
        assert [name for name, row in table.items() if "**" in row[metric]] == ["two"]
    for pair, found in ((runs[:2], "paired test over 12 rows"), (runs[1:], "not as many passages were searched")):
        main(pair)
        assert found in capsys.readouterr().out


def test_numbers_of_cut_rows_are_not_the_best(tmp_path, capsys):
    """Of summaries and preferences scores.json holds other scores: how many tokens there were tells that rows were cut."""
    runs = []
    for name, tokens, perplexity in (("whole", 900, 9.0), ("longer", 900, 8.0), ("cut", 90, 2.0)):
        about = {"test_perplexity": perplexity, "test_margin": 1 / perplexity, "test_rows": 12, "test_tokens": tokens}
        run = Path(make_run(tmp_path / name, task="dpo_chat", **about))
        scores = {"metric": "margin", "score": [1 / perplexity] * 12, "weight": None}
        (run / "scores.json").write_text(json.dumps(scores))
        runs.append(str(run))
    table = {row["Model"].split(" ")[0]: row for row in shown(capsys, *runs)}
    assert [name for name, row in table.items() if "**" in row["Perplexity"]] == ["longer"]
    assert [name for name, row in table.items() if "**" in row["Margin"]] == ["longer"]
    main(runs[1:])
    assert "rows cut at another length" in capsys.readouterr().out


def test_a_damaged_file_of_a_run_is_one_line(tmp_path, capsys):
    for name, content in (
        ("all_results.json", "[]"),
        ("scores.json", "[1]"),
        ("run.yaml", "a: ["),
        ("samples.jsonl", '{"prompt": "cut'),
        ("samples.jsonl", '{"prompt": "What?"}'),
        ("preflight.json", ""),
        ("tokenizer.json", "\udcff"),
    ):
        runs = [make_run(tmp_path / f"{name} {len(content)}" / each, test_perplexity=9.0) for each in ("one", "two")]
        (Path(runs[1]) / name).write_bytes(content.encode("utf8", "surrogateescape"))
        with pytest.raises(SystemExit) as ended:
            main([*runs, "--html", str(tmp_path / "compare.html")])
        assert ended.value.code == 2
        assert re.fullmatch(rf"error: \S+.*two/{name}: is not readable \(.+\)\.\n", capsys.readouterr().err), name


def test_samples_are_paired_by_temperature_and_stay_text(tmp_path, capsys):
    runs = []
    for name, end in (("one", "\\<script> ![](//x.y)"), ("two", "\u2028\x85\x0c[a](//x.y)")):
        run = Path(make_run(tmp_path / name, test_perplexity=9.0))
        keys = {"prompt": "Go", "base": None, "reference": None}
        drawn = [keys | {"trained": f"{name} {warm}{end}", "temperature": warm} for warm in (0.0, 0.8)]
        write_samples(run / "samples.jsonl", [*drawn, keys | {"trained": f"{name} on", "prompt": "Other"}])
        runs.append(str(run))
    main([*runs, "--html", str(tmp_path / "compare.html")])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("- asked", "- one", "- two"))] == [
        "- asked at temperature 0.0: Go",
        r"- one: one 0.0\\\<script> ![]\(//x.y)",
        r"- two: two 0.0 [a]\(//x.y)",
        "- asked at temperature 0.8: Go",
        r"- one: one 0.8\\\<script> ![]\(//x.y)",
        r"- two: two 0.8 [a]\(//x.y)",
        "- asked: Other",
        "- one: one on",
        "- two: two on",
    ]
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<b>Prompt at temperature 0.8</b>") == 2 and r"0.8\&lt;script&gt; ![](//x.y)" in page


def test_a_file_that_cannot_be_written_or_read_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", test_accuracy=0.5)
    (tmp_path / "file").write_text("")
    for option in ("--output", "--html", "--readme"):
        with pytest.raises(SystemExit) as ended:
            main([run, option, str(tmp_path / "file" / "compare.md")])
        assert ended.value.code == 2
        assert re.fullmatch(r"error: \S+: \w[\w ]+; name another file\.\n", capsys.readouterr().err)


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run", test_accuracy=0.5)
    (tmp_path / "docs.sqlite").write_bytes(b"an index, where make ask leaves it")
    main([str(each) for each in sorted(tmp_path.iterdir())])
    assert capsys.readouterr().err.count("left out:") == 2
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "all_results.json").write_text("{")
    for name, said in (
        ("empty", "no all_results.json"),
        ("broken", "is not readable"),
        ("nowhere/at/all", "no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / name)])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_run_on_the_hub_by_name(hub, tmp_path):
    run = Path(make_run(tmp_path / "far", test_accuracy=0.5))
    (run / "README.md").write_text("---\nlicense: mit\n---\n")
    (run / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")  # an empty file of that kind
    pushed = task_runs.command("-m", "shared.publish.hub", "push", run, "--repo_id", "alice/far", **hub.env)
    assert pushed.returncode == 0, pushed.stderr
    compared = task_runs.command("-m", "shared.compare", "alice/far", run, **hub.env)
    assert compared.returncode == 0 and "| alice/far (from pypi:minilm-l6) | mlm_bert |" in compared.stdout, compared


@pytest.mark.parametrize("name", ["README.md", "README.vi.md"])
def test_the_table_of_the_readme_is_written_from_the_runs(name, tmp_path, capsys):
    """`make results`: all tasks' figures and nothing else, as many decimals as there were."""
    readme = tmp_path / name
    readme.write_text((ROOT / name).read_text("utf8"), "utf8")
    runs = []
    for i, (task, keys) in enumerate(FIGURES.items()):
        share = 0.01 if keys[0].endswith(("accuracy", "mrr")) else 1
        figures = {key: share * (10 * i + 1.25 + j) for j, key in enumerate(keys)}
        times = {"train_minutes": i + 0.26, "run_minutes": i + 1.26, "peak_memory_gb": i + 2.26}
        runs.append(make_run(tmp_path / task, task=task, **figures | times))
    own = make_run(tmp_path / "my_task", test_f1=0.5)
    main([*runs, own, "--readme", str(readme)])
    before, after = ((ROOT / name).read_text("utf8").split("\n"), readme.read_text("utf8").split("\n"))
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split(",")[0] for _, new in changed] == [f"| {task}" for task in FIGURES]
    for old, new in changed:
        assert re.sub(r"\d[\d,.]*\d|\d", "", old.split("|", 3)[3]) == re.sub(
            r"\d[\d,.]*\d|\d", "", new.split("|", 3)[3]
        )
        assert old.split("|")[:3] == new.split("|")[:3]
    chat = next(new for _, new in changed if "chat_sft" in new)
    assert "| 31 | " not in chat and "| 31.2 | 32 (unigram) | 33.2 | 3.3 " in chat, chat
    assert "| 41.2 % | 42.2 % (" in next(new for _, new in changed if "dpo_chat" in new)
    main([*runs, "--readme", str(readme)])
    assert readme.read_text("utf8").split("\n") == after
    (tmp_path / "chat_sft" / "all_results.json").write_text('{"test_perplexity": 3.0}')
    with pytest.raises(SystemExit):
        main([runs[3], "--readme", str(readme)])
    assert "all_results.json: it has no base_perplexity" in capsys.readouterr().err
    assert readme.read_text("utf8").split("\n") == after
