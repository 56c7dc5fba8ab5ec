"""Rows of any chat data set -> messages. Used by train.py; what a chat template makes of them is in chats.py."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from shared import UserError
from shared.data import files
from shared.data.cleaning import clean_text, malformed
from shared.data.columns import missing, read_mapping
from shared.data.load import json_splits, load_data
from shared.data.squad import number_text

# Which columns make a conversation, the first that a row fills. `--columns prompt=q completion=a` maps others.
FORMATS = {
    "messages": ("messages",),
    "conversations/chosen": ("conversations", "chosen"),
    "conversations": ("conversations",),
    "conversation": ("conversation",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
    "instruction/context/response": ("instruction", "response"),
    "question/answer": ("question", "answer"),
    "question/response": ("question", "response"),
    "prompt/response": ("prompt", "response"),
    "query/response": ("query", "response"),
    "user/assistant": ("user", "assistant"),
    "input/output": ("input", "output"),
    "prompt/chosen": ("prompt", "chosen"),
    "question/chosen": ("question", "chosen"),
    "instruction/chosen": ("instruction", "chosen"),
    "chosen": ("chosen",),
    "mapping": ("mapping",),  # ChatGPT's own export
}
SYSTEM, HISTORY, TOOLS = ("system", "system_prompt"), ("history",), ("tools", "functions")
LABEL, TAG = "label", "kto_tag"  # KTO's: false where a reply was not wanted; LLaMA-Factory's name for it
CONTEXT = ("input", "context")  # a text that the instruction is about: Alpaca's and Dolly's names
ALWAYS = ("system", "developer", "tool", "function", "observation")  # mean the same whatever the others are called
ALSO = (*SYSTEM, *HISTORY, *TOOLS, *CONTEXT, LABEL)  # read beside a format
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "customer", "client"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "bing", "bard"),
        *("agent", "support", "operator"),
    ),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "tool_result", "function_response"),
    "call": ("function_call", "tool_call"),
}
KNOWN = {name: role for role, names in ROLES.items() for name in names}
IN_NAMES = ("user", "human", "customer", "client", "assistant", "bot", "agent", "support", "operator")  # "Agent 7"
WHO, TEXT = ("role", "from", "speaker", "author"), ("content", "value", "text", "message", "parts")  # keys of a turn
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# A turn with one of them 0 or false is not trained; other keys that speak of training (`mask: true`) are not guessed at.
TRAINED = ("weight", "train", "training", "trainable", "loss", "train_on_turn", "loss_weight", "loss_mask")
FLAG = re.compile(r"(^|_)(train|trained|training|loss|weight|mask|masked|ignore|supervised)(_|$)", re.I)
WRITTEN_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Hermes: calls inside the text
WRITTEN_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # a conversation in one text, as Anthropic's HH-RLHF
GREETING = re.compile(
    r"\W*((hi|hey|hello|yo|sup|hiya|good (morning|evening|day)|howdy|there|you|whats|what|up|bye|ok|s|how|are)\W*)+",
    re.I,
)


def role_of(name: str, roles: dict[str, str]) -> str | None:
    """The role of a speaker: the one given for the name, else what the name is known for, or one of its words ("Agent 7")."""
    key = name.strip().casefold()
    if roles:
        return roles.get(key) or (KNOWN[key] if key in ALWAYS else None)
    known = KNOWN.get(re.sub(r"[\s-]+", "_", name.strip().lower()))
    words = {KNOWN[word] for word in re.findall(r"[^\W\d_]+", name.lower()) if word in IN_NAMES}
    return known or (words.pop() if len(words) == 1 else None)


class Unusable(Exception):
    """A row that is dropped: the reason, and in a second line where and with which value."""


def read(name: str, config: str | None = None) -> dict:
    """The splits of any data, as `shared.data.load.load_data` (train_sft and the like before others, as UltraChat has); rows of a
    local table or JSON file as they stand there.

    Arrow would refuse rows whose values differ in type, turn whole numbers beside empty cells into decimals, and give each turn
    the keys of all others.

    Raises:
        UserError: as `shared.data.files.read_rows`; JSON that holds no list of rows.
    """
    path = Path(name).expanduser()
    if not path.is_file() or files.kind_of(path) not in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx"):
        data = load_data(name, config)
        return {split.removesuffix("_sft"): rows for split, rows in data.items() if split.endswith("_sft")} or data
    content = files.read_json(path) if files.kind_of(path) == ".json" else None
    if splits := json_splits(content):
        return {split: _list_of_rows(rows, path) for split, rows in splits.items()}
    rows = list(files.read_rows(path)) if content is None else _list_of_rows(content, path)
    if not rows:
        raise UserError(f"{path}: holds no row.")
    return {"train": rows}


def _list_of_rows(content, path: Path) -> list[dict]:
    """The rows of a JSON file: a list of objects, or the one list of objects under a key; else as files.py reads it."""
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        rows = {key: value for key, value in lists.items() if value and all(isinstance(row, dict) for row in value)}
        if set(rows) & set(FORMATS):  # one conversation alone
            return [content]
        content = next(iter(rows.values())) if len(rows) == 1 else list(files.read_rows(path))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path}: expected a list of objects, one a row.")
    return content


def columns_of(rows: Iterable[dict]) -> list[str]:
    """Names of the columns, in order of their first row."""
    names = getattr(rows, "column_names", None)
    return names or list(dict.fromkeys(key for row in rows for key in row))


def find_format(source: str, columns: list[str], mapping: list[str]) -> tuple[list[str], dict[str, str]]:
    """The entries of FORMATS that the columns fit, and where each field is found (`instances.0.output` reaches inside).

    Raises:
        UserError: found / expected / how to map.
    """
    chosen = read_mapping(mapping, dict.fromkeys([*sum(FORMATS.values(), ()), *ALSO]), columns)
    places = {column: column for column in columns} | chosen
    fitting = [name for name, needed in FORMATS.items() if all(field in places for field in needed)]
    if not fitting:
        raise missing(
            source,
            ("prompt", "completion"),
            columns,
            f"those of a conversation, one of: {'; '.join(FORMATS)}",
            mapped=chosen,
        )
    fitting.sort(key=lambda name: not any(field in chosen for field in FORMATS[name]))
    return fitting, places


class Reader:
    """Reads the rows of one data set as conversations.

    Attributes:
        formats: entries of FORMATS; a row is read by the first whose fields it fills.
        places: where each field is found.
        people: whether people talk with each other, so that who speaks first is the user: see `talk_of_people`.
        roles: of the names of speakers, in lower case; without any, names are read by `role_of`.
        speakers: how often each name was read, with its role.
        filled: whether rows come from Arrow, which gives each object the keys of all others: arguments and schemas of tools, too.
        unwanted: labels that say that a reply was not wanted, see `read_labels`.
    """

    def __init__(self, source, columns: list[str], mapping: list[str], people: bool = False, roles: dict | None = None):
        self.formats, self.places = find_format(source, columns, mapping)
        if TAG in columns and self.places.get(LABEL, LABEL) == LABEL:
            self.places[LABEL] = TAG
        self.people, self.roles, self.speakers = people, roles or {}, Counter()
        self.unwanted, self.filled = {"false"}, False
        # A context and a history are read beside a prompt alone, not beside whole conversations
        also = ALSO if any(len(FORMATS[name]) > 1 for name in self.formats) else (*SYSTEM, *TOOLS, LABEL)
        needed = {field for name in self.formats for field in FORMATS[name]}
        read = {self.places[field].split(".")[0] for field in {*needed, *also} if field in self.places}
        self.unread = [column for column in columns if column not in read]

    def read_labels(self, rows) -> None:
        """Takes 0 for KTO's `false` where all labels are 0 or 1; others say nothing about replies, and are not read."""
        if LABEL not in self.places:
            return
        column = self.places[LABEL].split(".")[0]
        rows = rows.select_columns([column]) if hasattr(rows, "select_columns") else rows
        labels = (self._of(row, LABEL) for row in rows)
        found = {str(label).lower().removesuffix(".0") for label in labels if label is not None}
        if not found <= {"true", "false"}:
            numbers = found <= {"0", "1"}
            self.unwanted = {"0", "0.0"} if numbers else set()
            self.unread += [] if numbers else [column]

    def __call__(self, row: dict) -> dict | str:
        """`{"messages": [{"role", "content"}, ...]}`, or the reason for dropping the row (see `shared.data.cleaning.clean_rows`).

        A turn may also have `reasoning_content`, `tool_calls` (JSON) and `train` (false: not trained), a row `tools` (JSON).
        Runs of one speaker become one turn; turns after the last reply are cut, since nothing is learnt from them.
        """
        try:
            return self._read(_without_nulls(row) if self.filled else row)
        except Unusable as reason:
            return str(reason)

    def _read(self, row: dict) -> dict:
        fitting = [name for name in self.formats if all(self._of(row, field) is not None for field in FORMATS[name])]
        name = next((name for name in fitting if self._of(row, FORMATS[name][0]) != []), next(iter(fitting), None))
        if (label := str(self._of(row, LABEL)).lower()) in self.unwanted:
            raise Unusable(f"label {label}: a reply that was not wanted")
        if name is None:
            raise Unusable(f"bad: missing\n{', '.join(FORMATS[self.formats[0]])} = null")
        turns = [self._turn(turn, place) for turn, place in self._turns(row, name)]
        if self.people:
            turns = _as_roles(turns)
        for key in SYSTEM:
            text = self._of(row, key)
            if text and name != key:
                turns.insert(0, {"role": "system", "content": _text(text, key)})
        found = {"messages": self._join(turns)}
        tools = next((tools for key in TOOLS if (tools := self._of(row, key))), None)
        if any(
            key in self.places for key in TOOLS
        ):  # every row has the column: `datasets` takes those of the first row
            found["tools"] = None
        if tools:
            found["tools"] = tools if isinstance(tools, str) else json.dumps(tools)
            if not isinstance(_parsed(tools, "tools"), list):
                raise Unusable(f"bad: tools are no list\ntools = {_short(tools)}")
        return found

    def _of(self, row: dict, field: str):
        """The value of a field, None where there is none."""
        value = row if field in self.places else None
        for step in self.places.get(field, "").split("."):
            if isinstance(value, list):
                value = value[int(step)] if step.isdigit() and int(step) < len(value) else None
            else:
                value = value.get(step) if isinstance(value, dict) else None
        return None if value != value else value  # NaN: an empty cell

    def _turns(self, row: dict, name: str) -> list[tuple[object, str]]:
        """Turns as they stand in the row, each with its place."""
        fields = FORMATS[name]
        if name == "mapping":
            return [
                (turn, f"mapping.{key}") for key, turn in _export(self._of(row, "mapping"), row.get("current_node"))
            ]
        first, last = self._of(row, fields[0]), self._of(row, fields[-1])
        if len(fields) == 1:
            return _listed(first, fields[0], self.roles)
        first, last = _as_turns(first), _as_turns(last)
        if _looks_like_turns(first) and _looks_like_turns(last):
            first, last = _listed(first, fields[0], self.roles), _listed(last, fields[-1], self.roles)
            return last if [turn for turn, _ in last[: len(first)]] == [turn for turn, _ in first] else first + last
        if _looks_like_turns(first) and first:
            return [*_listed(first, fields[0], self.roles), (("assistant", last), fields[-1])]
        prompt = _text(first, fields[0])
        context = next((text for key in CONTEXT if key not in fields and (text := self._of(row, key))), None)
        if context is not None and str(context).strip():
            prompt = f"{prompt}\n\n{_text(context, 'context')}"
        history = self._of(row, HISTORY[0])
        if _looks_like_turns(last):  # a prompt, and a chosen list of messages
            return [
                *_listed(history or [], "history", self.roles),
                *([] if len(last) > 1 else [(("user", prompt), fields[0])]),
            ] + (_listed(last, fields[-1], self.roles))
        turns = [(("user", prompt), fields[0]), (("assistant", last), fields[-1])]
        return [*_listed(history, "history", self.roles), *turns] if history else turns

    def _turn(self, turn, place: str) -> dict:
        """A turn with a known role and a text."""
        pair = isinstance(turn, tuple)
        if pair:
            turn = dict(zip(("role", "content"), turn, strict=True))
        if not isinstance(turn, dict):
            raise Unusable(f"bad: wrong type\n{place} = {_short(turn)}")
        turn = {key: value for key, value in turn.items() if value is not None}
        who = next((turn[key] for key in WHO if key in turn), None)
        who = who.get("role") if isinstance(who, dict) else who
        if not isinstance(who, str):
            raise Unusable(f"bad: a turn without a role\n{place} = {_short(turn)}")
        role = who if self.people else role_of(who, self.roles)
        self.speakers[who.strip(), role] += 1
        if role is None:
            known = ", ".join(self.roles or KNOWN)
            raise Unusable(f"bad: unknown role {_short(who)} (known: {known}; --roles user=... assistant=...)\n{place}")
        key = next((key for key in TEXT if key in turn), TEXT[0])
        value, where = turn.get(key), place if pair else f"{place}.{key}"
        found = {"role": role}
        calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
        if role == "assistant" and not calls and isinstance(value, str) and (written := WRITTEN_CALL.findall(value)):
            calls, value = [_parsed(call, where) for call in written], WRITTEN_CALL.sub("", value)
        if role == "tool":
            value = json.dumps(value) if isinstance(value, dict) else value
            result = WRITTEN_RESULT.fullmatch(value) if isinstance(value, str) else None
            value = result[1] if result else value
        if role == "call":
            found["role"], calls, value = "assistant", value, ""
        if calls:
            found |= {"tool_calls": json.dumps(_calls(calls, place)), "train": False}
        missing = value is None and not (calls and role in ("assistant", "call"))
        found["content"] = "" if value is None and not missing else _text(value, where, self.people)
        thoughts = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
        if thoughts is not None and role == "assistant":
            found["reasoning_content"] = _text(thoughts, f"{place}.{THOUGHTS[0]}")
        for key in (key for key in TRAINED if key in turn):
            if str(turn[key]).lower() in ("0", "0.0", "false"):
                found["train"] = False
            elif str(turn[key]).lower() not in ("1", "1.0", "true"):
                raise Unusable(f"bad: {key} is neither 0 nor 1\n{place}.{key} = {_short(turn[key])}")
        for key in turn:
            if key not in TRAINED and FLAG.search(key):
                raise Unusable(f"bad: unknown {key} (known: {', '.join(TRAINED)})\n{place}.{key} = {_short(turn[key])}")
        if role == "tool":
            found |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
        return found

    def _join(self, turns: list[dict]) -> list[dict]:
        """Turns without runs of one speaker and without what follows the last reply."""
        if not any(turn["content"] for turn in turns):
            raise Unusable("bad: empty")
        messages = []
        for turn in turns:
            if not turn["content"] and "tool_calls" not in turn and turn["role"] != "tool":
                if turn["role"] == "user" and not self.people:
                    raise Unusable("bad: an empty turn of the user")
                continue
            last = messages[-1] if messages else {}
            plain = turn.keys() == last.keys() == {"role", "content"} and turn["role"] != "tool"  # results of two calls
            if plain and last["role"] == turn["role"]:
                last["content"] += "\n" + turn["content"]
            else:
                messages.append(turn)
        while messages and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
            messages.pop()
        bad = "" if self.people else "bad: "
        if not messages:
            raise Unusable(f"{bad}no reply")
        if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in messages):
            raise Unusable("no reply is to be trained")
        if self.people and all(GREETING.fullmatch(message["content"]) for message in messages):
            raise Unusable("greetings only")
        return messages


