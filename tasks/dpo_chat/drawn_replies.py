"""Replies of a model, drawn as they are served, and what can be counted of them: whether they end, whether they loop."""

from collections import Counter
from itertools import takewhile

import torch
from transformers import GenerationConfig

from shared.inference.torch_runner import carries_state

MOST, FEWEST = 128, 32  # new tokens of a sample reply


@torch.no_grad()
def draw(model, plain, prompts: list[list[dict]], served: GenerationConfig, most: int, greedy: bool = False):
    """One reply to each prompt, in one batch where the model can.

    Args:
        plain: `shared.data.encoding.PlainText`. prompts: messages up to where the reply begins.
        served: of `chat_model.serve_as`. most: new tokens of a reply. greedy: the likeliest tokens instead.

    Returns:
        Texts, and whether each reply ended by itself.
    """
    ids, pad = [plain.encode_chat(messages) for messages in prompts], served.pad_token_id
    if carries_state(model, model.config) and len({*map(len, ids)}) > 1:  # padding would change what they reply
        alone = [draw(model, plain, [messages], served, most, greedy) for messages in prompts]
        return [texts[0] for texts, _ in alone], [ended[0] for _, ended in alone]
    longest = max(map(len, ids))
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    settings = GenerationConfig(**(dict(do_sample=False, repetition_penalty=1.0) if greedy else served.to_diff_dict()))
    if greedy:  # what is left out would be taken from the model's own
        settings.temperature = settings.top_p = settings.top_k = None
    settings.eos_token_id, settings.pad_token_id, settings.max_new_tokens = served.eos_token_id, pad, most
    new = model.generate(input_ids=padded, attention_mask=mask, generation_config=settings)[:, longest:]
    ends, texts, ended = {*torch.tensor(served.eos_token_id).reshape(-1).tolist()}, [], []
    for row in new.tolist():
        own = list(takewhile(lambda token: token not in ends, row))  # behind the end stands padding
        texts.append(plain.tokenizer.decode(own, skip_special_tokens=True).strip())
        ended.append(len(own) < len(row))
    return texts, ended


def sample(model, plain, rows: list[dict], served: GenerationConfig, prefix: str, seed: int) -> tuple[list, list, dict]:
    """Replies to the prompts as they are served and greedy ones, and shares of them that end and that loop.

    A reply may have twice the tokens of the longest chosen one, within bounds; what is longer does not end by itself.
    """
    if not rows:
        return [], [], {}
    longest = max(len(plain.encode(row["chosen"])) for row in rows)
    most, prompts = min(MOST, max(FEWEST, 2 * longest)), [row["prompt"] for row in rows]
    torch.manual_seed(seed)
    drawn, ended = draw(model, plain, prompts, served, most)
    greedy, greedy_ended = draw(model, plain, prompts, served, most, greedy=True)
    found = {}
    for name, texts, ends in (("replies", drawn, ended), ("greedy_replies", greedy, greedy_ended)):
        found[f"{prefix}_{name}_that_end"] = round(sum(ends) / len(texts), 4)
        found[f"{prefix}_{name}_that_loop"] = round(sum(map(loops, texts)) / len(texts), 4)
    return drawn, greedy, found


def loops(text: str) -> bool:
    """Whether four words in a row come three times."""
    words = text.lower().split()
    return max(Counter(zip(words, words[1:], words[2:], words[3:], strict=False)).values(), default=0) >= 3


def sample_rows(rows, most: int = 20) -> list[dict]:
    """Rows that are short enough to be shown and answered quickly."""
    short = (row for row in rows if sum(len(message["content"]) for message in row["prompt"]) <= 1000)
    return [row for row, _ in zip(short, range(most), strict=False)]
