"""Options take the words that the library takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

import pytest
import typer
from omniport.cli.main import app
from omniport.export.graphs.lowering import OPSETS
from omniport.export.models.model_parts import PRECISIONS
from omniport.runtime.backends import BACKENDS
from omniport.runtime.bench.roofline import CLOCKS
from omniport.runtime.bundle.manifest import KV_FORMS
from omniport.runtime.bundle.recipes import RECIPES
from omniport.runtime.speech.ode_methods import CHOICES


def option(command: str, name: str) -> Any:
    commands: Any = typer.main.get_command(app)
    (found,) = (option for option in commands.commands[command].params if option.name == name)
    return found


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("export", "precision", PRECISIONS),
        ("export", "ops", OPSETS),
        ("export", "kv", KV_FORMS),
        ("quantize", "recipe", RECIPES),
        ("bench", "clock", CLOCKS),
        ("run", "backend", BACKENDS),
        ("run", "solver", CHOICES),
    ],
)
def test_words_of_an_option(command: str, name: str, words: Iterable[str]) -> None:
    assert set(option(command, name).metavar.split("|")) == set(words)


def test_another_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app(["export", "checkpoint", "out", "--precision", "fp8"])
    assert stopped.value.code == 2
    assert "'fp8' is not one of 'fp32', 'fp16', 'bf16'." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["bundle", "--wyoming"], "10300"),
        (["--wyoming", "bundle"], "10300"),
        (["bundle", "--wyoming", "--quiet"], "10300"),
        (["bundle", "--wyoming", "10400"], "10400"),
        (["--wyoming", "0.0.0.0:10400", "bundle"], "0.0.0.0:10400"),
        (["bundle", "--wyoming=7"], "7"),
        (["bundle"], None),
    ],
)
def test_wyoming_has_a_port_of_its_own(given: list[str], read: str | None) -> None:
    commands: Any = typer.main.get_command(app)
    context = commands.commands["serve"].make_context("serve", given)
    assert (str(context.params["bundle"]), context.params["wyoming"]) == ("bundle", read)


def _numbers() -> Iterator[tuple[str, Any]]:
    """Every option that takes a number which need not be whole, with what typer was told of it."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, *told = get_args(hint) or (hint,)
            if float in (kind, *get_args(kind)):
                yield f"{command.name} {name}", told[0]


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e300", "-1e300"])
def test_a_number_is_one_that_can_be_meant(text: str) -> None:
    """Of all commands: what is beyond every range overflows somewhere, long after it was given."""
    assert len(list(_numbers())) > 10
    taken = []
    for name, told in _numbers():
        try:
            taken.append((name, (told.parser or float)(text)))
        except typer.BadParameter:
            continue
    assert taken == []
