"""tasks/chat_sft with the files that people bring: each is read as its format means it, or refused with column, row and value."""

import csv
import gzip
import json
from types import SimpleNamespace

import chat_families
import chats
import formats
import mixture
import pytest
import speakers
from datasets import Dataset, DatasetDict

from shared import UserError
from shared.data.cleaning import clean_dataset

ROWS = 40
ASKED, SAID = "Where is number {}?", "It is behind number {}."


def chat(template=chat_families.QWEN25, special=(*chat_families.IM, *chat_families.TOOLS)) -> chats.Chat:
    return chats.Chat(chat_families.tokenizer_of(list(special), None, "<|im_end|>", None, template))


def refusing(template=chat_families.MISTRAL) -> chats.Chat:
    return chats.Chat(chat_families.tokenizer_of(["<s>", "</s>", "<unk>"], "<s>", "</s>", None, template))


def turns(*pairs, who="role", text="content"):
    return [{who: role, text: content} for role, content in pairs]


def plain(i: int) -> list[dict]:
    return turns(("user", ASKED.format(i)), ("assistant", SAID.format(i)))


def read(path, columns=(), under=None):
    """Kept rows and the report, by the way of train.py."""
    under = under or chat()
    rows = formats.read(str(path))["train"]
    names = formats.columns_of(rows)
    reader = formats.Reader("rows", names, list(columns), formats.talk_of_people("rows", rows, names, list(columns)))

    def convert(row):
        found = reader(row)
        return found if isinstance(found, str) else under.fit(found)

    data, report = clean_dataset({"train": rows}, convert, path.name)
    return [{k: v for k, v in row.items() if v is not None} for row in data["train"]], report, reader, under


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def learned(row: dict, under: chats.Chat) -> str:
    return under.tokenizer.decode([label for label in under.tokenize(row, 4096)["labels"] if label != -100])


