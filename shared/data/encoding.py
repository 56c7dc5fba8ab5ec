"""Text is data: it never becomes a control token, whatever it spells. Used by the chat tasks and by deploy.

A tokenizer finds its control tokens by their spelling, so `<|im_end|>` in a text would end the turn that holds it. Here each
control token gets a secret name, new with every start: only what the chat template wrote is given these names, and a
text is encoded as the plain characters it is. Everything else of the tokenizer stays, so ordinary text gets the same ids.
"""

import bisect
import json
import re
import secrets
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from shared import UserError

# Added tokens with such a spelling steer a model even where their tokenizer does not call them special.
MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
THOUGHTS = ("<think>", "</think>")


CHARACTERS = 16  # of a token, more than nearly all have


class TooLong(UserError):
    """The text does not fit into what the model reads; nothing is cut."""


class TemplateRefusal(UserError):
    """The chat template itself raised, with its own words."""


@dataclass
class Rendered:
    """A conversation as its template writes it. Places are characters of `text`.

    Attributes:
        text: control tokens of the template by their secret names, those in texts as plain characters.
        content: by number of the message, where its text begins (None: the template cut its beginning off) and ends. White space
            around it is left out; a message without text, or one that the template does not show, is absent.
        control: begin, end and id of each control token that the template wrote, in order.
        generation: what the template marks as the assistant's, empty where it marks nothing.
        prompts: by number of the message, where a prompt for it ends; absent where the template writes another history then.
    """

    text: str = ""
    content: dict[int, tuple[int | None, int]] = field(default_factory=dict)
    control: list[tuple[int, int, int]] = field(default_factory=list)
    generation: list[tuple[int, int]] = field(default_factory=list)
    prompts: dict[int, int] = field(default_factory=dict)


