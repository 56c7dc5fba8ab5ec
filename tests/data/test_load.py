"""shared/data/load.py on names of the Hub: revisions with slashes, scripts, configurations, gates; each refusal in one line."""

import json

import pytest
import task_runs

COPY = "Skylion007/openwebtext@refs/convert/parquet"
WANTED = {  # name, configuration -> splits and their number of rows, or what the refusal says
    # first: once the copy is in its cache, `datasets` takes that instead of the script
    ("Skylion007/openwebtext", None): ["Skylion007/openwebtext is a script (openwebtext.py)", f"--dataset {COPY}"],
    (COPY, None): {"train": 60},
    (COPY, "plain_text"): {"train": 60},
    (f"{COPY}-of-old", None): ["not found on the Hub"],
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): {"train": 60},
    ("HuggingFaceFW/fineweb-edu", None): ["sample-10BT", "--dataset_config"],
    ("HuggingFaceFW/fineweb-edu", "sample-10MT"): ["sample-10BT", "--dataset_config"],
    ("no/such", None): ["not found on the Hub"],
    ("alice/gated", None): ["alice/gated is gated: accept its terms on its page on the Hub"],
}
PROGRAM = """
import json
from shared import UserError
from shared.data.load import load_data, load_stream
found = []
for name, config in json.loads(NAMES):
    for load in (load_data, load_stream):
        try:
            found.append({split: sum(1 for _ in rows) for split, rows in load(name, config).items()})
        except UserError as error:
            found.append(str(error))
print(json.dumps(found))
"""


@pytest.fixture
def found(hub, tmp_path):
    """What whole and streamed loading of each WANTED name gives, in one program, to a user who was not let in."""
    hub.create("datasets/alice/gated", gated="manual")
    (tmp_path / "program.py").write_text(PROGRAM.replace("NAMES", repr(json.dumps(list(WANTED)))))
    done = task_runs.command(tmp_path / "program.py", **hub.env_for("other", home=tmp_path / "home"))
    del hub.repos["datasets/alice/gated"]
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(WANTED, zip(answers[::2], answers[1::2], strict=True), strict=True))


def test_names_of_the_hub_load_or_say_why_not(found):
    for wanted, answers in found.items():
        for answer in answers:
            if isinstance(WANTED[wanted], dict):
                assert answer == WANTED[wanted], wanted
            else:
                missing = [words for words in WANTED[wanted] if words not in answer]
                assert not missing and "\n" not in answer, (wanted, missing, answer)
