"""Rows of any preference data set -> a prompt, the reply that was chosen and the one that was rejected. Used by train.py."""

import ast
import json
import re

from shared import UserError
from shared.data.cleaning import clean_text, malformed
from shared.data.columns import find_columns, missing
from shared.data.load import load_data
from shared.data.squad import number_text

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "customer", "client"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model"),
        *("agent", "support", "operator"),
    ),
}
KNOWN = {name: role for role, names in ROLES.items() for name in names}
WHO, TEXT = ("role", "from", "speaker"), ("content", "value", "text")  # keys of a turn
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # a conversation in one text, as Anthropic's HH-RLHF
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Read as these where there is none of their own name: Orca's and Alpaca's
ALSO_NAMED = {"system": "system_prompt", "context": "input"}
CONVERSATION = ("messages", "conversations", "conversation")


class Unusable(Exception):
    """A row that is dropped: the reason, and in a second line where and with which value."""


def read_splits(name: str, config: str | None) -> dict:
    """The splits of any data; of those that have train_prefs, as UltraFeedback, the ones that are preferences."""
    data = load_data(name, config)
    return {split.removesuffix("_prefs"): rows for split, rows in data.items() if split.endswith("_prefs")} or data


class Reader:
    """Reads the rows of one data set as preferences: `reader(row)` returns `{"prompt": messages, "chosen", "rejected"}`, or the
    reason for dropping the row (see `shared.data.cleaning.clean_rows`).

    Args:
        source: name of the data, for errors.
        row: the first one. mapping: `--columns`.
        rejected: "column", or "loop": a row is a conversation, of which the second reply (or the only one) is chosen over
            `looping` of it.

    Attributes:
        form: in words, how the rows are read.

    Raises:
        UserError: found / expected / how to map.
    """

    def __init__(self, source: str, row: dict, columns: list[str], mapping: list[str], rejected: str = "column"):
        if rejected == "loop":
            self.name = next((each for each in CONVERSATION if each in columns), CONVERSATION[0])
            self.places = find_columns(source, columns, mapping, [self.name], row=row)
            self.form, self._read = f"conversations ({self.places[self.name]}), a reply that loops rejected", self._talk
            return
        try:
            needed, optional = ("chosen", "rejected"), ("prompt", "system", "context")
            asked = {part for pair in mapping for part in pair.split("=")}
            for name, other in ALSO_NAMED.items():
                if other in columns and name not in columns and not asked & {name, other}:
                    mapping = [*mapping, f"{name}={other}"]
            alone = "prompt" not in {*columns, *asked} and len(_turns(row.get("chosen")) or []) == 1
            if alone and "conversations" in columns:  # LLaMA-Factory's: the turns before the reply
                mapping = [*mapping, "prompt=conversations"]
            self.places = find_columns(source, columns, mapping, needed, optional, row, inside=True)
        except UserError as error:
            if any(name in columns for name in CONVERSATION) and not asked:
                raise UserError(
                    f"{error} Conversations without a rejected reply train tasks/chat_sft; --rejected loop makes pairs of them "
                    "to try this task with."
                ) from None
            raise
        self.form = "prompt, chosen, rejected"
        if "prompt" not in self.places:
            self.form = "whole conversations, chosen and rejected"
            if _turns(_of(row, self.places["chosen"])) is None:
                raise missing(source, ("prompt", "chosen", "rejected"), columns, row=row, mapped=self.places)
        self._read = self._pair

    def __call__(self, row: dict) -> dict | str:
        try:
            return self._read(row)
        except Unusable as reason:
            return str(reason)

    def _pair(self, row: dict) -> dict:
        prompts, replies = [], []
        for side in ("chosen", "rejected"):
            value = _of(row, self.places[side])
            if value is None or value == "" or value == []:
                raise Unusable(f"bad: no {side} reply")
            turns = _turns(value)
            if turns is None:
                prompts.append(None)
                replies.append(_text(value, side))
            else:
                messages = _messages(turns, side)
                if messages[-1]["role"] != "assistant":
                    raise Unusable(
                        f"bad: the last turn is not the assistant's\n{side} ends with {messages[-1]['role']}"
                    )
                if any(turns[-1].get(name) for name in THOUGHTS):
                    raise Unusable(f"bad: thoughts apart from their reply\n{side}: {str(turns[-1])[:80]!r}")
                prompts.append(messages[:-1] or None)
                replies.append(messages[-1]["content"])
        prompt = self._prompt(row, with_context=prompts[0] is None)
        if prompts[0] != prompts[1] or prompt and prompts[0] and prompt != prompts[0][-len(prompt) :]:
            raise Unusable("bad: other prompts in chosen and rejected")
        prompt = prompts[0] or prompt
        if not prompt:
            raise Unusable("bad: no prompt")
        if prompt[-1]["role"] != "user":
            raise Unusable(f"bad: the prompt does not end with the user\nit ends with {prompt[-1]['role']}")
        if replies[0] == replies[1]:
            raise Unusable("bad: chosen = rejected")
        return {"prompt": self._with_system(row, prompt), "chosen": replies[0], "rejected": replies[1]}

    def _prompt(self, row: dict, with_context: bool) -> list[dict] | None:
        value = _of(row, self.places["prompt"]) if "prompt" in self.places else None
        if value is None or value == "" or value == []:
            return None
        if (turns := _turns(value)) is not None:
            return _messages(turns, "prompt")
        text = _text(value, "prompt")
        context = _of(row, self.places["context"]) if with_context and "context" in self.places else None
        if isinstance(context, str) and context.strip() and context != value:
            text = f"{text}\n\n{_text(context, 'context')}"
        return [{"role": "user", "content": text}]

    def _with_system(self, row: dict, prompt: list[dict]) -> list[dict]:
        text = _of(row, self.places["system"]) if "system" in self.places else None
        if not text or prompt[0]["role"] == "system":
            return prompt
        return [{"role": "system", "content": _text(text, "system")}, *prompt]

    def _talk(self, row: dict) -> dict:
        turns = _turns(_of(row, self.places[self.name]))
        if not turns:
            raise Unusable("bad: no conversation")
        messages = _messages(turns, self.name, people=True)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        last = replies[:2][-1] if replies else 0
        if not last or messages[last - 1]["role"] != "user":
            raise Unusable("no reply")
        chosen = messages[last]["content"]
        if len(chosen.split()) < 3:
            raise Unusable("a reply of fewer than three words")
        if chosen == (rejected := looping(chosen)):
            raise Unusable("a reply that loops")
        return {"prompt": messages[:last], "chosen": chosen, "rejected": rejected}


