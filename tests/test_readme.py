"""Every command of every README runs. Training commands run as printed, with a tiny model and one step added at the end."""

import os
import re
import shlex
import subprocess

import pytest
from checkout import ROOT

READMES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("tasks/*/README.md")])
COMMANDS = sorted(
    {
        line
        for readme in READMES
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf8"), re.S)
        for line in block.splitlines()
        if line.strip()
    }
)


def test_both_languages_have_the_same_commands():
    blocks = [
        re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf8"), re.S)
        for name in ("README.md", "README.vi.md")
    ]
    assert blocks[0] == blocks[1] and blocks[0]
    assert len((ROOT / "README.md").read_text(encoding="utf8").splitlines()) < 150


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, tiny, data, tmp_path):
    words = shlex.split(command)
    if words[0] == "git":
        pytest.fail("a clone address is not known here; leave it out")
    if words[0] == "make":
        words.insert(1, "--dry-run")  # what these targets do is tested on its own; CI itself is `make test`
    else:
        words[0] = str(ROOT / ".venv" / "bin" / words[0])
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
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
