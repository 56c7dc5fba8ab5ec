"""Rows of any chat data set -> messages -> token ids with a mask of what is trained. Used by train.py; pure functions."""

import re

from trl.chat_template_utils import has_generation_markers

from shared import UserError
from shared.data.cleaning import clean_text, malformed

# Which columns make a conversation, the first that fits. `--columns prompt=q completion=a` maps others.
FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
GREETING = re.compile(
    r"\W*((hi|hey|hello|yo|sup|hiya|good (morning|evening|day)|howdy|there|you|whats|what|up|bye|ok|s|how|are)\W*)+",
    re.I,
)

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


def find_format(columns: list[str], mapping: list[str]) -> tuple[str, dict[str, str]]:
    """The entry of FORMATS that the columns fit, and where each of its fields is found (`instances.0.output` reaches inside).

    Raises:
        UserError: found / expected / how to map.
    """
    wrong = [pair for pair in mapping if pair.count("=") != 1 or pair.split("=")[1].split(".")[0] not in columns]
    if wrong:
        raise UserError(f"--columns {wrong[0]}: write name=column, the column one of: {', '.join(columns)}.")
    places = {column: column for column in columns} | dict(pair.split("=") for pair in mapping)
    chosen = dict(pair.split("=") for pair in mapping)
    fitting = [name for name, needed in FORMATS.items() if all(field in places for field in needed)]
    if not fitting:
        raise UserError(
            f"no chat columns: found {', '.join(columns)}; expected one of {'; '.join(FORMATS)}. Map yours, for example "
            f"--columns prompt={columns[0]} completion={columns[-1]}."
        )
    return next((name for name in fitting if any(field in chosen for field in FORMATS[name])), fitting[0]), places


def _reach(row: dict, place: str):
    value = row
    for step in place.split("."):
        if isinstance(value, list):
            value = value[int(step)] if step.isdigit() and int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def to_messages(row: dict, chat_format: str, places: dict[str, str]) -> dict | str:
    """One row as `{"messages": [{"role", "content"}, ...]}`, or the reason for dropping it (see `clean_rows`).

    Runs of one speaker become one turn; turns after the last reply are cut, since nothing is learnt from them. Conversations
    between people (ShareGPT columns whose `from` are names): who speaks first is the user, the other the assistant.
    """
    if chat_format in ("messages", "conversations"):
        turns = _reach(row, places[chat_format])
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return "bad: wrong type"
        pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
    else:
        first, *_, last = FORMATS[chat_format]
        prompt, reply = _reach(row, places[first]), _reach(row, places[last])
        if isinstance(prompt, list) and isinstance(reply, list):
            return to_messages({"messages": prompt + reply}, "messages", {"messages": "messages"})
        extra = _reach(row, places["input"]) if chat_format.startswith("instruction") and "input" in places else None
        if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
            prompt = f"{prompt}\n\n{extra}"
        pairs = [("user", prompt), ("assistant", reply)]
    for _, text in pairs:
        reason = malformed(text)
        if reason not in (None, "empty"):
            return f"bad: {reason}"
    people = [who for who in dict.fromkeys(who for who, _ in pairs) if who not in ROLES]
    if len(people) > 2 or (people and len(people) != len({who for who, _ in pairs})):
        return "more than two speakers"
    roles = ROLES | dict(zip(people, ("user", "assistant"), strict=False))
    messages = []
    for who, text in pairs:
        text = clean_text(text).strip()
        if not text:
            continue
        if messages and messages[-1]["role"] == roles[who]:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": roles[who], "content": text})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return "bad: empty" if not any(isinstance(text, str) and text.strip() for _, text in pairs) else "no reply"
    if people and all(GREETING.fullmatch(message["content"]) for message in messages):
        return "greetings only"
    return {"messages": messages}


def text_of(row: dict) -> str:
    """The words of a conversation, for finding near-duplicates."""
    return "\n".join(message["content"] for message in row["messages"])


