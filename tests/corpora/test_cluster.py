"""Corpora in tasks: the documents and the report of the stream, processes that are killed, Slurm, Ray, mistakes."""

import argparse
import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import slurm_commands
from datatrove.pipeline.base import PipelineStep
from test_corpora import prose, write_dump

from shared import UserError
from shared.corpora import cluster
from shared.corpora.build import build, summary
from shared.corpora.readers import documents
from shared.data.near_duplicates import shingles


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "shared.corpora.cluster", *map(str, arguments)]


def lines(path: Path) -> list[str]:
    """The lines of a file or, in the order of their names, of the files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [line for file in files for line in gzip.open(file, "rt", encoding="utf8")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of files of several kinds, what the stream makes of them, and what was planted: similarity by name."""
    folder, rng, texts, planted = tmp_path_factory.mktemp("corpus"), random.Random(1), [], {}
    for i in range(800):
        texts.append((f"{i}", prose(i, rng.randrange(100, 500))))
        if i % 5 == 4:  # a copy of any text before it, in whatever task that is; every other one too different
            name, text = rng.choice(texts)
            words, share = text.split(), (0.002, 0.015, 0.1)[i // 5 % 3]
            copy = " ".join("other" if rng.random() < share else word for word in words)
            a, b = set(shingles(text)), set(shingles(copy))
            planted[f"{i} like {name}"] = len(a & b) / len(a | b)
            texts.append((f"{i} like {name}", copy))
    texts += [
        ("broken", "half \ud83d a character " + prose(9000)),
        ("none", None),
        ("menu", "menu\n" * 90),
        ("few", "a b"),
    ]
    (folder / "in").mkdir()
    for start in range(0, len(texts), 160):
        with open(folder / "in" / f"{start // 160}.jsonl", "w") as file:
            for name, text in texts[start : start + 160]:
                file.write(json.dumps({"text": text, "source": name, "title": "\ud83d"}) + "\n")
    write_dump(folder / "in" / "wiki.xml.bz2", [(f"A{i}", 0, prose(i), "") for i in (7, 9500)])
    (folder / "in" / "empty.txt").write_text("")
    (folder / "in" / "z.zip").write_bytes(b"PK")
    (folder / "one.csv").write_text(f"text\n{prose(9600)}\n{prose(3, 120)}\n")
    sources = [str(folder / "in"), str(folder / "one.csv")]
    report = build(itertools.chain.from_iterable(map(documents, sources)), folder / "stream.jsonl.gz")
    return argparse.Namespace(
        sources=sources,
        report=report,
        lines=lines(folder / "stream.jsonl.gz"),
        planted=planted,
        png=folder / "stream.png",
    )


def check(corpus, output: Path, said: str | None = None):
    """The corpus is that of the stream, byte for byte, and so is the report; of what lay beside it only the logs are left."""
    assert lines(output) == corpus.lines
    assert (said or (output.parent / f"{output.name}.work" / "report.txt").read_text()) == summary(
        output, corpus.report
    ) + "\n"
    assert output.with_name(f"{output.name}.png").read_bytes() == corpus.png.read_bytes()
    left = {path.name for path in (output.parent / f"{output.name}.work").iterdir()}
    assert left == {"lock", "logs", "plan.json", "report.txt"}


def test_two_workers_give_the_documents_and_the_report_of_the_stream(corpus, tmp_path):
    done = subprocess.run(
        command(*corpus.sources, "--output", "new/corpus", "--workers", 2, "--tasks", 5),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check(corpus, tmp_path / "new" / "corpus", done.stdout)
    assert 3 <= len(list((tmp_path / "new" / "corpus").iterdir())) <= 5
    kept = {json.loads(line)["source"] for line in corpus.lines}
    near = [name for name, similarity in corpus.planted.items() if similarity >= 0.8]
    assert len(near) > 90 and sum(name not in kept for name in near) >= 0.95 * len(near)
    other = [name for name, similarity in corpus.planted.items() if similarity < 0.6]
    assert len(other) > 40 and kept.issuperset(other)
    # The same command has nothing to do, and says the same
    again = cluster.build_in_tasks(arguments(corpus, tmp_path / "new" / "corpus", tasks=5))
    assert again == done.stdout


def arguments(corpus, output, **options) -> argparse.Namespace:
    defaults = {"columns": [], "dataset_config": None, "split": "train", "min_words": 50, "languages": []}
    defaults |= {"executor": "local", "workers": 2, "tasks": 5, "memory": 1, "partition": None, "time": None}
    return argparse.Namespace(sources=corpus.sources, output=output, **defaults | options)


class Dies(PipelineStep):
    """Kills the process of task 1 in the middle of it, as often as told."""

    type, name = "test", "dies"

    def __init__(self, marks: Path, times: int):
        super().__init__()
        self.marks, self.times = marks, times

    def run(self, data, rank: int = 0, world_size: int = 1):
        for number, document in enumerate(data):
            if rank == 1 and number == 100 and len(deaths := list(self.marks.iterdir())) < self.times:
                (self.marks / str(len(deaths))).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


@pytest.mark.parametrize(("stages", "times"), [(("clean", "write"), 1), (("clean",), cluster.TRIES)])
def test_a_task_that_dies_is_run_again(corpus, tmp_path, monkeypatch, caplog, stages, times):
    pipelines = cluster.pipelines

    def deadly(*given):
        for name, tasks, steps in pipelines(*given):
            if name in stages:
                (tmp_path / name).mkdir(exist_ok=True)
                steps.insert(1, Dies(tmp_path / name, times))
            yield name, tasks, steps

    monkeypatch.setattr(cluster, "pipelines", lambda *given: list(deadly(*given)))
    args = arguments(corpus, tmp_path / "corpus")
    if times == cluster.TRIES:  # a task that always dies is given up; the same command goes on where it was
        with pytest.raises(UserError, match="Tasks failed, see .*logs. The same command goes on from there"):
            cluster.build_in_tasks(args)
        assert not (tmp_path / "corpus").exists()
    cluster.build_in_tasks(args)
    assert [len(list((tmp_path / name).iterdir())) for name in stages] == [times] * len(stages)
    assert caplog.text.count("A process was killed") == times * len(stages)
    check(corpus, tmp_path / "corpus")


def test_the_command_goes_on_after_kill_9(corpus, tmp_path):
    words = command(*corpus.sources, "--output", tmp_path / "corpus", "--workers", 1)
    ended = tmp_path / "corpus.work" / "logs" / "clean" / "completions"
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (ended.exists() and len(list(ended.iterdir())) >= 2):
        assert first.poll() is None, "it was at its end before it could be killed"
        time.sleep(0.01)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1], "a worker outlived its parent"
    assert not (tmp_path / "corpus").exists()
    before = {path.name: path.stat().st_mtime_ns for path in ended.iterdir()}
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in ended.iterdir()}.items()
    check(corpus, tmp_path / "corpus")


