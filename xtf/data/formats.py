"""The shapes that records come in, brought down to three: a conversation, a text, or token ids.

| keys | read as |
|---|---|
| `messages` (OpenAI; `tools`, `chat_template_kwargs`) | conversation |
| `conversations` of `from`/`value` (ShareGPT; `system`, `tools`) | conversation |
| `instruction`, `input`, `output` (Alpaca; `system`, `history`) | conversation |
| `question`, `answer` | conversation |
| `text` | text |
| `input_ids`, `labels` | token ids |

A record that has several of the first four, or one of them and `text`, is read as the first in this order; other keys
are ignored.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np

ROLES = {"system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
                          "model": "assistant", "observation": "tool", "function_response": "tool",
                          "function_call": "call"}
REASONING = ("reasoning_content", "thinking", "reasoning")
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio")
RESERVED = {"messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
            "continue_final_message", "return_assistant_tokens_mask"}


class Bad(Exception):
    """Why a record cannot be used; becomes a BadLine where file and line are known."""


@dataclass(frozen=True)
class Chat:
    """A conversation: `messages`, and `loss[i]`, whether messages[i], an assistant's, is to be trained.

    A message has role, content, reasoning_content, tool_calls.

    A message's reasoning stands under both names that templates read, `reasoning_content` and `thinking`; arguments of
    tool calls are objects.
    """
    messages: list[dict[str, Any]]
    loss: list[bool]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)    # for the template


class Text(NamedTuple):
    """A document."""
    text: str


class Tokens(NamedTuple):
    """Ids int64 [n], and labels int64 [n] or None: -100 where a token carries no loss, else its id, not shifted."""
    ids: np.ndarray
    labels: np.ndarray | None


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of one line of UTF-8, with or without byte order mark.

    NaN and Infinity are read, as Python writes them. Raises Bad, saying why, for whatever is not such an object, and
    for lone surrogates.

    >>> parse(b'{"text": "a"}')
    {'text': 'a'}
    """
    line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        record = msgspec.json.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        record = _parse_slowly(line)                         # is more lenient, and says where
    if not isinstance(record, dict):
        raise Bad(f"a JSON {type(record).__name__} where an object was expected")
    return record