def sample_talks(conversations, most: int = 20) -> list[list[dict]]:
    """Beginnings of conversations, each up to its second reply if it has one, short enough to be shown and answered quickly."""
    talks = []
    for messages in conversations:
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        talk = messages[: ends[:2][-1]] if ends else []
        if talk and sum(len(message["content"]) for message in talk) <= 1000:
            talks.append(talk)
        if len(talks) == most:
            break
    return talks


def spare_token(tokenizer) -> str:
    """A token for padding that no text contains and that is not the end of a turn: padding must never teach a model to stop.

    GPT-2 has no spare token; ` SolidGoldMagikarp` is in its vocabulary but in no text (Rumbelow & Watkins 2023).
    """
    candidates = (tokenizer.pad_token, tokenizer.unk_token, *tokenizer.all_special_tokens, "ĠSolidGoldMagikarp")
    vocabulary = tokenizer.get_vocab()
    for token in candidates:
        if token and token in vocabulary and token not in (tokenizer.eos_token, tokenizer.bos_token):
            return token
    raise UserError(
        "the tokenizer has no token to pad with besides its end token: give it a pad_token and save it again."
    )


def reply_spans(messages: list[dict], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and from where to where each reply reaches in it, its end token included.

    For templates that do not mark replies, such as SmolLM2's and Llama 2's: a reply is what a template adds to the
    conversation before it. A reply without anything before it is not trained.

    Raises:
        UserError: the template changes earlier turns when later ones follow, or drops them.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0):
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                "the chat template does not mark what the assistant says, and does not show it by itself either. Put "
                "{% generation %} and {% endgeneration %} around the reply and its end token, and save the tokenizer."
            )
        end = text.find(tokenizer.eos_token, len(before), len(after))
        spans.append((len(before), len(after) if end < 0 else end + len(tokenizer.eos_token)))
    return text, spans


def tokenize(messages: list[dict], tokenizer, max_length: int) -> dict:
    """Token ids, labels (-100 where nothing is trained) and whether the row was cut.

    Only the assistant's turns are trained, each with its end token. A row that is too long is cut after the last whole reply
    that fits; where not even one fits, in its middle.
    """
    if has_generation_markers(tokenizer.chat_template):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    else:
        text, spans = reply_spans(messages, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        mask = [any(start <= at < end for start, end in spans) for at, _ in encoded["offset_mapping"]]
    truncated = len(ids) > max_length
    if truncated:
        ends = [i + 1 for i in range(max_length) if mask[i] and not mask[i + 1]]
        cut = ends[-1] if ends else max_length
        ids, mask = ids[:cut], mask[:cut]
    labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels, "truncated": truncated}


def preflight(rows: list[dict], eos_token_id: int) -> dict:
    """What a training run would learn from these tokenized rows. `rows` counts those with something to learn.

    Raises:
        UserError: nothing would be trained, or no turn's end token.
    """
    useful = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    turns = ended = 0
    for row in useful:
        labels = [*row["labels"], -100]
        ends = [i for i in range(len(labels) - 1) if labels[i] != -100 and labels[i + 1] == -100]
        turns, ended = turns + len(ends), ended + sum(labels[i] == eos_token_id for i in ends)
    tokens = sum(len(row["input_ids"]) for row in useful)
    supervised = sum(label != -100 for row in useful for label in row["labels"][1:])
    if not useful:
        raise UserError(
            f"preflight: none of {len(rows):,} rows has a token to learn after truncation. Raise --max_length."
        )
    if not ended:
        raise UserError(
            "preflight: no turn's end token is trained, so the model would never stop: see the chat template."
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


def show(row: dict, tokenizer, colour: bool) -> str:
    """The text of a row with what is trained in green (or between brackets, where there is no terminal)."""
    before, after = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    text, inside = "", False
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    start = 0
    for i in range(1, len(pieces) + 1):
        if i == len(pieces) or (row["labels"][i] != -100) != (row["labels"][i - 1] != -100):
            inside = row["labels"][i - 1] != -100
            part = tokenizer.decode(row["input_ids"][start:i])
            text, start = text + (f"{before}{part}{after}" if inside else part), i
    return text