def test_slurm_gets_what_is_not_done_and_its_jobs_do_it(corpus, tmp_path, monkeypatch):
    commands = slurm_commands.write(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    slurm = {"executor": "slurm", "partition": "cpu", "time": "1:00:00", "tasks": 2}
    args = arguments(corpus, tmp_path / "corpus", **slurm)

    def submitted() -> list[str]:
        assert cluster.build_in_tasks(args) == ""
        scripts = [path.read_text() for path in sorted((commands / "jobs").iterdir(), key=lambda path: int(path.name))]
        return [script for script in scripts if "launch_pickled_pipeline" in script]

    def run_job(script: str):
        environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "1"}
        subprocess.run(["bash", "-c", script], env={**os.environ, **environment}, check=True, capture_output=True)

    jobs = submitted()
    assert [re.search("--array=0-([0-9]+)", job)[1] for job in jobs] == ["1", "11", "0", "1", "0"]
    assert "afterok" not in jobs[0] and all("--dependency=afterok:" in job for job in jobs[1:])
    assert all("--partition=cpu" in job and "--kill-on-invalid-dep=yes" in job and "--qos" not in job for job in jobs)
    run_job(jobs[0])
    ended = tmp_path / "corpus.work" / "logs" / "clean" / "completions"
    assert [path.name for path in ended.iterdir()] == ["00000"]
    (commands / "queue").write_text("1 cpu R")
    with pytest.raises(UserError, match="Jobs of this corpus wait or run"):
        cluster.build_in_tasks(args)
    (commands / "queue").unlink()
    jobs = submitted()[5:]  # its second job was lost
    assert [re.search("--array=0-([0-9]+)", job)[1] for job in jobs] == ["0", "11", "0", "1", "0"]
    run_job(jobs[0])
    assert {path.name for path in ended.iterdir()} == {"00000", "00001"}
    args.executor = "local"  # what is left, here
    cluster.build_in_tasks(args)
    check(corpus, tmp_path / "corpus")


def test_tasks_are_of_about_equal_size_and_in_order(tmp_path):
    for name, size in (("a", 10), ("b", 10), ("c", 30), ("d", 1000), ("e", 10)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    for tasks, expected in ((1, ["abcde"]), (2, ["abc", "de"]), (5, ["abc", "d", "e"]), (100, ["abc", "d", "e"])):
        groups = cluster.plan_files([str(tmp_path)], tasks)
        assert ["".join(Path(path).stem for path, *_ in group) for group in groups] == expected
    sources = [str(tmp_path / "e.txt"), "docs:prose", str(tmp_path / "a.txt")]
    groups = cluster.plan_files(sources, 100)
    assert [name or path for group in groups for path, name, *_ in group] == ["e.txt", "docs:prose", "a.txt"]


def test_mistakes_are_answered_in_one_line(corpus, tmp_path, capsys):
    (tmp_path / "body.csv").write_text("body\nwords\n")

    def said(*words) -> str:
        with pytest.raises(SystemExit) as ended:
            cluster.main([*map(str, words)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    output = ("--output", tmp_path / "out", "--workers", 1)
    assert "no column text: found body" in said(tmp_path / "body.csv", *output)  # raised in a task
    assert "out.work was begun with other min_words, files: delete it" in said(
        *corpus.sources, *output, "--min_words", 9
    )
    assert "nowhere.txt: no such file" in said("nowhere.txt", *output)
    assert "a site is asked slowly, by one machine" in said("https://example.org", *output)
    assert "expected the name of a folder" in said(*corpus.sources, "--output", tmp_path / "o.jsonl.gz")
    assert f"lies in {tmp_path}, whose files are read" in said(tmp_path, *output)
    assert "is there already" in said(*corpus.sources, "--output", tmp_path)
    assert "cannot be written" in said(*corpus.sources, "--output", tmp_path / "body.csv" / "out")
    assert "needs --partition and --time" in said(*corpus.sources, *output, "--executor", "slurm")
    (tmp_path / "nothing").mkdir()
    assert "nothing: no file lies there" in said(tmp_path / "nothing", *output)
    (tmp_path / "few.txt").write_text("few words")
    assert "No document is left" in said(tmp_path / "few.txt", "--output", tmp_path / "few")
    assert not (tmp_path / "few").exists()


def test_a_folder_that_datasets_saved_is_one_task(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "rows")
    assert cluster.plan_files([str(tmp_path / "rows")], 4) == [[(str(tmp_path / "rows"), None, 0, 0)]]