def _parse_slowly(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        raise Bad(f"not UTF-8: {e.reason} at byte {e.start}") from e
    if not text.strip():
        raise Bad("empty line")
    try:
        record = json.loads(text)
        # JSON can spell half a UTF-16 pair, which no tokenizer can read
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise Bad(f"a lone surrogate {e.object[e.start]!a} in the text") from e
    except (ValueError, RecursionError) as e:
        raise Bad(f"broken JSON: {e}") from e
    return record


def read(record: dict[str, Any]) -> Chat | Text | Tokens:
    """What a record holds, whichever its format.

    Raises Bad, naming the key and what is wrong with it.

    >>> read({"instruction": "Add.", "input": "2+2", "output": "4"}).messages
    [{'role': 'user', 'content': 'Add.\\n2+2'}, {'role': 'assistant', 'content': '4'}]
    """
    found = [key for key in READERS if record.get(key) is not None] or [key for key in READERS if key in record]
    if not found or (len(found) > 1 and "input_ids" in found):
        keys = ", ".join(found) or f"only {sorted(map(str, record))[:8]}"
        raise Bad(f"exactly one of the keys {', '.join(READERS)} was expected, found {keys}")
    if found[0] not in ("text", "input_ids") and (media := [key for key in MEDIA if record.get(key)]):
        raise Bad(f"{media[0]!r} is given, but only text is read")
    try:
        return READERS[found[0]](record)
    except RecursionError as e:
        raise Bad("nested too deeply") from e


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _string(record: dict[str, Any], key: str, default: str | None = None) -> str:
    value = record.get(key)
    value = default if value is None else value
    if not isinstance(value, str) or (not value and default is None):
        raise Bad(f"{key} is {'empty' if value == '' else 'missing' if key not in record else _kind(value)}"
                  + ("" if value == "" or key not in record else ", not a string"))
    return value


def _text(record: dict[str, Any]) -> Text:
    return Text(_string(record, "text"))


def _tokens(record: dict[str, Any]) -> Tokens:
    ids = _integers(record, "input_ids")
    if record.get("labels") is None:
        return Tokens(ids, None)
    labels = _integers(record, "labels")
    if len(labels) != len(ids):
        raise Bad(f"{len(ids)} input_ids but {len(labels)} labels")
    wrong = np.flatnonzero((labels != ids) & (labels != -100))
    if len(wrong):
        i = wrong[0]
        raise Bad(f"labels[{i}] is {labels[i]}, neither -100 nor input_ids[{i}]={ids[i]}: labels are not to be shifted")
    return Tokens(ids, labels)


def _integers(record: dict[str, Any], key: str) -> np.ndarray:
    values = record[key]
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu" and len(values):
        good = -2**31 < int(values.min()) and int(values.max()) < 2**31
    else:
        good = isinstance(values, list) and values and all(type(v) is int and -2**31 < v < 2**31 for v in values)
    if not good:
        raise Bad(f"{key} is not a list of integers, or empty")
    return np.array(values, np.int64)


def _alpaca(record: dict[str, Any]) -> Chat:
    turns = [{"role": "system", "content": system}] if (system := _string(record, "system", "")) else []
    history = record.get("history") or []
    pair = lambda h: isinstance(h, list) and len(h) == 2 and all(isinstance(x, str) for x in h)
    if not isinstance(history, list) or not all(map(pair, history)):
        raise Bad("history is not a list of pairs of strings")
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = [part for part in (_string(record, "instruction", ""), _string(record, "input", "")) if part]
    if not asked:
        raise Bad("instruction and input are empty")
    return _chat([*turns, {"role": "user", "content": "\n".join(asked)},
                  {"role": "assistant", "content": _string(record, "output")}], record)


def _question(record: dict[str, Any]) -> Chat:
    return _chat([{"role": "user", "content": _string(record, "question")},
                  {"role": "assistant", "content": _string(record, "answer")}], record)


def _sharegpt(record: dict[str, Any]) -> Chat:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Bad("conversations is empty" if turns == [] else f"conversations is {_kind(turns)}, not a list")
    messages = [{"role": "system", "content": system}] if (system := _string(record, "system", "")) else []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Bad(f"conversations[{i}] is {_kind(turn)}, not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise Bad(f"conversations[{i}] is from the unknown role {role!r}: known are {', '.join(SHAREGPT_ROLES)}")
        content = turn.get("value", turn.get("content"))
        message: dict[str, Any] = {k: v for k, v in turn.items() if k not in ("from", "value")}
        message |= {"role": SHAREGPT_ROLES[role], "content": content}
        if message["role"] == "call":
            message |= {"role": "assistant", "content": None, "tool_calls": _calls_of(content, f"conversations[{i}]")}
        messages.append(message)
    return _chat(messages, record, "conversations", "value", len(messages) - len(turns))


def _calls_of(value: Any, where: str) -> list[Any]:
    """The calls that a function_call turn of ShareGPT writes as JSON."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as e:
        raise Bad(f"{where}: a function_call that is not JSON: {e}") from e
    return calls if isinstance(calls, list) else [calls]


def _openai(record: dict[str, Any]) -> Chat:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise Bad("messages is empty" if messages == [] else f"messages is {_kind(messages)}, not a list")
    return _chat(messages, record)


def _chat(messages: list[Any], record: dict[str, Any], name: str = "messages", content: str = "content",
          before: int = 0) -> Chat:
    """The messages checked; `before` of them are not the record's own."""
    pairs = [_message(m, f"{name}[{i - before}]", content) for i, m in enumerate(messages)]
    tools, options = record.get("tools"), record.get("chat_template_kwargs")
    if isinstance(tools, str):                               # as columns of Parquet hold them
        try:
            tools = json.loads(tools or "null")
        except ValueError as e:
            raise Bad(f"tools is a string that is not JSON: {e}") from e
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise Bad("tools is not a list of objects")
    if options is not None and not isinstance(options, dict):
        raise Bad(f"chat_template_kwargs is {_kind(options)}, not an object")
    if reserved := RESERVED & set(options or ()):
        raise Bad(f"chat_template_kwargs sets {min(reserved)!r}, which is set here")
    return Chat([m for m, _ in pairs], [on for _, on in pairs], tools or None, options or {})


def _message(m: Any, where: str, content_key: str) -> tuple[dict[str, Any], bool]:
    """One message in OpenAI's form, and whether it carries loss."""
    if not isinstance(m, dict):
        raise Bad(f"{where} is {_kind(m)}, not an object")
    role = m.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Bad(f"{where} has the unknown role {role!r}: known are {', '.join(ROLES)}")
    kept = {k: v for k, v in m.items()
            if v is not None and k not in ("loss", "weight", "function_call", "tool_calls", *REASONING)}
    out: dict[str, Any] = kept | {"role": ROLES[role], "content": _content(m, where, content_key)}
    if role == "assistant":
        calls = m.get("tool_calls") or ([m["function_call"]] if m.get("function_call") else [])
        if not isinstance(calls, list):
            raise Bad(f"{where}.tool_calls is {_kind(calls)}, not a list")
        if calls:
            out["tool_calls"] = [_call(c, f"{where}.tool_calls[{j}]") for j, c in enumerate(calls)]
        thoughts = [(key, m[key]) for key in REASONING if m.get(key) is not None]
        for key, value in thoughts[:1]:
            if not isinstance(value, str):
                raise Bad(f"{where}.{key} is {_kind(value)}, not a string")
            if value.strip():
                out |= {"reasoning_content": value, "thinking": value}
    if out["content"] is None and not out.get("tool_calls"):
        raise Bad(f"{where}.{content_key} is {'missing' if m.get(content_key, m) is m else 'null'}, not a string")
    return out, _loss(m, where)


def _content(m: dict[str, Any], where: str, key: str) -> str | None:
    """The text of a message, which may be given as a list of parts (with or without `type`)."""
    content = m.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Bad(f"{where}.{key} is {_kind(content)}, not a string")
    texts = []
    for j, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and not any(part.get(k) for k in MEDIA):
            texts.append(part["text"])
        else:
            what = _kind(part)
            if isinstance(part, dict):
                what = repr(part.get("type") or next((k for k in MEDIA if part.get(k)), None))
            raise Bad(f"{where}.{key}[{j}] is {what}, and only text parts are read")
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Bad(f"{where} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):                           # OpenAI writes JSON in a string
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise Bad(f"{where}: arguments are not JSON: {e}") from e
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Bad(f"{where}: arguments are {_kind(arguments)}, not an object")
    extra = {k: v for k, v in call.items() if k not in ("function", "name", "arguments") and v is not None}
    return {"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}}


def _loss(m: dict[str, Any], where: str) -> bool:
    """The message's own say, `loss` (true, false) or OpenAI's `weight` (0, 1); else true for the assistant's."""
    said = {}
    for key in ("loss", "weight"):
        if (value := m.get(key)) is not None:
            if isinstance(value, str | list | dict) or value not in (0, 1):
                raise Bad(f"{where}.{key} is {value!r}, neither {'true nor false' if key == 'loss' else '0 nor 1'}")
            said[key] = bool(value)
    if len(set(said.values())) == 2:
        raise Bad(f"{where} has loss and weight, which contradict each other")
    if m["role"] != "assistant":
        if said.get("loss"):
            raise Bad(f"{where}.loss is true, but only the assistant's messages can carry loss (train_on_everything "
                      "trains on all)")
        return False
    return all(said.values())


READERS: dict[str, Callable[[dict[str, Any]], Chat | Text | Tokens]] = {
    "messages": _openai, "conversations": _sharegpt, "instruction": _alpaca, "question": _question, "text": _text,
    "input_ids": _tokens}
