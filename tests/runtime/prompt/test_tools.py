"""Tools in prompts: against transformers' ``apply_chat_template``, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from omniport.runtime.errors import PromptError
from omniport.runtime.prompt import chat_template
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from support.bundles import make_manifest, tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

#: Says what the published template of Qwen2.5-Instruct says where a conversation begins with a system message.
TEMPLATE = r"""
{%- macro open(role) -%}{{ '<|im_start|>' + role + '\n' }}{%- endmacro -%}
{%- macro close() -%}{{ '<|im_end|>\n' }}{%- endmacro -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {%- set first = loop.previtem is undefined or loop.previtem.role != 'tool' -%}
    {%- if first -%}{{ open('user') }}{%- else -%}{{ '\n' }}{%- endif -%}
    {{ '<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' -%}{{ close() }}{%- endif -%}
  {%- else -%}
    {{ open(m.role) }}{{ m.content or '' }}
    {%- for call in m.tool_calls or [] -%}
      {%- if m.content or not loop.first -%}{{ '\n' }}{%- endif -%}
      {%- set f = call.function or call -%}
      {{ '<tool_call>\n{"name": "' + f.name + '", "arguments": ' + (f.arguments | tojson) + '}\n</tool_call>' }}
    {%- endfor -%}
    {%- if loop.first and tools -%}
      {{ '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.' }}
      {{- '\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
      {%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}
      {{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within' }}
      {{- ' <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
      {{- '<args-json-object>}\n</tool_call>' }}
    {%- endif -%}
    {{ close() }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für eine Stadt <now> & 'later'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "What is it like in Köln?"}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def with_tags(tagged: bool) -> Tokenizer:
    """``tagged``: the tags of calls are tokens of their own, as in Qwen's tokenizers."""
    made = tokenizer()
    if tagged:
        made.add_tokens([AddedToken(tag, normalized=False) for tag in chat_template.TOOL_CALL])
    return made


def random_conversation(rng: random.Random) -> list[dict[str, Any]]:
    words = ["", "Hello", "two\nlines", "日本", '"quoted" \\', "{}", " "]
    calls = [call("weather", city="Köln"), call("clock"), call("f", a=[1, None, 2.5], b={"c": "<x>'"})["function"]]
    messages: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(words)}, ASKED]
    for _ in range(rng.randrange(8)):
        role = rng.choice(["user", "assistant", "assistant", "tool", "tool", "system"])
        message: dict[str, Any] = {"role": role, "content": rng.choice(words)}
        if role == "assistant" and rng.random() < 0.7:
            message["tool_calls"] = rng.choices(calls, k=rng.randrange(4))
            message["content"] = rng.choice([None, *words]) if message["tool_calls"] else rng.choice(words)
        messages.append(message)
    return messages


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_as_transformers_lays_it_out(seed: int, tagged: bool) -> None:
    rng = random.Random(seed)
    made = with_tags(tagged)
    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made.to_str()), chat_template=TEMPLATE)
    manifest = make_manifest(speak=False)
    codec = TextCodec(Tokenizer.from_str(made.to_str()), manifest.tokens)
    for _ in range(20):
        messages, tools = random_conversation(rng), rng.sample([WEATHER, CLOCK], k=rng.randrange(1, 3))
        wanted = reference.apply_chat_template(messages, tools, add_generation_prompt=True, return_dict=False)
        got = build_prompt(messages, manifest, codec, 1 << 20, tools=tools).token_ids.tolist()
        assert got == wanted, codec.decode(got)


def test_calls_of_a_conversation_without_tools_are_laid_out_all_the_same() -> None:
    manifest = make_manifest(speak=False)
    codec = TextCodec(tokenizer(), manifest.tokens)
    reference = PreTrainedTokenizerFast(tokenizer_object=with_tags(False), chat_template=TEMPLATE)
    messages = [SYSTEM, ASKED, {"role": "assistant", "tool_calls": [call("clock")]}, {"role": "tool", "content": "12"}]
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert build_prompt(messages, manifest, codec).token_ids.tolist() == wanted


def test_arguments_as_text_and_ids_of_calls_are_taken() -> None:
    manifest = make_manifest(speak=False)
    codec = TextCodec(tokenizer(), manifest.tokens)

    def ids(arguments: Any, **ident: str) -> list[int]:
        asked = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        result = {"role": "tool", "content": "1", **ident}
        return build_prompt([ASKED, asked, result], manifest, codec).token_ids.tolist()

    assert ids('{"a":1}', tool_call_id="call_1") == ids({"a": 1})


def test_the_bundles_own_system_message_comes_before_the_tools() -> None:
    manifest = make_manifest(speak=False)
    codec = TextCodec(tokenizer(), manifest.tokens)
    text = codec.decode(build_prompt([ASKED], manifest, codec, tools=[CLOCK]).token_ids.tolist())
    assert text.startswith(f"system\n{manifest.chat.system_prompt}\n\n# Tools\n\n")


BAD_TOOLS = ["weather", WEATHER, 7, ["weather"], [{}], [{"function": "f"}], [{"function": {"name": ""}}]]
BAD_TOOLS += [[{"function": {"name": "f", "parameters": value}}] for value in (object(), float("nan"), {1, 2})]
BAD_CALLS: list[Any] = ["f", {"a": 1}, [7], [{"name": "f"}], [{"name": "", "arguments": {}}], [{"arguments": {}}]]
BAD_CALLS += [
    [{"name": "f", "arguments": value}] for value in ("{", "[]", "[" * 100_000, "\ud800", [], 1, {"a": object()})
]


@pytest.mark.parametrize("tools", BAD_TOOLS)
def test_bad_tools(tools: Any) -> None:
    manifest = make_manifest(speak=False)
    with pytest.raises(PromptError, match="tools"):
        build_prompt([ASKED], manifest, TextCodec(tokenizer(), manifest.tokens), tools=tools)


@pytest.mark.parametrize("calls", BAD_CALLS)
def test_bad_calls(calls: Any) -> None:
    manifest = make_manifest(speak=False)
    messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(PromptError, match=r"messages\[1\]\.tool_calls"):
        build_prompt(messages, manifest, TextCodec(tokenizer(), manifest.tokens))


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_only_an_assistant_calls(role: str) -> None:
    manifest = make_manifest(speak=False)
    messages = [ASKED, {"role": role, "content": "x", "tool_calls": [call("f")]}]
    with pytest.raises(PromptError, match=r"unknown 'tool_calls'"):
        build_prompt(messages, manifest, TextCodec(tokenizer(), manifest.tokens))