def talk_of_people(source: str, rows: Iterable[dict], columns: list[str], mapping: list[str]) -> bool:
    """Whether `from` names people, as in pypi:chitchat: no name is a known role, and they change from row to row."""
    formats, places = find_format(source, columns, mapping)
    if formats[0] not in ("messages", "conversations", "conversation"):
        return False
    seen, count = Counter(), 0
    for row in rows:
        turns = row.get(places[formats[0]])
        turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        names = {str(turn.get("role") or turn.get("from") or "").strip().lower() for turn in turns}
        if "" in names or any(role_of(name, {}) for name in names):
            return False
        seen.update(names)
        count += bool(names)
    return count > 0 and max(seen.values()) <= max(1, count / 2)


def _as_roles(turns: list[dict]) -> list[dict]:
    """Who speaks first is the user, the other the assistant."""
    people = list(dict.fromkeys(turn["role"] for turn in turns))
    if len(people) > 2:
        raise Unusable(f"more than two speakers\n{len(people)} of them")
    return [{**turn, "role": ("user", "assistant")[people.index(turn["role"])]} for turn in turns]


def _text(value, place: str, people: bool = False) -> str:
    """A text that can be learnt: numbers and booleans as they are written in JSON, the text parts of a list joined, cleaned.

    The first indentation stays, since it means something in code; a single blank goes, unless each line has one.
    """
    if isinstance(value, bool):
        value = json.dumps(value)
    if isinstance(value, int | float):
        value = number_text(value)
    if isinstance(value, list) and value and all(isinstance(part, str | dict) for part in value):
        kinds = {part.get("type", "text") for part in value if isinstance(part, dict)} - {
            "text",
            "input_text",
            "output_text",
        }
        if kinds:
            raise Unusable(f"bad: {', '.join(sorted(map(str, kinds)))} in a text\n{place} = {_short(value)}")
        parts = [part if isinstance(part, str) else part.get("text") for part in value]
        parts = [part.get("value") if isinstance(part, dict) else part for part in parts]  # OpenAI's assistants
        value = "\n".join(parts) if all(isinstance(part, str) for part in parts) else value
    reason = malformed(value)
    if reason not in (None, "empty"):
        raise Unusable(f"bad: {reason}\n{place} = {_short(value)}")
    text = clean_text(value, fences=True).rstrip()
    lines = [line for line in text.splitlines() if line]
    indented = len(lines) > 1 and all(line[0] in " \t" for line in lines)
    return text if not people and (text.startswith(("  ", "\t")) or indented) else text.strip()


