"""One chat template: what it renders, and which part of that inference would have generated.

Positions are character offsets.
"""
import json
import re
from functools import cached_property
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from xtf.data.formats import Bad, Chat

Span = tuple[int, int]
OTHER = "\ue0f0 another answer"
OPEN = re.compile(r"<think>(\s*)$")
INLINE = re.compile(r"\s*(?:<think>)?(.*?)</think>\n*", re.DOTALL)
EMPTY = re.compile(r"(?:<think>)?\s*</think>\n*")


def _shared(a: str, b: str) -> int:
    """The length of the beginning that two strings share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Turn(NamedTuple):
    """An assistant's turn: `text` is the conversation up to its end, made from `start` on; `spans` carry loss."""
    text: str
    start: int
    spans: list[Span]
    unseen: bool                   # the message has reasoning, and the template shows none of it


class Template:
    """A chat template in Jinja, with the names of special tokens that it may use."""

    def __init__(self, source: str, names: dict[str, Any]):
        self.source, self.names = source, names
        self.marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
        self.reads_tools = "tool_calls" in source
        # The ways in which published templates ask whether to think, and the one that asks for reasoning but does not
        # know <think>.
        self.switches = [s for s in ("enable_thinking", "thinking")
                         if re.search(rf"""(?<![\w.'"]){s}(?![\w'"])""", source)]
        self.channels = "thinking" in source and "</think>" not in source

    def render(self, messages: list[dict[str, Any]], chat: Chat, **options: Any) -> tuple[str, list[Span]]:
        """The text and the spans of its generation marks. Whatever a template raises is the record's fault."""
        tools: Any = chat.tools
        try:
            texts, marks = render_jinja_template(conversations=[messages], tools=tools, chat_template=self.source,
                                                 return_assistant_tokens_mask=self.marked,
                                                 **{**self.names, **options, **chat.options})
        except Exception as e:
            raise Bad(f"the chat template refuses the first {len(messages)} messages: {type(e).__name__}: {e}") from e
        spans: Any = marks[0] if self.marked else []
        return texts[0], spans

    def prepare(self, chat: Chat) -> Chat:
        """The conversation as this template wants it: calls' arguments as objects or strings, reasoning apart."""
        messages = [self._calls(m) if m.get("tool_calls") else m for m in chat.messages]
        if self.channels:
            messages = [self._channels(m) for m in messages]
        return Chat(messages, chat.loss, chat.tools, chat.options)

    @staticmethod
    def _channels(m: dict[str, Any]) -> dict[str, Any]:
        inline = INLINE.match(m["content"] or "") if m["role"] == "assistant" and "thinking" not in m else None
        if not inline:
            return m
        thoughts = inline[1].strip("\n") if inline[1].strip() else None
        said = {} if thoughts is None else {"thinking": thoughts, "reasoning_content": thoughts}
        return m | said | {"content": m["content"][inline.end():]}

    def _calls(self, m: dict[str, Any]) -> dict[str, Any]:
        as_string, content = self._call_shape
        calls = m["tool_calls"]
        if as_string:
            text = lambda f: f | {"arguments": json.dumps(f["arguments"], ensure_ascii=False)}
            calls = [{**c, "function": text(c["function"])} for c in calls]
        return m | {"tool_calls": list(calls), "content": m["content"] or content}

    @cached_property
    def _call_shape(self) -> tuple[bool, str | None]:
        """Whether arguments are to be a string, and the content of a mere call; by trying. Raises Bad if none works."""
        question, name = "Is this a probe?", "probed"
        for as_string in (False, True):
            for content in (None, ""):
                arguments: Any = '{"key": "value"}' if as_string else {"key": "value"}
                call = {"id": "probe0000", "type": "function", "function": {"name": name, "arguments": arguments}}
                messages = [{"role": "user", "content": question},
                            {"role": "assistant", "content": content, "tool_calls": [call]}]
                try:
                    text, _ = self.render(messages, Chat(messages, []))
                except Bad:
                    continue
                text = text[text.rfind(question):]
                if name in text and not re.search(r"""None|\{'|\\["']""", text):
                    return as_string, content
        raise Bad("the chat template cannot render tool_calls")

    def turn(self, chat: Chat, i: int) -> Turn:
        """What was generated as messages[i], and what stood before it when it was.

        Templates with a switch for thinking are asked with it on where the message has reasoning, else off: then the
        empty block of reasoning belongs to the prompt. Raises Bad if the template does not tell.
        """
        message = chat.messages[i]
        content = message["content"] or ""
        inline = INLINE.match(content)
        thoughts = str(message.get("reasoning_content") or (inline[1] if inline else "")).strip()
        first = all(m["role"] in ("system", "developer") for m in chat.messages[:i])
        text, prompt, marks = "", "", []
        for options in [*({s: bool(thoughts)} for s in self.switches), {}]:
            text, marks = self.render(chat.messages[:i + 1], chat, **options)
            prompt = self._greeting(text, chat, i, options) if first else self._prompt(chat, i, options)
            opened = OPEN.search(prompt)
            if text.startswith(prompt):
                start = len(prompt)
                break
            if opened and text.startswith(prompt[:opened.start()]):
                return self._reopened(prompt, text[opened.start():], opened[1], thoughts, bool(inline))
        else:
            text, marks, start = self._rewritten(prompt, text, marks, chat, i)
        if "</think>" not in content and not thoughts and (empty := EMPTY.match(text, start)):
            start = empty.end()  # the template's own: inference that does not think has it in the prompt
        spans = [(max(s, start), e) for s, e in marks if e > start] if self.marked else [(start, len(text))]
        return Turn(text, start, spans, bool(thoughts) and thoughts not in text)

    def _greeting(self, text: str, chat: Chat, i: int, options: dict[str, Any]) -> str:
        """The prompt of a first turn, which templates need not render: what stands before it, and the header."""
        asked: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
        with_header = self.render(asked, chat, add_generation_prompt=True, **options)[0]
        without = self.render(asked, chat, **options)[0]
        header = with_header.removeprefix(without)
        base = OPEN.sub("", header)
        at = text.find(base) if base and len(header) < len(with_header) else -1
        return text[:at] + header if at >= 0 else self._prompt(chat, i, options)

    def _prompt(self, chat: Chat, i: int, options: dict[str, Any]) -> str:
        return self.render(chat.messages[:i], chat, add_generation_prompt=True, **options)[0]

    def _rewritten(self, prompt: str, text: str, marks: list[Span], chat: Chat, i: int) -> tuple[str, list[Span], int]:
        """Prompt and turn, joined, where it rewrites what is before it (GPT-OSS drops a call's analysis once answered).

        The turn begins after the last header before the place where another answer would have made a difference.
        """
        header = prompt.removeprefix(self.render(chat.messages[:i], chat)[0])
        other = self.render([*chat.messages[:i], {"role": "assistant", "content": OTHER}], chat)[0]
        same = _shared(text, other)
        at = text.rfind(header, 0, same) if 0 < len(header) < len(prompt) else -1
        if at >= 0:
            start, moved = at + len(header), len(prompt) - at - len(header)
            return prompt + text[start:], [(s + moved, e + moved) for s, e in marks], len(prompt)
        if not self.marked:
            raise Bad(f"the chat template's generation prompt after messages[:{i}] is not how it begins "
                      f"messages[{i}], so what was generated is unknown: "
                      "give the template {% generation %} marks, or train on everything")
        start = _shared(text, prompt)
        return text, marks, min((s for s, e in marks if s >= start), default=start)

    @staticmethod
    def _reopened(prompt: str, rest: str, gap: str, thoughts: str, inline: bool) -> Turn:
        """The turn as the model writes it, where the prompt opens <think> and the template drops all reasoning (R1)."""
        gap = "\n" if "\n" in gap else ""
        rest = re.sub(rf"\A(?:<think>.*?)?</think>{gap}*", "", rest, flags=re.DOTALL)
        rest = rest.lstrip("\n") if inline else rest
        closing = f"{gap}</think>{2 * gap}"
        text = prompt + thoughts + closing + rest
        start = len(prompt) if thoughts else len(prompt) + len(closing)
        return Turn(text, start, [(start, len(text))], False)
