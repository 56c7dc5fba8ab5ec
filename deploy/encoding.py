"""User text is data: it never becomes a control token, whatever it spells. Used by inference.py.

A tokenizer finds its control tokens by their spelling, so `<|im_end|>` typed by a user would end the user's turn. Here each
control token gets a secret name, new with every start: only what the chat template wrote is given these names, and what
a user types is encoded as the plain characters it is. Everything else of the tokenizer stays, so ordinary text gets the same ids.
"""

import ctypes
import json
import re
import secrets
import threading
from concurrent.futures import Future

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from shared import UserError

# Added tokens with such a spelling steer a model even where their tokenizer does not call them special.
MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)
CHARACTERS = 16  # of a token, more than nearly all have


class TooLong(UserError):
    """The text does not fit into what the model reads; nothing is cut."""


class PlainText:
    """Encodes for one tokenizer.

    Args:
        tokenizer: transformers' own.
        most: tokens that the model reads.

    Attributes:
        tokenizer: the same vocabulary and ids with secret names for control tokens; whatever uses it reads text as data.
        control_ids: ids that no text can produce.
    """

    def __init__(self, tokenizer, most: int):
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
        self._original, self._names, self._most = tokenizer, names, most
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
        """Ids of a plain text, with what the tokenizer puts around every text (a begin token, say).

        Raises:
            TooLong: so many characters that their tokens cannot fit; fewer, and what is too long comes back whole.
        """
        return self._encode(text)

    def split(self, text: str) -> int:
        """Number of tokens of a text of any length."""
        return len(self._ids(text, False))

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        size, tokens = CHARACTERS * self._most, 0
        if len(text) > size:  # read part by part first, so that a megabyte takes no longer than what fits
            for start in range(0, len(text), size):
                # a cut makes two tokens of one, at both ends
                tokens += len(self._ids(text[start : start + size], False)) - 2
                if tokens > self._most:
                    raise TooLong(
                        f"the text has {len(text):,} characters; this model reads at most {self._most:,} tokens."
                    )
        return self._ids(text, add_special_tokens)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # `encode` would keep every other thread of Python waiting
        return self._plain.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a chat up to where the reply begins: those of `apply_chat_template`, were it not for control tokens in texts.

        Args:
            messages: `role` (written by the caller, not by the user) and `content`.

        Raises:
            UserError: no chat template, or one that refuses these roles or their order.
            TooLong: as `encode`.
        """
        if not self._original.chat_template:
            raise UserError("this model has no chat template: it continues text, it does not chat.")
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
        return self._encode("".join(parts), add_special_tokens=False)


class Deadline:
    """Runs what came with a model, a tokenizer's patterns or a chat template, for at most `seconds` at a time.

    What is not back by then is given up: a template, which is Python, is ended; native code cannot be, and until it returns
    nothing more is begun, so that it takes one core and not the server.
    """

    def __init__(self, seconds: float):
        self.seconds, self._given_up = seconds, []

    def run(self, function, *args):
        """The function's result. Raises what it raises, and UserError when it is late, or when another one still runs."""
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        if self._given_up:
            raise UserError("this model's tokenizer or chat template has not come back from another text yet.")
        result = Future()

        def work():
            try:
                result.set_result(function(*args))
            except Exception as error:
                result.set_exception(error)
            except BaseException as error:  # native code that fails raises what is no Exception
                result.set_exception(UserError(f"this model's tokenizer fails on this text ({type(error).__name__})."))

        thread = threading.Thread(target=work, name="encoding", daemon=True)
        thread.start()
        try:
            return result.result(self.seconds)
        except TimeoutError:
            self._given_up.append(thread)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            raise UserError(
                f"this model's tokenizer or chat template needed more than {self.seconds:g} s for this text."
            ) from None
