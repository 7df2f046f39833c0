"""Chat formats of published models, written anew with their published behaviour, and what each model generates as a
message."""
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, pre_tokenizers

# How Llama 3, Qwen, DeepSeek and GPT-OSS (much alike) cut text before merging: line feeds end a piece, so the "\n\n" of
# a prompt stays whole.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Said(NamedTuple):
    """How inference came to a message: the template's options for the prompt, what was put after the prompt by force,
    and what was generated."""
    options: dict[str, Any]
    forced: str
    generated: str


class Family(NamedTuple):
    template: str
    said: Callable[[dict[str, Any]], Said]
    special: tuple[str, ...]                   # control tokens
    tags: tuple[str, ...] = ()                 # tokens of their own that are not control tokens
    bos: str | None = None
    eos: str = "<|im_end|>"
    split: str | None = SPLIT                  # None: as GPT-2


def tokenizer_for(family: Family, make_tokenizer, trim_offsets: bool = False):
    """A tokenizer with the family's template and tokens; `make_tokenizer` is conftest's."""
    tokenizer = make_tokenizer(family.template, trim_offsets)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in family.special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.tags])
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    if family.split:
        cut = [pre_tokenizers.Split(Regex(family.split), "isolated"),
               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    return tokenizer


def dumps(x: Any) -> str:
    return json.dumps(x, ensure_ascii=False)


def thoughts(m: dict[str, Any]) -> str:
    return (m.get("reasoning_content") or m.get("thinking") or "").strip()


def chatml_calls(m: dict[str, Any]) -> str:
    """Qwen's calls: tagged JSON, each on lines of its own."""
    calls = [f'<tool_call>\n{{"name": "{c["function"]["name"]}", "arguments": '
             f'{dumps(c["function"]["arguments"])}}}\n</tool_call>'
             for c in m.get("tool_calls", [])]
    return "\n".join([*([m["content"]] if m["content"] else []), *calls])


# ---- Qwen3: reasoning only after the last question; the last turn always gets a block of reasoning; a switch puts the
# ---- empty one in the prompt -----------------------------------------------------------------------------------------

QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\n<tools>' }}{%- for t in tools %}{{- '\\n' + t | tojson }}{%- endfor %}\
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}\
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set seen = namespace(query=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and \
m.content.endswith('</tool_response>')) %}
        {%- set seen.query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}
        {%- if loop.index0 > seen.query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def qwen3_said(m):
    if thoughts(m):
        return Said({}, "", f"<think>\n{thoughts(m)}\n</think>\n\n"
                    + chatml_calls(m | {"content": m["content"].lstrip("\n")}) + "<|im_end|>")
    return Said({"enable_thinking": False}, "", chatml_calls(m | {"content": m["content"].lstrip("\n")}) + "<|im_end|>")


QWEN_TOKENS = (("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
               ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"))
QWEN3_MARKED = Family(QWEN3, qwen3_said, *QWEN_TOKENS)  # generation marks, and drops reasoning
QWEN3_PLAIN = Family(QWEN3.replace("{% generation %}", "").replace("{% endgeneration %}", ""), qwen3_said, *QWEN_TOKENS)
# The thinking-only releases: the prompt opens the block, and there is no switch.
QWEN3_THINKING = Family(
    QWEN3_PLAIN.template[:QWEN3_PLAIN.template.rindex("{%- if add_generation_prompt")]
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}",
    lambda m: Said({}, "", qwen3_said(m).generated.removeprefix("<think>\n")) if thoughts(m)
    else Said({}, "\n</think>\n\n", qwen3_said(m).generated), *QWEN_TOKENS)

# ---- SmolLM2: ChatML with a system message of its own ----------------------------------------------------------------

SMOLLM2 = Family("""{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system
You are SmolLM, a helpful assistant.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""", lambda m: Said({}, "", m["content"] + "<|im_end|>"), ("<|im_start|>", "<|im_end|>"), split=None)

# ---- SmolLM3: marks that include the header, and a switch that also changes the system message -----------------------

SMOLLM3 = Family("""{%- set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}
{{- '<|im_start|>system\\nReasoning Mode: ' + mode + '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{% generation %}
        {{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n') + \
m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif m.role != 'system' %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}\
{{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n') }}{%- endif %}""",
                 lambda m: Said({"enable_thinking": False}, "", m["content"].lstrip("\n") + "<|im_end|>"), *QWEN_TOKENS)

# ---- Llama 3: headers, contents trimmed, no white space after the end of a turn --------------------------------------

LLAMA3_CALL = '{"name": "%s", "parameters": %s}<|eot_id|>'
LLAMA3 = Family("""{{- bos_token }}
{%- set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + \
(date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' }}
{%- if messages and messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- endif %}\
{{- '<|eot_id|>' }}
{%- for m in turns %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
                lambda m: Said({}, "", LLAMA3_CALL % (m["tool_calls"][0]["function"]["name"],
                                                      dumps(m["tool_calls"][0]["function"]["arguments"]))
                               if m.get("tool_calls") else m["content"].strip() + "<|eot_id|>"),
                ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                bos="<|begin_of_text|>", eos="<|eot_id|>")

# ---- DeepSeek: V3 knows no reasoning; R1's prompt opens it, and no turn ever shows it; V3.1's prompt opens it or
# ---- closes it -------------------------------------------------------------------------------------------------------

DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
                   "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
                   "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
                   "<｜tool▁outputs▁end｜>",
                   "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
DEEPSEEK_HEAD = """{%- set ns = namespace(system='', tool=false, asked=false) -%}
{%- for m in messages -%}{%- if m['role'] == 'system' -%}{%- set ns.system = m['content'] -%}{%- endif -%}{%- endfor -%}
{{- bos_token + ns.system -}}
"""
DEEPSEEK_R1_CALL = """<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"""
DEEPSEEK_R1_TEMPLATE = DEEPSEEK_HEAD + """{%- for m in messages -%}
    {%- if m['role'] == 'user' -%}{%- set ns.tool = false -%}{{- '<｜User｜>' + m['content'] -}}{%- endif -%}
    {%- if m['role'] == 'assistant' and m['tool_calls'] -%}
        {%- set ns.tool = false -%}{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' -}}
        {%- for call in m['tool_calls'] -%}
            {{- '' if loop.first else '\\n' -}}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + \
call['function']['name'] + '\\n```json\\n' -}}
            {{- call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
        {%- endfor -%}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
    {%- endif -%}
    {%- if m['role'] == 'assistant' and m['content'] is not none -%}
        {%- if ns.tool -%}
            {%- set ns.tool = false -%}{{- '<｜tool▁outputs▁end｜>' + m['content'] + '<｜end▁of▁sentence｜>' -}}
        {%- else -%}
            {{- '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
        {%- endif -%}
    {%- endif -%}
    {%- if m['role'] == 'tool' -%}
        {{- '\\n' if ns.tool else '<｜tool▁outputs▁begin｜>' -}}{%- set ns.tool = true -%}
        {{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if ns.tool -%}{{- '<｜tool▁outputs▁end｜>' -}}\
{%- elif add_generation_prompt -%}{{- '<｜Assistant｜>THINK' -}}{%- endif -%}"""


def deepseek_r1_said(m):
    calls = [DEEPSEEK_R1_CALL % (c["function"]["name"], dumps(c["function"]["arguments"]))
             for c in m.get("tool_calls", [])]
    said = (f"<｜tool▁calls▁begin｜>{chr(10).join(calls)}<｜tool▁calls▁end｜>" if calls
            else m["content"]) + "<｜end▁of▁sentence｜>"
    if m.get("after") == "tool":
        return Said({}, "", said)                            # the model goes on after the results
    return Said({}, "", thoughts(m) + "\n</think>\n\n" + said) if thoughts(m) else Said({}, "\n</think>\n\n", said)


DEEPSEEK_R1 = Family(DEEPSEEK_R1_TEMPLATE.replace("THINK", "<think>\\n"), deepseek_r1_said, DEEPSEEK_TOKENS,
                     ("<think>", "</think>"), **DEEPSEEK)
DEEPSEEK_V3 = Family(DEEPSEEK_R1_TEMPLATE.replace("THINK", "").replace(".split('</think>')[-1]", ""),
                     lambda m: Said({}, "", deepseek_r1_said(m).generated),
                     DEEPSEEK_TOKENS, **DEEPSEEK)


def deepseek_v31_said(m):
    calls = "".join(f"<｜tool▁call▁begin｜>{c['function']['name']}"
                    f"<｜tool▁sep｜>{dumps(c['function']['arguments'])}<｜tool▁call▁end｜>"
                    for c in m.get("tool_calls", []))
    said = m["content"] + (f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else "")
    said += "<｜end▁of▁sentence｜>"
    return Said({"thinking": True}, "", thoughts(m) + "</think>" + said) if thoughts(m) else Said({}, "", said)


DEEPSEEK_V31 = Family(DEEPSEEK_HEAD + """{%- set thinking = thinking if thinking is defined else false -%}
{%- for m in messages -%}
    {%- if m['role'] == 'user' -%}{%- set ns.asked = true -%}{{- '<｜User｜>' + m['content'] -}}{%- endif -%}
    {%- if m['role'] == 'assistant' -%}
        {%- if ns.asked -%}{{- '<｜Assistant｜>' + \
('<think>' if m['prefix'] is defined and m['prefix'] and thinking else '</think>') -}}{%- endif -%}
        {%- set ns.asked = false -%}
        {%- if m['tool_calls'] -%}
            {{- ('' if m['content'] is none else m['content']) + '<｜tool▁calls▁begin｜>' -}}
            {%- for call in m['tool_calls'] -%}
                {{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + \
call['function']['arguments'] + '<｜tool▁call▁end｜>' -}}
            {%- endfor -%}
            {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
        {%- else -%}
            {{- (m['content'].split('</think>', 1)[1] if '</think>' in m['content'] else m['content']) + \
'<｜end▁of▁sentence｜>' -}}
        {%- endif -%}
    {%- endif -%}
    {%- if m['role'] == 'tool' -%}\
{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.asked -%}\
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}{%- endif -%}""",
                      deepseek_v31_said, DEEPSEEK_TOKENS, ("<think>", "</think>"), **DEEPSEEK)

# ---- GPT-OSS: harmony. Analysis only in the last turn, or in calls not yet answered; <|return|> ends the last answer,
# ---- <|end|> earlier ones --------------------------------------------------------------------------------------------

GPT_OSS_TEMPLATE = """{{- '<|start|>system<|message|>You are ChatGPT.\\nReasoning: ' + (reasoning_effort or 'medium') }}
{{- '\\n\\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- set turns = messages %}
{%- if messages and messages[0].role in ['developer', 'system'] %}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content + '<|end|>' }}\
{%- set turns = messages[1:] %}
{%- endif %}
{%- set last = namespace(call=none) %}
{%- for m in turns %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- set answered = namespace(yes=false) %}
        {%- for later in turns[loop.index:] %}
            {%- if later.role == 'assistant' and 'tool_calls' not in later %}{%- set answered.yes = true %}{%- endif %}
        {%- endfor %}
        {%- if m.content and m.thinking %}{{- raise_exception('content or thinking, not both') }}
        {%- elif (m.content or m.thinking) and not answered.yes %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}{%- set last.call = call.name %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + \
call.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if '<|channel|>analysis<|message|>' in m.content %}\
{{- raise_exception('channels belong into fields') }}{%- endif %}
        {%- if loop.last and not add_generation_prompt and 'thinking' in m %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- set last.call = none %}
    {%- elif m.role == 'tool' %}
        {%- if last.call is none %}{{- raise_exception('a result of no call') }}{%- endif %}
        {{- '<|start|>functions.' + last.call + ' to=assistant<|channel|>commentary<|message|>' + \
m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'user' %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


def gpt_oss_said(m):
    if m.get("tool_calls"):
        f, thinking = m["tool_calls"][0]["function"], thoughts(m) or m["content"]
        said = f" to=functions.{f['name']}<|channel|>commentary json<|message|>{dumps(f['arguments'])}<|call|>"
        return Said({}, "",
                    f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant{said}" if thinking else said)
    said = f"<|channel|>final<|message|>{m['content']}<|return|>"
    return Said({}, "",
                f"<|channel|>analysis<|message|>{thoughts(m)}<|end|><|start|>assistant{said}" if thoughts(m) else said)


GPT_OSS = Family(GPT_OSS_TEMPLATE, gpt_oss_said,
                 ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), eos="<|return|>")

FAMILIES = {"qwen3": QWEN3_PLAIN, "qwen3-marked": QWEN3_MARKED, "qwen3-thinking": QWEN3_THINKING, "smollm2": SMOLLM2,
            "smollm3": SMOLLM3, "llama3": LLAMA3, "deepseek-v3": DEEPSEEK_V3, "deepseek-r1": DEEPSEEK_R1,
            "deepseek-v3.1": DEEPSEEK_V31, "gpt-oss": GPT_OSS}
