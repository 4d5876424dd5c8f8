"""optimum-cli export omniport: the sub-command that optimum finds in an installed omniport.

The wheel ships this file as ``optimum/commands/register/register_omniport.py``. That folder is a PEP 420 namespace, so
it holds no ``__init__.py``; optimum lists the ``.py`` files of its directories and reads ``REGISTER_COMMANDS``. Heavy
imports stay out of this file: optimum loads it for every ``optimum-cli`` call.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # type: ignore[import-untyped]
from optimum.commands.export.base import ExportCommand  # type: ignore[import-untyped]

HELP = "Export a Qwen2.5-Omni checkpoint to an omniport bundle: ONNX graphs for TensorRT and ONNX Runtime."
EPILOG = "example:\n  optimum-cli export omniport Qwen/Qwen2.5-Omni-3B bundle --precision fp16"


class OmniportExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The options of ``omniport export``, handed on to it: same checks, messages and exit codes."""

    COMMAND = CommandInfo(name="omniport", help=HELP)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options to optimum's parser."""
        parser.description = HELP
        parser.epilog = EPILOG
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.add_argument("checkpoint", help="folder, Hugging Face id, or modelscope:ID of a checkpoint")
        parser.add_argument("out", help="bundle folder to write")
        parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="weights' dtype")
        parser.add_argument("--graphs", default="", metavar="A,B", help="export these graphs only")
        parser.add_argument("--max-context", type=int, default=8192, metavar="N", help="KV cache capacity in tokens")
        parser.add_argument("--ops", choices=("native", "decomposed"), default="native", help="operators of the graphs")
        parser.add_argument("--kv", choices=("static", "concat"), default="static", help="form of the KV cache")
        parser.add_argument("--keep-fp32", action="append", default=[], metavar="REGEX", help="layers that stay FP32")
        parser.add_argument("--ranges", metavar="FILE", help="ranges.json: FP16 graphs keep in FP32 what overflows")
        parser.add_argument(
            "--zero-points", choices=("keep", "separate"), default="keep", help="where those of GPTQ and AWQ weights go"
        )
        parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of text")
        parser.add_argument("--quiet", action="store_true", help="print no progress on stderr")

    def run(self) -> None:
        """Run ``omniport export``; exits with its exit code."""
        from omniport.cli.main import run

        args = self.args
        command = ["export", "--precision", args.precision, "--max-context", str(args.max_context)]
        command += ["--ops", args.ops, "--kv", args.kv]
        command += ["--graphs", args.graphs] if args.graphs else []
        command += [f"--keep-fp32={pattern}" for pattern in args.keep_fp32]
        command += ["--ranges", args.ranges] if args.ranges else []
        command += ["--zero-points", args.zero_points]
        command += [flag for flag, wanted in (("--json", args.json), ("--quiet", args.quiet)) if wanted]
        run([*command, "--", args.checkpoint, args.out])


REGISTER_COMMANDS = [(OmniportExportCommand, ExportCommand)]