class PlainText:
    """Encodes for one tokenizer.

    Args:
        tokenizer: transformers' own.
        most: tokens that the model reads, for `TooLong`; None: texts of any length are encoded.

    Attributes:
        tokenizer: the same vocabulary and ids with secret names for control tokens; whatever uses it reads text as data.
        control_ids: ids that no text can produce.
    """

    def __init__(self, tokenizer, most: int | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "this model's tokenizer has no fast form (tokenizer.json): its control tokens cannot be guarded."
            )
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # some files ask for it: nothing is cut without a word
        control = {t["content"] for t in state["added_tokens"] if t["special"] or MARKUP.fullmatch(t["content"])}
        control |= set(tokenizer.all_special_tokens)
        # A piece that merges make up is ordinary text, whatever it was chosen for: GPT-2 pads with ` SolidGoldMagikarp`.
        merges = state["model"].get("merges") or []
        made = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges}
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in control & made]
        control -= made
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
        self._ids = {token: tokenizer.convert_tokens_to_ids(token) for token in control}
        spellings = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
        self._mark = secrets.token_hex(16)
        self._control = re.compile(spellings)
        self._parts = re.compile(f"{self._mark}([tbe])([0-9]+)x|{spellings}")
        self._plain = Tokenizer.from_str(json.dumps(state))
        self.control_ids = set(self._ids.values())
        special = {
            k: names.get(token, token) for k, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
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
        self._check_length(text)
        return self._encode(text, True)

    def split(self, text: str) -> int:
        """Number of tokens of a text of any length."""
        return len(self._encode(text, False))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # `encode` would keep every other thread of Python waiting
        return self._plain.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _check_length(self, text: str) -> None:
        if self._most is None or len(text) <= CHARACTERS * self._most:
            return
        tokens, size = 0, CHARACTERS * self._most
        for start in range(0, len(text), size):  # part by part, so that a megabyte takes no longer than what fits
            # a cut makes two tokens of one, at both ends
            tokens += len(self._encode(text[start : start + size], False)) - 2
            if tokens > self._most:
                raise TooLong(f"the text has {len(text):,} characters; this model reads at most {self._most:,} tokens.")

    def encode_rendered(self, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and where each stands in `rendered.text` (begin, end)."""
        encoded = self._plain.encode_batch([rendered.text], add_special_tokens=False)[0]
        return encoded.ids, encoded.offsets

    def encode_chat(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """Ids of a chat up to where the reply begins: those of `apply_chat_template`, were it not for control tokens in texts.

        Args:
            messages: `role` (written by the caller, not by the user) and `content`.

        Raises:
            UserError: no chat template, or one that refuses these roles or their order, or leaves a turn out.
            TooLong: as `encode`.
        """
        if not self._original.chat_template:
            raise UserError("this model has no chat template: it continues text, it does not chat.")
        try:
            # Replies come back with the thoughts that the model wrote, which its template cuts out by their tokens
            rendered = self.render(messages, tools, add_generation_prompt=True, thoughts=True)
        except TemplateRefusal as error:
            raise UserError(f"this model's chat template refuses the conversation: {error}") from error
        for number, message in enumerate(messages):
            # Phi 3's first template left out the system
            if message["content"].strip() and number not in rendered.content:
                raise UserError(
                    f"this model's chat template does not show turn {number + 1}, of the {message['role']}, and the model would "
                    "not see it. Leave it out, or say it in the user's words."
                )
        self._check_length(rendered.text)
        return self.encode_rendered(rendered)[0]

    def render(
        self,
        messages: list[dict],
        tools: list | None = None,
        add_generation_prompt: bool = False,
        prompts: tuple[int, ...] = (),
        thoughts: bool = False,
    ) -> Rendered:
        """What the chat template makes of a conversation, and what in it is text.

        Args:
            messages: `role` and `content`, and whatever else the template reads.
            tools: JSON schemas of functions, for a template that shows them.
            prompts: numbers of messages for which `Rendered.prompts` is wanted.
            thoughts: the assistant's `<think>` and `</think>` are the model's own tokens, as in rows that were written by one.

        Raises:
            TemplateRefusal: the template raised.
        """
        secret, hidden = self._mark, []

        def mark(text: str) -> str:
            hidden.append(text)
            return f"{secret}t{len(hidden) - 1}x"

        def hide(value, own=()):
            """Control tokens in texts as marks, however deep: templates must neither see nor write them."""
            if isinstance(value, str):
                return self._control.sub(lambda found: found[0] if found[0] in own else mark(found[0]), value)
            if isinstance(value, dict):
                return {key: hide(entry, own) for key, entry in value.items()}
            return [hide(entry, own) for entry in value] if isinstance(value, list) else value

        marked = []
        for number, message in enumerate(messages):
            own = THOUGHTS if thoughts and message["role"] == "assistant" else ()
            shown = {key: value if key == "role" else hide(value, own) for key, value in message.items()}
            # Templates trim texts, or ask whether there is one: the marks stand between the outer white space.
            core = shown["content"].strip() if isinstance(shown.get("content"), str) else ""
            if core:
                shown["content"] = shown["content"].replace(core, f"{secret}b{number}x{core}{secret}e{number}x", 1)
            marked.append(shown)
        tools = hide(tools)
        text, generation = self._apply(marked, tools, add_generation_prompt)
        found, places, parts, at, length = Rendered(), [], [], 0, 0

        def put(piece: str, start: int) -> None:
            nonlocal length
            places.append((start, length, length + len(piece)))
            parts.append(piece)
            length += len(piece)

        for each in self._parts.finditer(text):
            put(text[at : each.start()], at)
            at = each.end()
            kind, number = each[1], int(each[2] or 0)
            if kind == "t":
                put(hidden[number], each.start())
            elif kind == "b":
                found.content[number] = (length, length)
            elif kind == "e":
                found.content[number] = (found.content.get(number, (None,))[0], length)
            else:
                found.control.append((length, length + len(self._names[each[0]]), self._ids[each[0]]))
                put(self._names[each[0]], each.start())
        put(text[at:], at)

        def place(character: int) -> int:
            start, begin, end = places[bisect.bisect_right(places, (character, float("inf"))) - 1]
            return min(begin + character - start, end)

        found.text = "".join(parts)
        found.generation = [(place(start), place(end)) for start, end in generation]
        for number in prompts:
            try:
                before, _ = self._apply(marked[:number], tools, True)
            except TemplateRefusal:
                continue
            if text.startswith(before):
                found.prompts[number] = place(len(before))
        return found

    def _apply(self, messages: list[dict], tools, add_generation_prompt: bool) -> tuple[str, list]:
        tokenizer = self._original
        template = tokenizer.get_chat_template(tools=tools)
        marks = bool(GENERATION.search(template)) and not add_generation_prompt
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens_map,
            )
        except Exception as error:  # jinja2's, raised by the template itself, or Python's, by what it does with a value
            raise TemplateRefusal(str(error) or type(error).__name__) from error
        return texts[0], spans[0] if spans else []
