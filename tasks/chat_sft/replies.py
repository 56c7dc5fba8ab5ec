"""Replies of a model, drawn as they are served and greedily, and what can be counted of them. Used by train.py and mixture.py."""

from collections import Counter
from itertools import takewhile

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from shared.inference.torch_runner import carries_state

# New tokens of a sample reply: as served, as many as in the card's example (methods.usage)
MOST, FEWEST = 128, 32


def room(chat, talks: list[dict]) -> int:
    """New tokens that greedy replies may have, some of which are endless loops: twice the longest reference, within bounds."""
    longest = max((len(chat.plain.encode(talk["messages"][-1]["content"])) for talk in talks), default=0)
    return min(MOST, max(FEWEST, 2 * longest))


@torch.no_grad()
def reply(model, chat, conversations: list[dict], served: GenerationConfig, most: int = 64, greedy: bool = True):
    """Replies, one batch for all prompts where the model can.

    Args:
        chat: `chats.Chat`.
        conversations: `messages` up to where the reply begins, and `tools` where there are any.
        served: of `methods.serve_as`; its stop tokens hold for greedy replies too.
        most: new tokens of a reply.

    Returns:
        Texts, and whether each reply ended by itself.
    """
    if not conversations:
        return [], []
    ids = [chat.prompt_ids(talk) for talk in conversations]
    if carries_state(model, model.config) and len({*map(len, ids)}) > 1:  # padding would change what they reply
        alone = [reply(model, chat, [talk], served, most, greedy) for talk in conversations]
        return [texts[0] for texts, _ in alone], [ended[0] for _, ended in alone]
    pad, longest = chat.tokenizer.pad_token_id, max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device
        ),
    }
    settings = GenerationConfig(
        **(served.to_diff_dict() if not greedy else {"do_sample": False, "repetition_penalty": 1.0}),
    )
    settings.eos_token_id, settings.pad_token_id, settings.max_new_tokens = served.eos_token_id, pad, most
    if greedy:
        settings.temperature = settings.top_p = settings.top_k = None
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        # peft's `generate` looks for the cache by the name that it had before transformers 5.24, and so would read one token a
        # step; nor does it count positions, so that padding would change a reply
        prompt, rows = model.get_prompt(len(ids)), model.get_input_embeddings()(batch["input_ids"])
        mask = F.pad(batch["attention_mask"], (prompt.shape[1], 0), value=1)
        batch = {"inputs_embeds": torch.cat([prompt.to(rows.dtype), rows], 1), "attention_mask": mask}
        model, longest = model.get_base_model(), 0
    # What is left open is taken from there, and the untrained model's own may ask for more
    model.generation_config = served
    new = model.generate(**batch, generation_config=settings)[:, longest:]
    ends, texts, ended = {*torch.tensor(served.eos_token_id).reshape(-1).tolist()}, [], []
    for row in new.tolist():
        # Behind the end stands padding, which is no special token everywhere and would be read as text
        own = list(takewhile(lambda token: token not in ends, row))
        texts.append(chat.tokenizer.decode(own, skip_special_tokens=True).strip())
        ended.append(len(own) < len(row))
    return texts, ended


def sample(model, chat, talks: list[dict], served: GenerationConfig, prefix: str, seed: int) -> tuple[list, list, dict]:
    """Replies to the last prompt of each talk as they are served, greedy ones, and the `counts` of the former."""
    prompts = [{**talk, "messages": talk["messages"][:-1]} for talk in talks]
    references = [talk["messages"][-1]["content"] for talk in talks]
    torch.manual_seed(seed)
    drawn, ended = reply(model, chat, prompts, served, MOST, greedy=False)
    greedy, _ = reply(model, chat, prompts, served, room(chat, talks))
    return drawn, greedy, counts(drawn, ended, references, prefix)


def loops(text: str) -> bool:
    """Whether four words in a row come three times."""
    words = text.lower().split()
    return max(Counter(zip(words, words[1:], words[2:], words[3:], strict=False)).values(), default=0) >= 3


def counts(texts: list[str], ended: list[bool], references: list[str], prefix: str) -> dict[str, float]:
    """Shares of replies that end by themselves and that loop; distinct-2 (Li et al. 2016), the share of different ones among all
    pairs of words; words of a reply against those of its reference, on average.

    Returns:
        By `<prefix>_<name>`; nothing where there are no replies.
    """
    if not texts:
        return {}
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)]
    found = {
        "replies_that_end": sum(ended) / len(texts),
        "replies_that_loop": sum(map(loops, texts)) / len(texts),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "length_to_reference": sum(len(text.split()) for text in texts)
        / max(1, sum(len(r.split()) for r in references)),
    }
    return {f"{prefix}_{name}": round(value, 4) for name, value in found.items()}


def in_words(trained: dict[str, float], base: dict[str, float]) -> str:
    """What a verdict says of the replies, from both models' `counts`; nothing where there are none."""
    if not trained:
        return ""
    ends, loop = ((base[f"base_replies_that_{does}"], trained[f"test_replies_that_{does}"]) for does in ("end", "loop"))
    return f"Replies that end by themselves: {ends[0]:.0%} -> {ends[1]:.0%}; that loop: {loop[0]:.0%} -> {loop[1]:.0%}."
