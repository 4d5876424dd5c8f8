"""omniport serve"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..common import JsonFlag, QuietFlag, print_json, print_line, require_extra
from ..options import BackendOption, BundleArgument, number, one_of

if TYPE_CHECKING:
    from omniport.serve.settings import Settings

NAME = "serve"
EXAMPLE = "omniport serve bundle --port 8000"
_KEYS = "OMNIPORT_API_KEY"
#: where Home Assistant looks for Wyoming's servers
_WYOMING = "10300"


class _Command(TyperCommand):
    """Lets ``--wyoming`` stand without a value, which Typer has no way to say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See Click."""
        return super().parse_args(ctx, _with_port(args))


COMMAND = _Command


def _with_port(args: Sequence[str]) -> list[str]:
    """What follows ``--wyoming`` is its value if it looks like one, and not like an option or a folder."""
    given = list(args)
    for at, text in enumerate(given):
        if text == "--":
            break
        if text == "--wyoming" and not re.fullmatch(r"\d+|[^/\\]*:[^/\\]*", "".join(given[at + 1 : at + 2])):
            given[at] = f"--wyoming={_WYOMING}"
    return given


def _pairs(given: list[str] | None) -> dict[str, str]:
    """``NAME=VOICE`` of each."""
    pairs = [text.partition("=") for text in given or []]
    for name, equals, voice in pairs:
        if not (name and equals and voice):
            raise typer.BadParameter(f"{name + equals + voice!r} is not NAME=VOICE.", param_hint="--voice")
    return {name: voice for name, _, voice in pairs}


def _address(given: str | None) -> tuple[str, int] | None:
    """``[HOST:]PORT``."""
    if given is None:
        return None
    host, _, port = given.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise typer.BadParameter(f"{given!r} is not [HOST:]PORT.", param_hint="--wyoming")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def command(
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own want a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Keys, one a line, of which clients send one; also taken from {_KEYS}."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let everybody who reaches the address in.")] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages of this origin may call, too; may be repeated."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name that clients ask for; without it the bundle's own.")
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Answer whatever model is asked for.")] = False,
    voice: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VOICE", help="Another name of a voice, such as alloy=Ethan; may be repeated."),
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Fetch media from this host by https; may be repeated. Else only data: URLs."
        ),
    ] = None,
    sessions: Annotated[
        int, typer.Option(min=1, help="Conversations whose KV caches are kept for when they go on.")
    ] = 4,
    active: Annotated[int, typer.Option(min=1, help="Replies at once.")] = 1,
    queue: Annotated[int, typer.Option(min=0, help="Replies that wait for their turn; more are refused.")] = 4,
    resume_s: Annotated[
        float,
        number("SECONDS", 0.0, 3600.0, help="A Realtime session whose client was lost is kept so long; 0: not."),
    ] = 30.0,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a conversation with its reply; without it the bundle's own.")
    ] = None,
    run_limit: Annotated[float | None, number("SECONDS", 0.001, help="For one run of a graph at most.")] = None,
    wyoming: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help=f"Also listen for Home Assistant's Wyoming protocol; without a value on port {_WYOMING}. It has no "
            "keys: another address than this machine's own wants --no-auth.",
        ),
    ] = None,
    dialect: Annotated[
        str,
        one_of(
            ("openai", "beta", "dashscope"),
            help="beta: the Realtime protocol's earlier form from the beginning; dashscope: so, too, and streams of "
            "wav have no header.",
        ),
    ] = "openai",
    transcribe: Annotated[
        str,
        one_of(("after", "off"), help="Whether what is said to Realtime sessions is written down if they ask for it."),
    ] = "after",
    backend: BackendOption = "auto",
    tls_self_signed: Annotated[
        bool,
        typer.Option("--tls-self-signed", help="Speak https with a certificate that is made here once, and kept."),
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Speak https with this certificate, in PEM form.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, without a pass phrase.")] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where a certificate that is made here is kept.")
    ] = None,
    decode_s: Annotated[
        float, number("SECONDS", 0.1, help="For a client's picture, sound or video to be decoded.")
    ] = 20.0,
    decode_mib: Annotated[
        int, typer.Option(min=256, metavar="MIB", help="Memory that decoding one of them may take.")
    ] = 1024,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send a span of each reply, with times and without words, to an OpenTelemetry collector, such as "
            "http://127.0.0.1:4318/v1/traces.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Serve nothing: tell whether all is there for it; exits with 1 if not.")
    ] = False,
    json: JsonFlag = False,
    log_content: Annotated[
        bool,
        typer.Option("--log-content", help="Log errors whole; their messages may hold what people said."),
    ] = False,
    quiet: QuietFlag = False,
) -> None:
    """Serve a bundle to a web page, and to OpenAI's clients over HTTP and by the Realtime protocol.

    Chat with text and speech, streamed or whole; spoken conversations over a WebSocket. The URL is printed on stdout as
    soon as connections are taken; GET /ready tells when the graphs are loaded. SIGTERM takes no more requests, and ends
    when those under way have.
    """
    require_extra("serve", "starlette", "uvicorn", "prometheus_client", "python_multipart", "websockets")
    if wyoming is not None:
        require_extra("wyoming", "wyoming")
    if otlp is not None:
        require_extra("otel", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    from omniport.runtime import OmniSession
    from omniport.runtime.errors import UsageError
    from omniport.serve.log_lines import set_up
    from omniport.serve.server import serve
    from omniport.serve.settings import Limits, Settings

    if json and not check:
        raise UsageError("--json goes with --check")
    set_up(quiet=quiet, content=log_content)
    chosen: dict[str, Any] = {"dialect": dialect, "transcribe": transcribe, "otlp": otlp}

    def settings() -> Settings:
        certificate, key = _certificate(tls_self_signed, tls_cert, tls_key, state, host)
        return Settings(
            host=host,
            port=port,
            keys=_read_keys(api_key_file),
            no_auth=no_auth,
            origins=tuple(cors_origin or ()),
            model=model_name,
            any_model=any_model,
            voices=_pairs(voice),
            url_hosts=tuple(host.lower() for host in allow_url or ()),
            sessions=sessions,
            active=active,
            wyoming=_address(wyoming),
            resume_seconds=resume_s,
            certificate=certificate,
            certificate_key=key,
            limits=Limits(queue=queue, decode_seconds=decode_s, decode_memory=decode_mib << 20),
            **chosen,
        )

    if check:
        _check(bundle, settings, max_context, api_key_file, json)
        return
    served = settings()
    with OmniSession.open(bundle, backend=backend, max_context=max_context, run_limit=run_limit) as session:
        serve(session, served, print_line)


def _read_keys(file: Path | None) -> tuple[str, ...]:
    """Those of the environment and of a file."""
    from omniport.runtime.errors import UsageError
    from omniport.runtime.system.files import read_text
    from omniport.serve.http.access import read_keys

    keys = [*read_keys(os.environ.get(_KEYS, ""))]
    if file is not None:
        try:
            more = read_keys(read_text(file, 1 << 20))
        except (OSError, UnicodeError) as error:
            raise UsageError(f"cannot read the keys of {file}: {error}; name a text file") from error
        if not more:
            raise UsageError(f"{file} holds no key: write one a line")
        keys += more
    return tuple(keys)


def _certificate(
    self_signed: bool, certificate: Path | None, key: Path | None, state: Path | None, host: str
) -> tuple[Path | None, Path | None]:
    """A certificate and its key; None without https."""
    from omniport.runtime.errors import UsageError
    from omniport.serve import tls

    if self_signed and (certificate is not None or key is not None):
        raise UsageError("--tls-self-signed makes a certificate and its key: leave --tls-cert and --tls-key away")
    if self_signed:
        return tls.self_signed(state or tls.state_folder(), host)
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together: name both")
    if certificate is not None and key is not None:
        tls.check_pair(certificate, key)
    return certificate, key


def _check(
    bundle: Path,
    settings: Callable[[], Settings],
    max_context: int | None,
    key_file: Path | None,
    json: bool,
) -> None:
    """Tell what was found; exits with 1 if something has to be done."""
    from omniport.runtime.errors import UsageError
    from omniport.serve.preflight import Finding, examine

    findings: list[Finding] = []
    try:
        findings += examine(bundle, settings(), max_context, key_file)
    except UsageError as error:
        findings.append(Finding(name="options", ok=False, detail=str(error), remedy="correct what was asked for"))
    good = all(finding.ok for finding in findings)
    if json:
        print_json({"ok": good, "findings": findings})
    else:
        for found in findings:
            print_line(f"{'ok' if found.ok else 'problem':8}{found.name}: {found.detail}")
            if found.remedy:
                print_line(f"{'':8}to do: {found.remedy}")
    if not good:
        raise typer.Exit(1)
