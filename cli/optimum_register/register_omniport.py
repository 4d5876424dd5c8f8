"""optimum-cli export omniport: the sub-command that optimum finds in an installed omniport.

The wheel ships this file as ``optimum/commands/register/register_omniport.py``. That folder is a PEP 420 namespace, so
it holds no ``__init__.py``; optimum lists the ``.py`` files of its directories and reads ``REGISTER_COMMANDS``. Heavy
imports stay out of this file: optimum loads it for every ``optimum-cli`` call.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # type: ignore[import-untyped]
from optimum.commands.export.base import ExportCommand  # type: ignore[import-untyped]

HELP = "Export a Qwen2.5-Omni checkpoint to an omniport bundle: ONNX graphs for TensorRT and ONNX Runtime."
EPILOG = "example:\n  optimum-cli export omniport Qwen/Qwen2.5-Omni-3B bundle --precision fp16"


class OmniportExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The options of ``omniport export``, handed on to it: same checks, messages and exit codes."""

    COMMAND = CommandInfo(name="omniport", help=HELP)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of ``omniport export`` to optimum's parser."""
        parser.description = HELP
        parser.epilog = EPILOG
        parser.formatter_class = RawDescriptionHelpFormatter
        for option in _export_options():
            more: dict[str, Any] = {"help": (option.help or "").replace("%", "%%")}
            if option.param_type_name == "option":
                more |= {"dest": option.name, "action": "append" if option.multiple else "store"}
                more |= {"action": "store_true"} if option.is_flag else {"metavar": option.metavar}
            parser.add_argument(*option.opts, **more)

    def run(self) -> None:
        """Run ``omniport export``; exits with its exit code."""
        from omniport.cli.main import run

        command, places = ["export"], []
        for option in _export_options():
            value = getattr(self.args, option.name)
            if option.param_type_name == "argument":
                places.append(value)
            elif option.is_flag:
                command += option.opts[:1] if value else []
            else:
                values = value if isinstance(value, list) else [value]
                command += [f"{option.opts[0]}={given}" for given in values if given is not None]
        run([*command, "--", *places])


def _export_options() -> list[Any]:
    """Arguments and options of ``omniport export``, as typer has made them; without ``--help``."""
    from omniport.cli.main import app
    from typer.main import get_command

    commands: Any = get_command(app)
    return [option for option in commands.commands["export"].params if option.name != "help"]


REGISTER_COMMANDS = [(OmniportExportCommand, ExportCommand)]