def looping(reply: str) -> str:
    """A reply that begins as this one and then repeats itself: its first six words, four times."""
    return " ".join(reply.split()[:6] * 4)


def _of(row: dict, place: str):
    """The value at a place, None where there is none: a column, or `instances.0.output` inside of one."""
    value = row
    for step in [place] if place in row else place.split("."):
        if isinstance(value, list):
            value = value[int(step)] if step.isdigit() and int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return None if value != value else value  # NaN: an empty cell


def _turns(value) -> list | None:
    """The turns of a conversation: a list, a turn alone, either written as JSON or Python, a text with `Human:` and `Assistant:`.

    Returns:
        None for a text, and for what is nothing of these.
    """
    if isinstance(value, str) and (said := SPOKEN.split(value))[1:2] == ["Human"] and not said[0].strip():
        turns = [{"role": who, "content": text} for who, text in zip(said[1::2], said[2::2], strict=True)]
        return turns if turns[-1]["content"].strip() else turns[:-1]  # a prompt may end where the reply begins
    found = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    found = [found] if isinstance(found, dict) else found
    speaks = isinstance(found, list) and all(isinstance(turn, dict) and {*turn} & {*WHO} for turn in found)
    return found if speaks and found else value if isinstance(value, list) else None


def _messages(turns: list, place: str, people: bool = False) -> list[dict]:
    """`{"role", "content"}` of each turn, runs of one speaker joined.

    Args:
        people: two speakers of no known role talk with each other: who speaks first is the user.
    """
    found, names = [], []
    for turn in turns:
        who = next((turn[key] for key in WHO if turn.get(key)), None) if isinstance(turn, dict) else None
        if not isinstance(who, str):
            raise Unusable(f"bad: a turn without a role\n{place}: {str(turn)[:80]!r}")
        names.append(who.strip().casefold())
    unknown = [name for name in dict.fromkeys(names) if name not in KNOWN]
    if unknown and (not people or {*names} & KNOWN.keys()):
        raise Unusable(f"bad: unknown role (known: {', '.join(KNOWN)})\n{place}: {unknown[0]!r}")
    if len(unknown) > 2:
        raise Unusable(f"more than two speakers\n{len(unknown)} of them")
    roles = KNOWN | dict(zip(unknown, ("user", "assistant"), strict=False))
    for name, turn in zip(names, turns, strict=True):
        value = next((turn[key] for key in TEXT if turn.get(key) is not None), None)
        if people and malformed(value) == "empty":
            continue
        text = _text(value, place)
        if found and found[-1]["role"] == roles[name]:
            found[-1]["content"] += "\n" + text
        else:
            found.append({"role": roles[name], "content": text})
    return found


def _text(value, place: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = number_text(value)
    if reason := malformed(value):
        raise Unusable(f"bad: {reason}\n{place}: {str(value)[:80]!r}")
    text = clean_text(value, fences=True).rstrip()
    lines = [line for line in text.splitlines() if line]
    indented = len(lines) > 1 and all(
        line[0] in " \t" for line in lines
    )  # the first indentation means something in code
    return text if text.startswith(("  ", "\t")) or indented else text.strip()


def text_of(row: dict) -> str:
    """The words of a prompt, for finding near-duplicates: all pairs of a prompt stay on one side."""
    return "\n".join(message["content"] for message in row["prompt"])