def _without_nulls(value):
    """A value without the entries of its objects that are None."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _looks_like_turns(value) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) and set(turn) & {*WHO} for turn in value)


def _as_turns(value):
    """Turns that were written as JSON or after `Human:`, and one that stands alone, as a list; anything else as it is."""
    found = value
    if isinstance(value, str) and (value.lstrip()[:1] in ("[", "{") or SPOKEN.match(value.lstrip())):
        try:
            found = _parsed(value, "")
        except Unusable:
            return value
    found = [found] if isinstance(found, dict) else found
    return found if found and _looks_like_turns(found) else value


def _parsed(value, place: str):
    """A list that was written as text: in JSON, as Python prints it (in CSV), or as what `Human:` and `Assistant:` say."""
    if not isinstance(value, str):
        return value
    said = SPOKEN.split(value)
    if said[1:2] == ["Human"] and not said[0].strip():
        turns = [{"role": who, "content": text} for who, text in zip(said[1::2], said[2::2], strict=True)]
        return turns if turns[-1]["content"].strip() else turns[:-1]  # a prompt may end where the reply begins
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise Unusable(f"bad: neither a list nor JSON\n{place} = {_short(value)}")


def _listed(value, place: str, roles: dict) -> list[tuple[object, str]]:
    """Turns of a list: objects, pairs of role and text, or pairs of question and answer."""
    turns = _parsed(value, place)
    if isinstance(turns, dict) and len(turns) == 1:
        turns = next(iter(turns.values()))
    if isinstance(turns, dict) and set(turns) & {*WHO} and all(isinstance(column, list) for column in turns.values()):
        # As `datasets` turns a list of objects
        turns = [dict(zip(turns, turn, strict=False)) for turn in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list):
        raise Unusable(f"bad: wrong type\n{place} = {_short(turns)}")
    if turns and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        if all(isinstance(who, str) and role_of(who, roles) for who, _ in turns):
            return [(tuple(turn), f"{place}[{i}]") for i, turn in enumerate(turns)]
        pairs = [zip(("user", "assistant"), turn, strict=True) for turn in turns]
        return [(pair, f"{place}[{i}]") for i, turn in enumerate(pairs) for pair in turn]
    return [(turn, f"{place}[{i}]") for i, turn in enumerate(turns)]


def _calls(calls, place: str) -> list[dict]:
    """Tool calls as templates read them: the name and the arguments as an object, whether they were written as JSON or not."""
    calls = _parsed(calls, place)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable(f"bad: a tool call without a name\n{place} = {_short(call)}")
        arguments = function.get("arguments", function.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments, place)
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(entry | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return found


def _export(mapping, current) -> list[tuple[str, dict]]:
    """Turns of ChatGPT's own export: the branch that was shown last, from its leaf up; without links, all in their order."""
    if not isinstance(mapping, dict):
        raise Unusable(f"bad: wrong type\nmapping = {_short(mapping)}")
    path = []
    while current in mapping and current not in path:
        path.append(current)
        current = (mapping[current] or {}).get("parent")
    turns = []
    for key in reversed(path) if path else mapping:
        message = (mapping[key] or {}).get("message") or {}
        content = message.get("content") or {}
        parts = content.get("parts") if isinstance(content, dict) else None
        who = (message.get("author") or {}).get("role")
        if parts and any(parts) and who in ("user", "assistant"):
            turns.append((key, {"role": who, "content": parts}))
    return turns


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text[:80] + "...") if len(text) > 80 else repr(text) if isinstance(value, str) else text


def text_of(row: dict) -> str:
    """The words of a conversation, for finding near-duplicates."""
    return "\n".join(message["content"] for message in row["messages"])
