"""Messages -> token ids with a mask of what is trained, under any chat template. Used by train.py, after formats.py."""

import json
import re
from collections import Counter

from shared import UserError
from shared.data.encoding import PlainText, Rendered, TemplateRefusal
from shared.training.show_data import marked

# For models without a template, such as GPT-2: plain words, since such a tokenizer has no tokens for roles. Each reply starts on
# a line of its own, so that no token reaches from the prompt into it, and ends with the end token, which is trained. Llama 2 was
# pretrained with its start token in front; GPT-2 and Falcon have none of their own.
PLAIN_TEMPLATE = (
    "{% if bos_token is defined and bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Assistant:\n' }}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ ('System:\n' if message['role'] == 'system' else 'User:\n') + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
OWN_THOUGHTS = re.compile(r"(\.|\[['\"])(reasoning_content|reasoning|thinking)\b")  # a template that reads such a field
PROBE = [
    {"role": role, "content": text}
    for role, text in zip(("user", "assistant") * 2, ("One?", "Two.", "Three?", "Four."), strict=True)
]
NOTES = {
    "system": "system turns were put before the first user turn: the chat template shows none",
    "tools": "rows have tools that the chat template does not show",
    "prompt": "rows do not show their reply behind the chat template's own prompt for one (which opens <think>, say), although "
    "it will be asked for so: --chat_template_path takes another template",
    "thoughts": "replies have thoughts (reasoning_content) that the chat template does not show there: they are not trained",
}


class Chat:
    """A tokenizer with its chat template, and what a conversation teaches under it.

    Attributes:
        tokenizer, plain: transformers' tokenizer, and the same one for text that holds no control token.
        stop: id of the token with which the template ends a reply, None where it writes none.
        cuts_thoughts: whether the template leaves out what stands before `</think>` in the last reply, too.
        notes: how many rows or turns each of NOTES holds for.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.plain, self.notes = tokenizer, PlainText(tokenizer), Counter()
        template = tokenizer.chat_template
        self.source = template if isinstance(template, str) else " ".join(template.values())
        try:
            rendered = self.plain.render(PROBE, prompts=(1, 3))
        except TemplateRefusal as error:
            raise UserError(f"the chat template refuses a user and an assistant in turn: {error}.") from error
        ends = [self._end(rendered, number) for number in (3, 1)]  # gpt-oss ends its last reply with another token
        self.stop = next((end[1] for end in ends if end), None)
        thinking = [*PROBE[:3], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFour."}]
        try:
            self.cuts_thoughts = self.plain.render(thinking, thoughts=True).content.get(3, (0, 0))[0] is None
        except TemplateRefusal:
            self.cuts_thoughts = False

    def fit(self, row: dict) -> dict | str:
        """The row as the template can show it, or the reason for dropping it: its own words, or the turn that it leaves out.

        Args:
            row: as `formats.Reader` returns it.
        """
        messages, tools = plain_messages(row["messages"]), _tools(row)
        roles = {message["role"] for message in messages}
        if "tool" in roles and "tool" not in self.source or _calls(messages) and "tool_calls" not in self.source:
            return "bad: tool calls, which the chat template does not show\n" + ", ".join(sorted(roles))
        if tools and "tools" not in self.source:
            self.notes["tools"] += 1
        refused = self._refused(messages, tools)
        if refused and messages[0]["role"] == "system" and len(messages) > 1 and messages[1]["role"] == "user":
            system, first, *rest = messages
            merged = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
            if not self._refused(merged, tools):
                self.notes["system"] += 1
                return {**row, "messages": merged}
        return refused or {**row, "messages": row["messages"]}

    def _refused(self, messages: list[dict], tools) -> str | None:
        try:
            rendered = self.plain.render(messages, tools, thoughts=True)
        except TemplateRefusal as error:
            return f"bad: the chat template refuses the row: {' '.join(str(error).split())[:160]}"
        for number, message in enumerate(messages):
            if message["content"].strip() and number not in rendered.content:
                return f"bad: a turn of the {message['role']} that the chat template does not show"
        return None

    def _own_thoughts(self, messages: list[dict]) -> list[dict]:
        """Thoughts at the beginning of a reply apart from it, where the template has a place for them, as it would part them, or
        cuts them off (DeepSeek R1, QwQ)."""
        apart = OWN_THOUGHTS.search(self.source)
        if not apart and not self.cuts_thoughts:
            return messages
        parted = []
        for message in messages:
            before, closed, after = message["content"].partition("</think>")
            opened = before.lstrip().startswith("<think>")
            if closed and message["role"] == "assistant" and (opened or not apart):
                thoughts = before.lstrip().removeprefix("<think>").strip("\n")
                message = {**message, "content": after.lstrip("\n") if apart else after, "reasoning_content": thoughts}
            parted.append(message)
        return parted

    def prompt_ids(self, talk: dict) -> list[int]:
        """Ids of the `messages` of a talk (and its `tools`) up to where the reply begins, as deploy encodes them."""
        return self.plain.encode_chat(self._own_thoughts(plain_messages(talk["messages"])), _tools(talk))

    def tokenize(self, row: dict, max_length: int) -> dict:
        """Token ids, labels (-100 where nothing is trained) and whether the row was cut.

        Only the assistant's turns are trained, each with the token that ends it; tool calls, turns marked `train: false` and what
        stands before the first turn of the user are not. A row that is too long is cut after the last whole reply that fits;
        where not even one fits, in its middle.
        """
        messages = self._own_thoughts(plain_messages(row["messages"]))
        asked = next((i for i, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
        replies = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
            and i > asked
            and message.get("train", True)
            and "tool_calls" not in message
        ]
        rendered = self.plain.render(messages, _tools(row), prompts=tuple(replies), thoughts=True)
        ids, offsets = self.plain.encode_rendered(rendered)
        spans, ends = [], []
        for i in replies:
            if i not in rendered.content:
                continue
            begin, close = rendered.content[i]
            self.notes["prompt"] += i == len(messages) - 1 and i not in rendered.prompts
            marked = next((span for span in rendered.generation if span[0] <= close <= span[1]), None)
            begin = marked[0] if marked else rendered.prompts.get(i, begin)
            if begin is None:
                continue
            self.notes["thoughts"] += self._loses_thoughts(rendered, messages[i], begin, close)
            end = self._end(rendered, i)
            spans.append((begin, end[0] if end else max(close, marked[1] if marked else 0)))
            ends += [end[0]] if end else []
        labels = [-100] * len(ids)
        at = 0  # both are in order, so that each token is looked at once
        for i, (start, stop) in enumerate(offsets):
            while at < len(spans) and spans[at][1] <= start:
                at += 1
            if at < len(spans) and start < spans[at][1] and stop > spans[at][0]:
                # A template may write another token into the history than the one at which the model stops (gpt-oss).
                labels[i] = self.stop if stop in ends and ids[i] in self.plain.control_ids else ids[i]
        last = len(messages) - 1
        if spans and last in replies and self.stop is not None and not self._end(rendered, last):
            ids, labels = [*ids, self.stop], [*labels, self.stop]  # GLM: the next turn's first token ends a reply
        truncated = len(ids) > max_length
        if truncated:
            whole = [i + 1 for i in range(max_length) if labels[i] != -100 and labels[i + 1] == -100]
            cut = whole[-1] if whole else max_length
            ids, labels = ids[:cut], labels[:cut]
        return {"input_ids": ids, "labels": labels, "truncated": truncated}

    def _loses_thoughts(self, rendered: Rendered, message: dict, begin: int, close: int) -> bool:
        thoughts = message.get("reasoning_content", "").strip()
        return bool(thoughts) and thoughts[:40] not in rendered.text[begin:close]

    def _end(self, rendered: Rendered, number: int) -> tuple[int, int] | None:
        """Where the token ends that ends a reply, and its id: the first control token behind it, white space aside."""
        if number not in rendered.content:
            return None
        close = rendered.content[number][1]
        found = next(((begin, end, id_) for begin, end, id_ in rendered.control if begin >= close), None)
        starts = {self.tokenizer.bos_token_id} - {self.tokenizer.eos_token_id}
        if found is None or found[2] in starts or rendered.text[close : found[0]].strip():
            return None
        return found[1:]

    def log_notes(self, log) -> None:
        """Says what was left out or moved, and of how many rows."""
        for name, count in self.notes.items():
            if count:
                log.info("%s %s", f"{count:,}", NOTES[name])


def plain_messages(messages: list[dict]) -> list[dict]:
    """Messages as templates read them, without the empty fields that a table adds, and with tool calls as objects."""
    found = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        if isinstance(message.get("tool_calls"), str):
            message["tool_calls"] = json.loads(message["tool_calls"])
        found.append(message)
    return found


def _tools(row: dict) -> list | None:
    return json.loads(row["tools"]) if row.get("tools") else None


def _calls(messages: list[dict]) -> bool:
    return any("tool_calls" in message for message in messages)


def sample_talks(rows, most: int = 20) -> list[dict]:
    """Beginnings of conversations, each up to its second reply if it has one, short enough to be shown and answered quickly."""
    talks = []
    for row in rows:
        messages = plain_messages(row["messages"])
        ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0 and m.get("train", True)]
        talk = messages[: ends[:2][-1]] if ends else []
        if talk and sum(len(message["content"]) for message in talk) <= 1000:
            talks.append({"messages": talk, "tools": row.get("tools")})
        if len(talks) == most:
            break
    return talks


def preflight(rows: list[dict], stop: int | None, max_length: int) -> dict:
    """What a training run would learn from these tokenized rows. `rows` counts those with something to learn.

    Raises:
        UserError: nothing would be trained, or no turn's end token.
    """
    useful = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    turns = ended = 0
    for row in useful:
        labels = [*row["labels"], -100]
        ends = [i for i in range(len(labels) - 1) if labels[i] != -100 and labels[i + 1] == -100]
        turns, ended = turns + len(ends), ended + sum(labels[i] == stop for i in ends)
    tokens = sum(len(row["input_ids"]) for row in useful)
    supervised = sum(label != -100 for row in useful for label in row["labels"][1:])
    cut = sum(row["truncated"] for row in rows)
    if not useful:
        why = (
            f" after the cut at --max_length {max_length}. Raise it." if cut else ": no reply is shown by the template."
        )
        raise UserError(f"preflight: none of {len(rows):,} rows has a token to learn{why}")
    if not ended and cut == len(rows):
        raise UserError(
            f"preflight: --max_length {max_length} cuts every row before its first reply ends, so the model would never stop: "
            "raise it."
        )
    if not ended:
        raise UserError(
            "preflight: no turn's end token is trained, so the model would never stop: the chat template must write a special "
            "token behind each reply."
        )
    return {
        "rows": len(useful),
        "rows_with_nothing_to_learn": len(rows) - len(useful),
        "truncated_rows": sum(row["truncated"] for row in useful),
        "tokens": tokens,
        "longest_row": max(len(row["input_ids"]) for row in useful),
        "supervised_share": round(supervised / tokens, 4),
        "end_token_trained_share": round(ended / turns, 4),
    }


def show(row: dict, tokenizer) -> str:
    """The text of a row with what is trained between brackets."""
    return marked(tokenizer, row["input_ids"], row["labels"])
