"""Every format comes down to the same three shapes, and what is wrong is said."""
import json
import math

import numpy as np
import pytest

from xtf.data.formats import Bad, Chat, Text, Tokens, parse, read

ASK, ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
SAME = {
    "openai": {"messages": [ASK, ANSWER]},
    "parts":
    {"messages": [ASK | {"content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]}, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
    "sharegpt with roles": {"conversations": [ASK, ANSWER]},
    "alpaca": {"instruction": "What is 2+2?", "input": "", "output": "4"},
    "alpaca without input": {"instruction": "What is 2+2?", "output": "4", "text": "Below is an instruction ..."},
    "question": {"question": "What is 2+2?", "answer": "4"},
    "nulls": {"text": None, "conversations": None, "tools": None,
              "messages": [ASK | {"tool_calls": None, "reasoning_content": None, "name": None}, ANSWER]},
    # what GraphGen writes
    "graphgen chatml": {"_trace_id": "1f", "messages": [ASK | {"content": [{"text": "What is 2+2?", "image": ""}]},
                                                        ANSWER | {"content": [{"type": "text", "text": "4"}]}]},
    "graphgen sharegpt": {"_trace_id": "1f",
                          "conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
    "graphgen alpaca": {"_trace_id": "1f", "instruction": "What is 2+2?", "input": "", "output": "4", "image": ""},
    "graphgen qa": {"_trace_id": "1f", "question": "What is 2+2?", "answer": "4"},
}


@pytest.mark.parametrize("name", SAME)
def test_many_ways_to_write_one_conversation(name):
    chat = read(parse(json.dumps(SAME[name]).encode()))
    assert isinstance(chat, Chat) and chat.messages == [ASK, ANSWER] and chat.loss == [False, True]
    assert chat.tools is None and chat.options == {}


def test_system_history_and_input():
    chat = read({"system": "Be brief.", "history": [["Hi", "Hello"]], "instruction": "Add.", "input": "2+2",
                 "output": "4"})
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n2+2"), ("assistant", "4")]
    chat = read({"system": "Be brief.", "conversations": SAME["sharegpt"]["conversations"],
                 "tools": json.dumps([CALL])})
    assert chat.messages[0] == {"role": "system", "content": "Be brief."} and chat.tools == [CALL]


def test_calls_results_and_reasoning_have_one_shape():
    written = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    tool = {"role": "tool", "content": "4", "tool_call_id": "c1"}
    openai = read({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [written]}, tool, ANSWER]})
    assert openai.messages[1] == {"role": "assistant", "content": None,
                                  "tool_calls": [CALL | {"id": "c1"}]} and openai.messages[2] == tool
    legacy = read({"messages": [ASK, {"role": "assistant", "content": None,
                                      "function_call": {"name": "add", "arguments": {"a": 2, "b": 2}}},
                                {"role": "function", "name": "add", "content": "4"}]})
    sharegpt = read({"conversations": [{"from": "human", "value": "What is 2+2?"},
                                       {"from": "function_call",
                                        "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
                                       {"from": "observation", "value": "4"}]})
    for chat in (legacy, sharegpt):
        assert chat.messages[1] == {"role": "assistant", "content": None,
                                    "tool_calls": [CALL]} and chat.messages[2]["role"] == "tool"
    for key in ("reasoning_content", "thinking", "reasoning"):
        thought = read({"messages": [ASK, ANSWER | {key: "Two and two."}]}).messages[1]
        assert thought == ANSWER | {"reasoning_content": "Two and two.", "thinking": "Two and two."}
    assert read({"messages": [ASK, ANSWER | {"thinking": " "}]}).messages[1] == ANSWER


def test_flags_of_loss():
    for flag, wanted in (({"loss": False}, False), ({"weight": 0}, False), ({"loss": True}, True),
                         ({"weight": 1.0}, True), ({"loss": 0, "weight": 0}, False)):
        chat = read({"messages": [ASK | {"loss": False}, ANSWER | flag, ASK | {"weight": 0}, ANSWER]})
        assert chat.loss == [False, wanted, False, True] and chat.messages == [ASK, ANSWER, ASK, ANSWER]


def test_text_and_tokens():
    assert read({"text": "a"}) == Text("a")
    for ids in ([5, 6], np.array([5, 6], np.int32)):
        tokens = read({"input_ids": ids, "labels": [-100, 6], "attention_mask": [1, 1]})
        assert isinstance(tokens, Tokens) and tokens.ids.tolist() == [5, 6] and tokens.labels.tolist() == [-100, 6]
    assert read({"input_ids": [5], "labels": None}).labels is None


def test_lines_as_they_come():
    assert parse(b'\xef\xbb\xbf{"text": "a"}\r') == {"text": "a"}
    assert math.isnan(parse(b'{"text": "a", "score": NaN}')["score"])
    assert parse(b'{"text": "a", "n": -Infinity}')["n"] == -math.inf
    assert parse(b'{"text": "\\u0000\\ud83d\\ude00"}')["text"] == "\0😀"
    large = 123456789012345678901234567890
    assert parse(f'{{"text": "a", "n": 1e999, "m": {large}}}'.encode())["m"] == large


WRONG = [
    ({"instruction": "a"}, "output is missing"),
    ({"instruction": "", "output": "a"}, "instruction and input are empty"),
    ({"instruction": ["a"], "output": "a"}, "instruction is a list"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "history"),
    ({"instruction": "a", "output": "b", "image": "cat.png"}, "'image'"),
    ({"question": "a", "answer": ""}, "answer is empty"),
    ({"question": "a"}, "answer is missing"),
    ({"text": None}, "text is null"),
    ({"text": "a", "input_ids": [1]}, "exactly one"),
    ({"conversations": []}, "conversations is empty"),
    ({"conversations": "a"}, "not a list"),
    ({"conversations": [1]}, "conversations[0] is a int"),
    ({"conversations": [{"from": "robot", "value": "a"}]}, "conversations[0] is from the unknown role 'robot'"),
    ({"system": "s", "conversations": [{"from": "human", "value": 3}]}, "conversations[0].value is a int"),
    ({"conversations": [{"from": "function_call", "value": "{"}]},
     "conversations[0]: a function_call that is not JSON"),
    ({"conversations": [{"from": "human", "value": "a"}], "tools": "["}, "tools is a string that is not JSON"),
    ({"messages": [ASK | {"content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
     "messages[0].content[0] is 'image_url'"),
    ({"messages": [ASK | {"content": [{"text": "a", "image": "cat.png"}]}]}, "messages[0].content[0] is 'image'"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0] has no function name"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": "a"}]}, "tool_calls is a str"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
     "arguments are not JSON"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
     "arguments are a list"),
    ({"messages": [ASK, ANSWER | {"thinking": True}]}, "messages[1].thinking is a bool"),
    ({"messages": [ASK, ANSWER | {"loss": "no"}]}, "messages[1].loss is 'no'"),
    ({"messages": [ASK, ANSWER | {"weight": 0.5}]}, "messages[1].weight is 0.5"),
    ({"messages": [ASK, ANSWER | {"weight": 0, "loss": True}]}, "contradict"),
    ({"messages": [ASK | {"loss": True}, ANSWER]}, "only the assistant's"),
    ({"messages": [ASK], "chat_template_kwargs": 1}, "chat_template_kwargs is a int"),
    ({"messages": [ASK], "chat_template_kwargs": {"messages": []}}, "'messages'"),
    ({"messages": [ASK], "chat_template_kwargs": {"continue_final_message": True}}, "'continue_final_message'"),
    ({"messages": [ASK], "images": ["a"]}, "'images'"),
    ({"input_ids": np.zeros((2, 2), np.int64)}, "input_ids"),
    ({"input_ids": np.zeros(2)}, "input_ids"),
    ({"input_ids": [2**31]}, "input_ids"),
]


@pytest.mark.parametrize("record, reason", WRONG)
def test_what_is_wrong_is_said(record, reason):
    with pytest.raises(Bad) as error:
        read(record)
    assert reason in str(error.value)


def test_nested_too_deeply():
    deep = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Bad):
        read({"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}]})