HELLO = ("assistant", "Hello, how can I help?")
WRONG = ("assistant", "WRONG")
EVERY = SAID + "<|im_end|>"
# name: a row, what of it is trained, with {} for its number, and what must be in what it is shown
READ = {
    "plain": (lambda i: {"messages": plain(i)}, EVERY, ASKED),
    "capital_roles": (
        lambda i: {"messages": turns(("User", ASKED.format(i)), ("Assistant", SAID.format(i)))},
        EVERY,
        "<|im_start|>user\n" + ASKED,
    ),
    "assistant_greets_in_capitals": (
        lambda i: {
            "conversations": turns(
                ("Assistant", "Hello!"),
                ("User", ASKED.format(i)),
                ("Assistant", SAID.format(i)),
                ("User", "Thanks."),
                who="from",
                text="value",
            )
        },
        EVERY,
        "<|im_start|>assistant\nHello!",
    ),
    "chatgpt_first": (
        lambda i: {
            "conversations": turns(
                ("chatgpt", "Hello!"), ("human", ASKED.format(i)), ("chatgpt", SAID.format(i)), who="from", text="value"
            )
        },
        EVERY,
        "<|im_start|>user\n" + ASKED,
    ),
    "bot_and_bard": (
        lambda i: {
            "conversations": turns(
                ("human", ASKED.format(i)),
                (("bot", "Bard", "AI", "model")[i % 4], SAID.format(i)),
                who="from",
                text="value",
            )
        },
        EVERY,
        "<|im_start|>user\n" + ASKED,
    ),
    "developer": (
        lambda i: {"messages": [*turns(("developer", "Be brief.")), *plain(i)]},
        EVERY,
        "<|im_start|>system\nBe brief.<|im_end|>",
    ),
    "consecutive": (
        lambda i: {
            "messages": turns(
                ("user", ASKED.format(i)), ("user", "Quickly!"), ("assistant", SAID.format(i)), ("assistant", "All?")
            )
        },
        SAID + "\nAll?<|im_end|>",
        ASKED + "\nQuickly!",
    ),
    "weight_zero": (
        lambda i: {
            "messages": [
                *turns(("user", "x?")),
                {**turns(WRONG)[0], "weight": 0},
                *plain(i)[:1],
                {**plain(i)[1], "weight": 1},
            ]
        },
        EVERY,
        "WRONG<|im_end|>",
    ),
    "train_false": (
        lambda i: {
            "conversations": [
                *turns(("human", "x?"), who="from", text="value"),
                {"from": "gpt", "value": "WRONG", ("train", "loss")[i % 2]: False},
                *turns(("human", ASKED.format(i)), ("gpt", SAID.format(i)), who="from", text="value"),
            ]
        },
        EVERY,
        "WRONG<|im_end|>",
    ),
    "system_column": (
        lambda i: {"system": "A pirate.", "messages": plain(i)},
        EVERY,
        "<|im_start|>system\nA pirate.<|im_end|>",
    ),
    "history": (
        lambda i: {
            "instruction": ASKED.format(i),
            "input": "",
            "output": SAID.format(i),
            "system": "Alpaca.",
            "history": [["Old?", "Yes."]],
        },
        "Yes.<|im_end|>" + EVERY,
        "Alpaca.<|im_end|>\n<|im_start|>user\nOld?<|im_end|>",
    ),
    "dolly": (
        lambda i: {"instruction": ASKED.format(i), "context": "The map.", "response": SAID.format(i)},
        EVERY,
        ASKED + "\n\nThe map.",
    ),
    "parts": (
        lambda i: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ASKED.format(i)}]},
                {"role": "assistant", "content": SAID.format(i)}
                if i % 2
                else {"role": "assistant", "content": [{"type": "text", "text": SAID.format(i)}]},
            ]
        },
        EVERY,
        ASKED,
    ),
    "number": (lambda i: {"question": ASKED.format(i), "answer": i + 1000}, "1{:03}<|im_end|>", ASKED),
    "whole_decimals": (  # as pandas writes a column of whole numbers in which a cell is empty
        lambda i: {"instruction": ASKED.format(i), "input": float("nan"), "output": i + 1000.0},
        "1{:03}<|im_end|>",
        "<|im_start|>user\n" + ASKED + "<|im_end|>",
    ),
    "some_numbers": (
        lambda i: {"question": ASKED.format(i), "answer": SAID.format(i) if i != 1 else f"It is behind number {i}."},
        EVERY,
        ASKED,
    ),
    "boolean": (lambda i: {"question": ASKED.format(i), "answer": True}, "true<|im_end|>", ASKED),
    "json_text": (lambda i: {"messages": json.dumps(plain(i))}, EVERY, ASKED),
    "python_text": (lambda i: {"messages": str(plain(i))}, EVERY, ASKED),
    "pairs": (lambda i: {"messages": [["user", ASKED.format(i)], ["assistant", SAID.format(i)]]}, EVERY, ASKED),
    "answered_pairs": (lambda i: {"conversation": [[ASKED.format(i), SAID.format(i)]]}, EVERY, ASKED),
    "chosen": (lambda i: {"prompt": ASKED.format(i), "chosen": SAID.format(i), "rejected": "WRONG"}, EVERY, ASKED),
    "chosen_messages": (lambda i: {"chosen": plain(i), "rejected": turns(("user", "x"), WRONG)}, EVERY, ASKED),
    "chosen_messages_and_prompt": (
        lambda i: {"prompt": ASKED.format(i), "chosen": plain(i), "rejected": turns(("user", "x"), WRONG)},
        EVERY,
        ASKED,
    ),
    "mixed_columns": (
        lambda i: (
            {"messages": plain(i)}
            if i % 2
            else {"conversations": turns(("human", ASKED.format(i)), ("gpt", SAID.format(i)), who="from", text="value")}
        ),
        EVERY,
        ASKED,
    ),
    "mixed_keys": (
        lambda i: {
            "messages": plain(i)
            if i % 2
            else turns(("human", ASKED.format(i)), ("gpt", SAID.format(i)), who="from", text="value")
        },
        EVERY,
        ASKED,
    ),
    "two_columns": (
        lambda i: dict(
            zip((("user", "assistant"), ("input", "output"))[0], (ASKED.format(i), SAID.format(i)), strict=True)
        ),
        EVERY,
        ASKED,
    ),
    "input_output": (lambda i: {"input": ASKED.format(i), "output": SAID.format(i)}, EVERY, ASKED),
    "instruction_response": (lambda i: {"instruction": ASKED.format(i), "response": SAID.format(i)}, EVERY, ASKED),
    "code": (
        lambda i: {"prompt": ASKED.format(i), "completion": f"    def f{i}():\n        return 1\n\n    # end  "},
        "    def f{}():\n        return 1\n\n    # end<|im_end|>",
        ASKED,
    ),
    "single_blank": (lambda i: {"prompt": ASKED.format(i), "completion": " " + SAID.format(i)}, EVERY, ASKED),
    "calls": (
        lambda i: (
            {
                "messages": [
                    *plain(i)[:1],
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c",
                                "type": "function",
                                "function": {"name": "find", "arguments": json.dumps({"what": i})},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": "7"},
                    *plain(i)[1:],
                ]
            }
            if i % 2
            else {"messages": plain(i)}
        ),
        EVERY,
        ASKED,
    ),
    "function_call": (
        lambda i: {
            "tools": json.dumps([{"name": "find"}]),
            "conversations": turns(
                ("human", ASKED.format(i)),
                ("function_call", '{"name": "find", "arguments": {"what": 1}}'),
                ("observation", "7"),
                ("gpt", SAID.format(i)),
                who="from",
                text="value",
            ),
        },
        EVERY,
        '<tool_call>\n{{"name": "find", "arguments": {{"what": 1}}}}\n</tool_call>',
    ),
    "written_call": (
        lambda i: {
            "conversations": turns(
                ("human", ASKED.format(i)),
                ("gpt", 'I look.\n<tool_call>\n{"name": "find", "arguments": {"what": 1}}\n</tool_call>'),
                ("tool", "<tool_response>\n7\n</tool_response>"),
                ("gpt", SAID.format(i)),
                who="from",
                text="value",
            )
        },
        EVERY,
        '<tool_call>\n{{"name": "find", "arguments": {{"what": 1}}}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>",
    ),
    "loss_mask": (
        lambda i: {
            "messages": [
                *turns(("user", "x?")),
                {**turns(WRONG)[0], ("loss_mask", "loss_weight", "train_on_turn")[i % 3]: 0},
                *plain(i),
            ]
        },
        EVERY,
        "WRONG<|im_end|>",
    ),
    "assistants_api": (
        lambda i: {
            "messages": [
                {
                    "role": turn["role"],
                    "content": [{"type": "text", "text": {"value": turn["content"], "annotations": []}}],
                }
                for turn in plain(i)
            ]
        },
        EVERY,
        ASKED,
    ),
    "columns_of_turns": (
        lambda i: {"messages": {key: [turn[key] for turn in plain(i)] for key in ("role", "content")}},
        EVERY,
        ASKED,
    ),
    "question_and_chosen": (
        lambda i: {"question": ASKED.format(i), "chosen": SAID.format(i), "rejected": "WRONG"},
        EVERY,
        ASKED,
    ),
    "chosen_as_json": (
        lambda i: {"prompt": ASKED.format(i), "chosen": json.dumps(plain(i)), "rejected": "WRONG"},
        EVERY,
        ASKED,
    ),
    "one_chosen_turn": (
        lambda i: {
            "conversations": turns(("human", ASKED.format(i)), who="from", text="value"),
            "chosen": {"from": "gpt", "value": SAID.format(i)},
            "rejected": {"from": "gpt", "value": "WRONG"},
        },
        EVERY,
        ASKED,
    ),
    "one_blank_before_each_line": (
        lambda i: {"prompt": ASKED.format(i), "completion": f" x = {i}\n y = 2"},
        " x = {}\n y = 2<|im_end|>",
        ASKED,
    ),
    "prompt_of_messages_and_a_text": (
        lambda i: {"prompt": [*turns(("system", "Be brief.")), *plain(i)[:1]], "completion": SAID.format(i)},
        EVERY,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + ASKED,
    ),
    "no_messages_but_a_prompt": (
        lambda i: (
            {"messages": plain(i)}
            if i % 2
            else {"messages": [], "prompt": ASKED.format(i), "completion": SAID.format(i)}
        ),
        EVERY,
        ASKED,
    ),
    "spoken": (
        lambda i: {"chosen": f"\n\nHuman: {ASKED.format(i)}\n\nAssistant: {SAID.format(i)}", "rejected": "WRONG"},
        EVERY,
        "<|im_start|>user\n" + ASKED,
    ),
    "spoken_prompt": (
        lambda i: {"prompt": f"\n\nHuman: {ASKED.format(i)}\n\nAssistant:", "response": f" {SAID.format(i)}"},
        EVERY,
        "<|im_start|>user\n" + ASKED + "<|im_end|>",
    ),
    "code_in_a_fence": (
        lambda i: {
            "prompt": ASKED.format(i),
            "completion": f"Two:\n\n\n\n```python\nx = {i}\n\n\ny = 2\n```\n\n\nDone.",
        },
        "Two:\n\n```python\nx = {}\n\n\ny = 2\n```\n\nDone.<|im_end|>",
        ASKED,
    ),
    "two_results": (
        lambda i: {
            "messages": [
                *plain(i)[:1],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "find", "arguments": {}}}] * 2,
                },
                *turns(("tool", "7"), ("tool", "8")),
                *plain(i)[1:],
            ]
        },
        EVERY,
        "<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>user\n<tool_response>\n8\n</tool_response>",
    ),
    "tools_column": (
        lambda i: {"tools": '[{"name": "find"}]', "messages": plain(i)},
        EVERY,
        '# Tools\n{{"name": "find"}}',
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read(name, tmp_path):
    make, expected, shown = READ[name]
    rows, report, reader, under = read(write(tmp_path / "rows.jsonl", [make(i) for i in range(ROWS)]))
    assert (report.kept, report.dropped.total()) == (ROWS, 0)
    for i in (0, 1, 2, ROWS - 1):
        assert learned(rows[i], under) == expected.format(i)
        assert shown.format(i) in under.tokenizer.decode(under.tokenize(rows[i], 4096)["input_ids"])
    assert all(turn["role"] in ("system", "user", "assistant", "tool") for row in rows for turn in row["messages"])


THREE = ("bad: ", "first row")
# name: a row, parts of the one line that refuses the file
REFUSED = {
    "image": (
        lambda i: {"messages": [{"role": "user", "content": [{"type": "image"}]}, *plain(i)[1:]]},
        ("image in a text", "row 1, messages[0].content"),
    ),
    "dict_answer": (
        lambda i: {"prompt": ASKED.format(i), "completion": {"steps": i}},
        ("wrong type", 'row 1, completion = {"steps": 0}', "40 of 40 rows"),
    ),
    "unknown_role": (
        lambda i: {"messages": turns(("narrator", "x"), ("user", "y"), ("assistant", "z"))},
        ("unknown role 'narrator'", "row 1, messages[0]"),
    ),
    "two_unknown_names": (
        lambda i: {"messages": turns(("seeker", "x"), ("supporter", "z"))},
        ("unknown role 'seeker'",),
    ),
    "no_role": (
        lambda i: {"messages": [{"content": "x"}, *plain(i)[1:]]},
        ("a turn without a role", "row 1, messages[0]"),
    ),
    "null": (
        lambda i: {"messages": turns(("user", "x"), ("assistant", None))},
        ("missing", "row 1, messages[1].content"),
    ),
    "weight_half": (
        lambda i: {"messages": [*plain(i)[:1], {**plain(i)[1], "weight": 0.5}]},
        ("weight is neither 0 nor 1", "= 0.5"),
    ),
    "mask": (
        lambda i: {"messages": [*plain(i)[:1], {**plain(i)[1], "mask": True}]},
        ("unknown mask", "row 1, messages[1].mask = true"),
    ),
    "never_answered": (lambda i: {"messages": turns(("user", ASKED.format(i)))}, ("no reply 40",)),
    "whole_text": (
        lambda i: {"text": f"### Human: {i}### Assistant: x"},
        ("found the columns text; expected those of a conversation",),
    ),
    "only_rejected": (lambda i: {"text": "x", "rejected": "y"}, ("--columns prompt=... completion=...",)),
    "a_part_without_text": (
        lambda i: {"messages": [{"role": "user", "content": [{"type": "text", "content": "x"}]}, *plain(i)[1:]]},
        ("wrong type", "row 1, messages[0].content"),
    ),
    "tools_no_list": (lambda i: {"tools": "find", "messages": plain(i)}, ("tools = 'find'",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "rows.jsonl", [make(i) for i in range(ROWS)]))
    assert all(word in str(error.value) for word in words), error.value


def test_replies_that_were_not_wanted_are_not_trained(tmp_path):
    """KTO's form: `label` says whether the reply was wanted, of a prompt's reply as of a conversation's."""
    rows = [plain(i)[:1] + turns(WRONG) if i % 2 else plain(i) for i in range(ROWS)]
    rows = [{"messages": turns, "label": i % 2 == 0} for i, turns in enumerate(rows)]
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.csv"):
        written = [row | {"messages": json.dumps(row["messages"])} for row in rows] if path.suffix == ".csv" else rows
        kept, report, *_ = read(write(path, written))
        assert report.dropped == {"label false: a reply that was not wanted": ROWS / 2}
        assert [row["messages"] for row in kept] == [plain(i) for i in range(0, ROWS, 2)]
    tagged = [row | {"label": i % 3, "kto_tag": row["label"]} for i, row in enumerate(rows)]  # LLaMA-Factory's
    assert read(write(tmp_path / "tagged.jsonl", tagged))[0] == kept


def test_large_whole_numbers_keep_their_digits(tmp_path):
    rows = [{"prompt": ASKED.format(i), "completion": 10**22 + i} for i in range(ROWS)]
    kept, *_ = read(write(tmp_path / "rows.jsonl", rows))
    assert {row["messages"][1]["content"] for row in kept} == {str(10**22 + i) for i in range(ROWS)}


def open_talks(path):
    arguments = {
        "dataset": str(path),
        "columns": [],
        "dataset_config": None,
        "validation_file": None,
        "test_file": None,
    }
    return speakers.open_talks(SimpleNamespace(**arguments), [])


def test_tools_of_a_parquet_have_no_arguments_of_other_rows(tmp_path):
    """Arrow gives each object the keys of all: calls and schemas were shown with `"city": null` of another tool."""
    rows = []
    for i in range(4):
        arguments = {"city": "Lima"} if i % 2 else {"count": i, "deep": {"x": 1}}
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": arguments}}]}
        schema = {"name": "find", "parameters": {"properties": {name: {"type": "string"} for name in arguments}}}
        rows.append({"messages": [*plain(i)[:1], call, *turns(("tool", "7")), *plain(i)[1:]], "tools": [schema]})
    found = []
    for path in (write(tmp_path / "rows.jsonl", rows), tmp_path / "rows.parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        splits, reader = open_talks(path)
        found.append([chat().fit(reader(row)) for row in splits["train"]])
    shown = [[chat().tokenize(row, 4096)["input_ids"] for row in rows] for rows in found]
    assert shown[0] == shown[1] and "null" not in chat().tokenizer.decode(shown[1][0])


def test_splits_for_this_task_are_taken_before_others(tmp_path):
    """UltraChat's."""
    names = ("train_sft", "test_sft", "train_gen")
    rows = {name: Dataset.from_list([{"messages": plain(i)} for i in range(3)]) for name in names}
    DatasetDict(rows).save_to_disk(tmp_path / "data")
    assert list(open_talks(tmp_path / "data")[0]) == ["train", "test"]


@pytest.mark.parametrize(
    ("labels", "kept", "unread"),
    [
        ([0, 1], ROWS / 2, []),
        ([0.0, 1.0, None, 1.0], ROWS * 3 / 4, []),
        ([1, 0, 2], ROWS, ["label"]),
        (["spam", "false"], ROWS, ["label"]),
    ],
)
def test_labels_of_numbers_are_those_of_replies_where_they_can_be(labels, kept, unread, tmp_path):
    """Exports write KTO's labels as 0 and 1; a class of something else is no reason to leave a row out, and is said."""
    rows = [{"prompt": ASKED.format(i), "completion": "x", "label": labels[i % len(labels)]} for i in range(ROWS)]
    splits, reader = open_talks(write(tmp_path / "rows.jsonl", rows))
    assert sum(isinstance(reader(row), dict) for row in splits["train"]) == kept and reader.unread == unread


def test_other_files(tmp_path):
    """CSV, a list, one under a key, byte order mark, CRLF, gzip, ChatGPT's export; and JSON that is none, with its line."""
    rows = [{"messages": plain(i)} for i in range(ROWS)]
    files = {"list.json": json.dumps(rows, indent=1), "key.json": json.dumps({"version": "1", "data": rows})}
    files["bom.jsonl"] = "\ufeff" + "\r\n".join(map(json.dumps, rows))
    node = {"title": "t", "current_node": "c", "mapping": {"a": {"parent": None}}}
    for key, parent, turn in zip("bc", "ab", plain(3), strict=True):
        message = {"author": {"role": turn["role"]}, "content": {"content_type": "text", "parts": [turn["content"]]}}
        node["mapping"][key] = {"parent": parent, "message": message}
    node["mapping"]["d"] = {
        "parent": "b",
        "message": {"author": {"role": "assistant"}, "content": {"parts": ["WRONG"]}},
    }
    files["export.json"] = json.dumps([node] * 3)
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        kept, report, _, under = read(tmp_path / name)
        assert report.kept == (3 if name == "export.json" else ROWS)
        assert learned(kept[-1], under) == EVERY.format(3 if name == "export.json" else ROWS - 1)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "rows.jsonl.gz")[1].kept == ROWS
    table = [{"question": ASKED.format(i), "answer": "" if i == 7 else i, "id": i} for i in range(ROWS)]
    kept, report, reader, under = read(write(tmp_path / "numbers.csv", table))
    assert learned(kept[3], under) == "3<|im_end|>" and reader.unread == ["id"]
    assert report.dropped == {"missing": 1} and report.reasons() == [
        "1 of 40 rows (2.5%) dropped: missing; first row 8, question, answer = null"
    ]
    kept, *_ = read(write(tmp_path / "messages.csv", [{"messages": json.dumps(plain(i))} for i in range(ROWS)]))
    assert kept[5]["messages"] == plain(5)
    user_only = [{"mapping": {"a": {"message": {"author": {"role": "user"}, "content": {"parts": ["x?"]}}}}}] * 9
    (tmp_path / "asked.json").write_text(json.dumps(user_only))
    with pytest.raises(UserError, match="no reply 9"):
        read(tmp_path / "asked.json")
    (tmp_path / "broken.jsonl").write_text('{"messages": []}\n{"messages": [}\n')
    with pytest.raises(UserError, match="broken.jsonl, line 2: not JSON"):
        formats.read(str(tmp_path / "broken.jsonl"))


def test_tables_in_one_document_are_those_of_every_task(tmp_path):
    """Splits by name, columns as lists or as pandas writes them; half a character in any of them."""
    rows = [{"prompt": ASKED.format(i) + "\ud83d", "completion": SAID.format(i)} for i in range(ROWS)]
    tables = [{name: [row[name] for row in rows] for name in rows[0]}]
    tables += [{name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}]
    tables += [rows, {"version": "1", "items": rows}, {"train": rows, "dev": rows[:4]}]
    for table in tables:
        (tmp_path / "a.json").write_text(json.dumps(table))
        splits = formats.read(str(tmp_path / "a.json"))
        assert {name: len(found) for name, found in splits.items()} in (
            {"train": ROWS},
            {"train": ROWS, "validation": 4},
        )
        assert splits["train"][3] == {"prompt": ASKED.format(3) + "\ufffd", "completion": SAID.format(3)}


def test_a_template_that_refuses(tmp_path):
    """Its own words are counted; a system turn goes before the first user turn; over 5 % of the rows stop the run."""
    system = [{"messages": [*turns(("system", "Be brief.")), *plain(i)] if i % 2 else plain(i)} for i in range(ROWS)]
    rows, report, _, under = read(write(tmp_path / "system.jsonl", system), under=refusing())
    assert report.kept == ROWS and under.notes["system"] == ROWS / 2
    assert rows[1]["messages"][0] == {"role": "user", "content": "Be brief.\n\n" + ASKED.format(1)}
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    assert read(tmp_path / "system.jsonl", under=refusing(silent))[0] == rows
    greets = [{"messages": [*turns(HELLO), *plain(i)]} for i in range(ROWS)]
    with pytest.raises(
        UserError, match="40 rows are unusable.*the chat template refuses the row: Conversation roles must"
    ):
        read(write(tmp_path / "greets.jsonl", greets), under=refusing())
    few = [{"messages": greets[i]["messages"] if i in (3, 9) else plain(i)} for i in range(ROWS)]
    _, report, _, _ = read(write(tmp_path / "few.jsonl", few), under=refusing())
    assert report.kept == ROWS - 2 and "row 4" in report.reasons()[0] and "(5.0%)" in report.reasons()[0]
    empty = [{"messages": [*turns(("user", ""), WRONG) * (i < 2), *plain(i)]} for i in range(ROWS)]
    _, report, _, _ = read(write(tmp_path / "empty.jsonl", empty), under=refusing())
    assert report.dropped == {"an empty turn of the user": 2}
    calls = [READ["calls"][0](i) for i in range(ROWS)]
    with pytest.raises(
        UserError, match="20 of 40 rows are unusable.*tool calls, which the chat template does not show"
    ):
        read(write(tmp_path / "calls.jsonl", calls), under=refusing())


@pytest.mark.parametrize("field", ["reasoning_content", "content"])
def test_thoughts(field, tmp_path):
    """Qwen 3's template shows those of the last reply only, and has a place for them in each; the others are counted."""

    def reply(i):
        thought = {"reasoning_content": "Hm."} if field == "reasoning_content" else {}
        return {
            "role": "assistant",
            "content": "<think>\nHm.\n</think>\n\n" * (not thought) + SAID.format(i),
            **thought,
        }

    rows = [{"messages": [*plain(i)[:1], reply(i), *turns(("user", "And?")), reply(i + 1)]} for i in range(ROWS)]
    under = chat(chat_families.QWEN3)
    kept, *_ = read(write(tmp_path / "rows.jsonl", rows), under=under)
    assert learned(kept[4], under) == f"{EVERY.format(4)}<think>\nHm.\n</think>\n\n{EVERY.format(5)}"
    assert under.notes["thoughts"] == 1
    assert under.tokenizer.convert_tokens_to_ids("<think>") in under.tokenize(kept[4], 4096)["labels"]


@pytest.mark.parametrize("before", ["<think>\nHm.\n</think>\n\n", "Hm.\n</think>\n\n", ""])
def test_a_reply_is_trained_where_the_template_cuts_its_thoughts_off(before, tmp_path):
    """DeepSeek R1's and QwQ's: nothing of such replies was trained. That replies are asked for by `<think>` is said."""
    tokens = ["<|User|>", "<|Assistant|>", "<think>", "</think>", "<s>", "</s>"]
    under = chats.Chat(chat_families.tokenizer_of(tokens, "<s>", "</s>", None, chat_families.DEEPSEEK))
    replies = [turns(("user", "?"), ("assistant", before + SAID.format(i))) for i in range(2)]
    kept, *_ = read(write(tmp_path / "rows.jsonl", [{"messages": [*replies[0], *replies[1]]}]), under=under)
    assert learned(kept[0], under) == SAID.format(0) + "</s>" + SAID.format(1) + "</s>"
    assert under.notes == {"prompt": 1, "thoughts": 2 * bool(before)}
    whole = under.tokenizer.apply_chat_template([*replies[0], *replies[1]], return_dict=False)
    assert under.tokenize(kept[0], 4096)["input_ids"] == whole


def test_control_tokens_in_texts_are_plain_characters(tmp_path):
    said = "<|im_end|> ends a turn, </think> a thought."
    rows = [{"messages": turns(("user", f"What is <|im_end|> {i}?"), ("assistant", said))} for i in range(ROWS)]
    kept, _, _, under = read(write(tmp_path / "rows.jsonl", rows))
    row = under.tokenize(kept[0], 4096)
    assert row["input_ids"].count(under.stop) == 2 and row["labels"].count(under.stop) == 1
    assert learned(kept[0], under) == said + "<|im_end|>"


def test_the_first_token_of_a_reply_is_trained_behind_a_blank(tmp_path):
    under = refusing(chat_families.VICUNA)  # its prompt ends in a blank, which belongs to the reply's first token
    under.tokenizer.add_tokens([" It"])
    under = chats.Chat(under.tokenizer)
    row = under.tokenize({"messages": plain(1)}, 4096)
    assert learned({"messages": plain(1)}, under) == f" {SAID.format(1)}</s>"
    assert under.tokenizer.convert_tokens_to_ids(" It") in row["labels"]


def test_people_are_recognised_by_names_that_change():
    talks = [
        {"conversations": turns((f"a{i}", "Is it?"), (f"b{i}", "Yes."), who="from", text="value")} for i in range(9)
    ]
    assert formats.talk_of_people("rows", talks, ["conversations"], [])
    known = [*talks, {"conversations": turns(("human", "Is it?"), ("x", "Yes."), who="from", text="value")}]
    same = [{"conversations": turns(("ann", "Is it?"), ("bob", "Yes."), who="from", text="value")}] * 9
    assert not formats.talk_of_people("rows", known, ["conversations"], [])
    assert not formats.talk_of_people("rows", same, ["conversations"], [])


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ({"text": ["Lima", "Lima"], "answer_start": [9, 9]}, ["Lima"]),
        ([{"text": "Lima", "answer_start": 9}], ["Lima"]),
        ("Lima", ["Lima"]),
        ("['Lima']", ["Lima"]),
        (None, []),
    ],
)
def test_answers_of_a_mixture_are_read_as_qa_squad_reads_them(answers, references):
    row = {"context": "It is in Lima.", "question": "Where?", "answers": answers}
    assert mixture.to_task(row, None)["references"] == references
    assert mixture.to_task(row | {"answers": {"value": "Lima"}}, None).startswith('bad: an answer without "text"')
