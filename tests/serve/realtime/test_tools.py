"""Function calls: told when the reply has ended, answered by an item, not forced on anybody."""

from __future__ import annotations

import json

from support.realtime import SAID, ask, connected, kinds, until
from support.served import Served

WEATHER = {"type": "function", "name": "weather", "description": "Now.", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Cologne"}}\n</tool_call>'


def test_a_call_and_its_result(served: Served) -> None:
    served.live.script(CALL)
    with connected(served, tools=[WEATHER], max_output_tokens=100) as connection:
        came = ask(connection, "Is it raining?")
        assert [kind for kind in kinds(came) if "audio" not in kind and "content_part" not in kind] == [
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.function_call_arguments.done",
            "conversation.item.done",
            "response.output_item.done",
            "response.done",
            "rate_limits.updated",
        ]
        told = next(event for event in came if event.type == "response.output_item.done").item
        assert (told.type, told.name, told.status) == ("function_call", "weather", "completed")
        assert json.loads(told.arguments) == {"city": "Cologne"}
        assert came[-2].response.output == [told]
        served.live.script(SAID)
        result = {"type": "function_call_output", "call_id": told.call_id, "output": "Rain."}
        connection.conversation.item.create(item=result)  # type: ignore[arg-type]
        until(connection, "conversation.item.done")
        connection.response.create()
        (said,) = until(connection, "response.done")[-1].response.output
        assert said.content[0].transcript == SAID


def test_tools_of_one_response(served: Served) -> None:
    served.live.script(CALL)
    with connected(served, max_output_tokens=100) as connection:
        came = ask(connection, "Is it raining?", tools=[WEATHER], output_modalities=["text"])
        assert [item.type for item in came[-2].response.output] == ["function_call"]
        came = ask(connection, "And now?", output_modalities=["text"])
        assert [item.type for item in came[-2].response.output] == ["message"]


def test_a_history_of_calls_can_be_given(served: Served) -> None:
    served.live.script(SAID)
    with connected(served, tools=[WEATHER], output_modalities=["text"]) as connection:
        for item in (
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
            {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]},
        ):
            connection.conversation.item.create(item=item)  # type: ignore[arg-type]
            assert until(connection, "conversation.item.done")[-1].item.type == item["type"]
        assert ask(connection, "Why?")[-2].response.status == "completed"
