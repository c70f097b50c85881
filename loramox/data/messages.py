"""Read chat messages from files into one form: a role, a text, and reasoning if any."""

from typing import Any

from loramox.data.row_files import Number
from loramox.data.text import check_characters, shown
from loramox.errors import RowsError

MESSAGES = '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'

# Keys of the text that an assistant thought before it answered. transformers gives a template the first that is there.
REASONING = ("reasoning_content", "thinking", "reasoning")

# What chat templates read from beside the messages.
BESIDE = ("chat_template_kwargs", "documents", "function_call", "functions", "system", "tool_calls", "tools")


def read_messages(where: str, record: dict[str, Any], messages: Any) -> tuple[dict[str, str], ...]:
    """The messages, each as its role, its text and its reasoning. Text parts are joined.

    Raises `RowsError` for what is no text, or would be hidden from the model: images, tool calls, names.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RowsError(f"{where}: its messages are not a list of messages. Expected {MESSAGES}")
    _refuse_hidden(where, [name for name in BESIDE if record.get(name)])
    return tuple(_message(f"{where}, message {number}", each) for number, each in enumerate(messages, 1))


def _message(where: str, message: dict[str, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if type(role) is not str or not role.strip():
        raise RowsError(f"{where}: it has no role. Expected {MESSAGES}")
    keys = [key for key in REASONING if type(message.get(key)) is str and message[key]]
    reasoning: dict[str, str] = {}
    for key in keys:
        if message[key] not in reasoning.values():  # some exports have one text under two keys
            reasoning[key] = message[key]
    read = {"role", "content", *keys}
    _refuse_hidden(where, [key for key, value in message.items() if key not in read and _says(value)])
    if isinstance(content, list) and content:
        content = "".join(_part(where, part) for part in content)
    if type(content) is not str:
        raise RowsError(f"{where}: its content is {shown(content)}. Expected text: fill it in, or remove the row")
    for text in (content, *reasoning.values()):
        check_characters(where, text)
    return {"role": role, "content": content, **reasoning}


def _part(where: str, part: Any) -> str:
    """The text of one part of a message. A part may have keys for other types, without a value (as Parquet has them)."""
    if type(part) is str:
        return part
    kind = part.get("type") or "text" if isinstance(part, dict) else shown(part)
    if kind != "text" or type(part.get("text")) is not str:
        raise RowsError(
            f"{where}: a part of its content is of type {kind}, and only text is read. Remove the part, or the row"
        )
    _refuse_hidden(where, [key for key, value in part.items() if key not in ("type", "text") and _says(value)])
    return part["text"]


def _says(value: Any) -> bool:
    """Whether a template could make text of the value. Weights and flags are no text."""
    return isinstance(value, str | list | dict) and not isinstance(value, Number) and bool(value)


def _refuse_hidden(where: str, names: list[str]) -> None:
    if names:
        raise RowsError(
            f"{where}: {', '.join(sorted(names))} would be left out of what the model reads. Give the whole text as prompt and "
            "completion, or remove it"
        )
