"""Conversations to tokens, with a loss weight on exactly what the assistant says.

Knows: chat templates, turn borders, end-of-turn tokens. The borders are found by rendering the conversation
turn by turn, so any template works, with or without `{% generation %}` marks.
Refuses to know: files, batches, devices; and it never cuts a row: one over the limit is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from workers.ml.errors import InvalidRow, InvalidSetting, RowTooLong
from workers.ml.types import ChatRow, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """`loss_weights[i]` is the weight of *predicting* `input_ids[i]`; `row_id` is the line in the file."""

    input_ids: list[int]
    loss_weights: list[float]
    row_id: int | None = None

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss. The first token has no context to be predicted from."""
        return sum(1 for weight in self.loss_weights[1:] if weight)

    def __len__(self) -> int:
        return len(self.input_ids)


def read_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template as text, or None where the tokenizer carries none (or several without a default)."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """What the model is given when it is asked to answer: the turns so far and the opening of its own."""
    _refuse_control_tokens(tokenizer, messages, None)
    return _encode(tokenizer, _render(tokenizer, messages, answer_next=True, line=None))


def encode_row(tokenizer: PreTrainedTokenizerBase, row: ChatRow, *, max_tokens: int) -> EncodedRow:
    """Tokens of a whole conversation; weights are non-zero on assistant turns and the tokens that end them."""
    _refuse_control_tokens(tokenizer, row.messages, row.line)
    text = _render(tokenizer, row.messages, answer_next=False, line=row.line)
    input_ids: list[int] = []
    loss_weights: list[float] = []
    for turn in _assistant_turns(tokenizer, row, text):
        before = _ids_up_to(tokenizer, text, turn.begin, input_ids, row.line)
        loss_weights += [0.0] * (len(before) - len(loss_weights))
        through = _ids_up_to(tokenizer, text, turn.end, before, row.line)
        loss_weights += _turn_weights(tokenizer, through[len(before) :], turn.weight)
        input_ids = through
    input_ids = _ids_up_to(tokenizer, text, len(text), input_ids, row.line)
    loss_weights += [0.0] * (len(input_ids) - len(loss_weights))
    if len(input_ids) > max_tokens:
        where = "A row" if row.line is None else f"Line {row.line}"
        raise RowTooLong(f"{where} has {len(input_ids)} tokens; the limit is {max_tokens}.", row.line, "messages")
    return EncodedRow(input_ids, loss_weights, row.line)


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow], *, max_tokens: int) -> list[EncodedRow]:
    return [encode_row(tokenizer, row, max_tokens=max_tokens) for row in rows]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Fills rows on the right, where nothing looks at it; any id does, so a tokenizer without one is no problem."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


@dataclass(frozen=True, slots=True)
class _Turn:
    """Where one assistant turn lies in the rendered text: after its header, up to and with its end mark."""

    begin: int
    end: int
    weight: float


def _assistant_turns(tokenizer: PreTrainedTokenizerBase, row: ChatRow, text: str) -> list[_Turn]:
    turns = []
    for index, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        before = _render(tokenizer, row.messages[:index], answer_next=True, line=row.line)
        through = _render(tokenizer, row.messages[: index + 1], answer_next=False, line=row.line)
        if not (text.startswith(through) and through.startswith(before)):
            raise InvalidRow(
                f"The chat template renders turn {index + 1} differently when the model is asked for it, or once more "
                "turns follow: the model would be trained in a context that it never sees when it is served.",
                row.line,
                "messages",
            )
        turns.append(_Turn(len(before), len(through), float(message.weight)))
    if not turns:
        raise InvalidRow("The row has no assistant message to learn.", row.line, "messages")
    return turns


def _ids_up_to(
    tokenizer: PreTrainedTokenizerBase, text: str, end: int, known: list[int], line: int | None
) -> list[int]:
    """Tokens of `text[:end]` that begin with `known`, the tokens of a shorter prefix.

    Usually the plain encoding does. Where a merge crosses the border (an answer that begins with a line break
    after a header that ends in one), the rest is encoded alone, which is also how the model would write it.
    """
    whole = _encode(tokenizer, text[:end])
    if whole[: len(known)] == known:
        return whole
    begin = len(_decode(tokenizer, known))
    pieces = known + _encode(tokenizer, text[begin:end])
    if _decode(tokenizer, pieces) != text[:end]:
        raise InvalidRow("The tokens before an answer change when the answer follows.", line, "messages")
    return pieces


def _turn_weights(tokenizer: PreTrainedTokenizerBase, ids: list[int], weight: float) -> list[float]:
    """The weight on every token through the mark that ends the turn; 0 on layout after it (a line break)."""
    control = _control(tokenizer, len(tokenizer))
    last = max((i for i, token in enumerate(ids) if token in control.ids), default=None)
    if last is None or _decode(tokenizer, ids[last + 1 :]).strip():
        raise InvalidSetting(
            "The chat template does not end an assistant turn with a special token: the model would never "
            "learn to stop.",
            "chat_template",
        )
    return [weight] * (last + 1) + [0.0] * (len(ids) - last - 1)


@dataclass(frozen=True, slots=True)
class _Control:
    ids: frozenset[int]
    names: tuple[str, ...]


@lru_cache(maxsize=8)
def _control(tokenizer: PreTrainedTokenizerBase, _size: int) -> _Control:
    """Tokens that stand for structure. Cached (until tokens are added), as asking costs more than encoding a row."""
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = frozenset(added) | frozenset(tokenizer.all_special_ids)
    return _Control(ids, tuple(sorted({*added.values(), *tokenizer.all_special_tokens})))


def _refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], line: int | None) -> None:
    """Text that spells a control token would become one, and could forge a turn or an end."""
    control = _control(tokenizer, len(tokenizer))
    for message in messages:
        for name in control.names:
            if name in message.content:
                raise InvalidRow(f"A message contains the control token {name!r} as text.", line, "messages")


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool, line: int | None
) -> str:
    template = read_template(tokenizer)
    if template is None:
        raise InvalidSetting("The tokenizer of the base model has no chat template.", "chat_template")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if not turns and not answer_next:
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=answer_next
            )
        )
    except Exception as error:  # Jinja raises whatever the template's author chose to raise.
        raise InvalidRow(f"The chat template refuses the conversation: {error}", line, "messages") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the begin-of-text token itself; a tokenizer's own would be a second one.
    return list(tokenizer.encode(text, add_special_tokens=False))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
