"""Who is who in chat data: known names, --roles, tables with a row for each message; from such a table to a reply."""

import csv
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import task_runs
from checkout import ROOT, train_script

from shared import UserError
from shared.training.arguments import parse

SFT = "trl.trainer.sft_config:SFTConfig"
THINGS = ("lamp", "desk", "chair", "phone", "printer", "router", "kettle", "heater")


def talks(first: str, second: str, count: int = 40) -> list[list[tuple[str, str]]]:
    """Conversations that `first` begins."""
    return [
        [
            (first, f"Good morning, this is case {i} {i * 7919}, about the {THINGS[i % 8]} of {i * 31}."),
            (second, f"Thank you, {THINGS[i % 8]} number {i * 13} {i * 17} does not work since day {i}."),
            (first, f"We send another {THINGS[i % 8]} to you in {i + 1} days, number {i * 101}."),
        ]
        for i in range(count)
    ]


def read(path, *flags):
    module = train_script("chat_sft")
    script_args, args, run_args = parse(module.ScriptArguments, SFT, [f"--dataset={path}", *flags])
    splits, report = module.load_rows(run_args, 42, None, script_args.roles)
    return [row["messages"] for rows in splits.values() for row in rows], report


def write(path, conversations, names=("ticket_id", "speaker", "text"), separator=";"):
    """A row for each message; the conversations of three tickets at a time are interleaved."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file, delimiter=separator)
        table.writerow(names)
        for start in range(0, len(conversations), 3):
            some = conversations[start : start + 3]
            for turns in zip(*some, strict=True):
                table.writerows((f"T{start + i}", who, text) for i, (who, text) in enumerate(turns))
    return path


def roles_of(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize(
    "agent", ["agent", "Support", "operator", "Bot", "AI", "model", "assistant", "Agent 7", "support-team"]
)
@pytest.mark.parametrize("customer", ["customer"])
def test_an_agent_who_speaks_first_stays_the_agent(agent, customer, tmp_path):
    rows = [{"messages": [{"role": who, "content": text} for who, text in turns]} for turns in talks(agent, customer)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, report = read(tmp_path / "rows.jsonl")
    assert len(found) == 40 and "dropped 0" in report
    for messages in found:
        assert [message["role"] for message in messages] == ["assistant", "user", "assistant"]
        assert messages[1]["content"].startswith("Thank you")


@pytest.mark.parametrize("customer", ["customer", "client", "user", "human", "Client 12"])
def test_a_customer_is_the_user(customer, tmp_path):
    found, _ = read(write(tmp_path / "rows.csv", talks("agent", customer)))
    assert {message["role"] for messages in found for message in messages[1::2]} == {"user"}


def test_one_row_a_message_is_grouped_in_the_order_of_the_file(tmp_path, caplog):
    caplog.set_level("INFO", "taskbook")
    conversations = talks("agent", "customer")
    found, report = read(write(tmp_path / "rows.csv", conversations))
    expected = {turns[0][1]: [text for _, text in turns] for turns in conversations}
    assert len(found) == 39 + 1 and report.startswith("read 40 = kept 40")
    for messages in found:
        assert [message["content"] for message in messages] == expected[messages[0]["content"]]
    assert (
        "a row is a message (conversation: ticket_id, speaker: speaker, text: text); 120 of them make 40 conv"
        in caplog.text
    )
    assert "roles: agent as assistant (80), customer as user (40)" in caplog.text


def test_columns_are_those_of_the_training_rows(tmp_path):
    """The files of a folder come in the order of their names: test before train."""
    rows = [{"prompt": turns[0][1], "completion": turns[1][1]} for turns in talks("user", "bot")]
    for name, part in (("train", [{"system": "Be kind."} | row for row in rows[:30]]), ("test", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    found, report = read(tmp_path)
    assert report.startswith("read 40 = kept 40")
    assert [messages[0]["content"] == "Be kind." for messages in found] == [True] * 30 + [False] * 10


def test_names_are_given_where_they_do_not_tell(tmp_path):
    path = write(tmp_path / "rows.csv", talks("Berater", "Kundin"), ("Vorgang", "Wer", "Was"))
    columns = ["--columns", "conversation=Vorgang", "speaker=Wer", "text=Was"]
    with pytest.raises(UserError, match=r"unknown role 'Berater' .*--roles user=... assistant=..."):
        read(path, *columns)
    found, _ = read(path, *columns, "--roles", "user=kundin", "assistant=Berater")
    assert [message["role"] for message in found[0]] == ["assistant", "user", "assistant"] and len(found) == 40
    with pytest.raises(UserError, match="nobody is called frau; found Berater, Kundin"):
        read(path, *columns, "--roles", "user=Kundin", "assistant=Berater", "user=Frau")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["user=Kundin"], "name both, user=... assistant=..."),
        (["user=a", "assistant=a"], "a has two roles"),
        (["boss=a"], "--roles boss=a: write role=name, the role one of system, user, assistant, tool."),
        (["user"], "--roles user: write role=name"),
    ],
)
def test_roles_that_say_nothing_are_one_line(flags, said, tmp_path):
    with pytest.raises(UserError) as stopped:
        read(write(tmp_path / "rows.csv", talks("agent", "customer", 3)), "--roles", *flags)
    assert said in str(stopped.value)


def test_messages_that_belong_nowhere_are_one_line(tmp_path):
    rows = [(f"{i}", "agent", "Good morning.") for i in range(9)]
    for header, said in (
        ("ticket_id,speaker,text", "ticket_id differs in each row"),
        ("x,speaker,text", "conversation=..."),
    ):
        (tmp_path / "rows.csv").write_text("\n".join([header, *map(",".join, rows)]))
        with pytest.raises(UserError, match=said):
            read(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("ticket_id,speaker,text\n1,agent,Hi\n1,customer,Hello\n,agent,Bye\n")
    with pytest.raises(UserError, match="row 3: no ticket_id"):
        read(tmp_path / "rows.csv")


def test_a_tree_of_messages_is_refused(tmp_path):
    """OASST: replies to one message, one behind the other in a tree, became one long reply."""
    rows = [
        {"message_id": f"{i}a", "parent_id": None, "tree": i, "role": "prompter", "text": f"{i}?"} for i in range(20)
    ]
    rows += [
        {"message_id": f"{i}{n}", "parent_id": f"{i}a", "tree": i, "role": "assistant", "text": f"{n} of {i}"}
        for i in range(20)
        for n in "bc"
    ]
    flags = ("--columns", "conversation=tree", "speaker=role", "text=text")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"20 messages have more than one reply \(parent_id\): a tree"):
        read(tmp_path / "rows.jsonl", *flags)
    best = [row for row in rows if not row["message_id"].endswith("c")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, best)))
    assert len(read(tmp_path / "rows.jsonl", *flags)[0]) == 20


def test_from_a_csv_of_dialogues_to_a_reply_with_two_commands(tiny, tmp_path):
    path, run = write(tmp_path / "dialogues.csv", talks("agent", "customer")), tmp_path / "run"
    options = {
        "model_name_or_path": tiny / "llama",
        "output_dir": run,
        "max_steps": 2,
        "max_length": 128,
        "max_test_rows": 4,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    trained = task_runs.command(ROOT / "tasks" / "chat_sft" / "train.py", f"--dataset={path}", *flags)
    assert trained.returncode == 0, trained.stderr[-2000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deploy.api", "--model", str(run), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            body = {
                "model": "run",
                "max_tokens": 8,
                "messages": [{"role": "user", "content": "My lamp does not work."}],
            }
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            for _ in range(240):
                try:
                    with urllib.request.urlopen(asked, timeout=60) as answer:
                        reply = json.load(answer)
                    break
                except (urllib.error.URLError, ConnectionError) as error:
                    assert server.poll() is None, server.stderr.read()
                    if isinstance(error, urllib.error.HTTPError) and error.code != 503:
                        raise
                    time.sleep(0.5)
        finally:
            server.terminate()
    assert reply["choices"][0]["message"]["role"] == "assistant" and reply["usage"]["completion_tokens"] > 0
