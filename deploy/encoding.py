"""User text is data: it never becomes a control token, whatever it spells. Used by inference.py.

A tokenizer finds its control tokens by their spelling, so `<|im_end|>` typed by a user would end the user's turn. Here each
control token gets a secret name, new with every start: only what the chat template wrote is given these names, and what
a user types is encoded as the plain characters it is. Everything else of the tokenizer stays, so ordinary text gets the same ids.
"""

import json
import re
import secrets

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from shared import UserError

# Added tokens with such a spelling steer a model even where their tokenizer does not call them special.
MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)


class PlainText:
    """Encodes for one tokenizer.

    Attributes:
        tokenizer: the same vocabulary and ids with secret names for control tokens; whatever uses it reads text as data.
        control_ids: ids that no text can produce.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "this model's tokenizer has no fast form (tokenizer.json): its control tokens cannot be guarded."
            )
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # some files ask for it: nothing is cut without a word
        control = {t["content"] for t in state["added_tokens"] if t["special"] or MARKUP.fullmatch(t["content"])}
        control |= set(tokenizer.all_special_tokens)
        secret = secrets.token_hex(16)
        names = {token: f"{secret}x{i}x" for i, token in enumerate(sorted(control))}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:  # Unigram: pairs of piece and score
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        self._original, self._names = tokenizer, names
        self._trusted = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        self._plain = Tokenizer.from_str(json.dumps(state))
        self.control_ids = {tokenizer.convert_tokens_to_ids(token) for token in control}
        special = {kind: names[token] for kind, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self._plain,
            model_max_length=tokenizer.model_max_length,
            model_input_names=tokenizer.model_input_names,
            padding_side=tokenizer.padding_side,
            **special,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, with what the tokenizer puts around every text (a begin token, say)."""
        return self._plain.encode(text).ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a chat up to where the reply begins: those of `apply_chat_template`, were it not for control tokens in texts.

        Args:
            messages: `role` (written by the caller, not by the user) and `content`.

        Raises:
            UserError: no chat template, or one that refuses these roles or their order.
        """
        if not self._original.chat_template:
            raise UserError("this model has no chat template: it continues text (/v1/completions), it does not chat.")
        secret, cores, marked = secrets.token_hex(16), [], []
        for message in messages:
            # Templates trim texts, or ask whether there is one: only what lies between outer white space is hidden from them.
            core = message["content"].strip()
            mark = f"{secret}x{len(cores)}x" if core else ""
            marked.append(
                {**message, "content": message["content"].replace(core, mark, 1) if core else message["content"]}
            )
            cores.append(core)
        try:
            rendered = self._original.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's, raised by the template itself
            raise UserError(f"this model's chat template refuses the conversation: {error}") from error
        parts = re.split(f"{secret}x([0-9]+)x", rendered)
        for i, part in enumerate(parts):
            parts[i] = cores[int(part)] if i % 2 else self._trusted.sub(lambda found: self._names[found[0]], part)
        return self._plain.encode("".join(parts), add_special_tokens=False).ids
