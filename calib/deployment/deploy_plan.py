"""Choose recipe, context and form of the graphs for a device, and say why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from omniport.export.devices.catalog import JetPack
from omniport.export.graphs.lowering import OPSETS
from omniport.export.planning.machines import Machine, find_machines
from omniport.export.planning.plan import ENGINE_EXTRA, RecipePlan, load_of, loss_of, make_plan
from omniport.export.planning.shapes import ModelShape
from omniport.export.planning.weights import RECIPES, graph_bytes
from omniport.export.tensorrt.builder_api import NATIVE_SINCE, too_old_for
from omniport.runtime.backends.tensorrt import packages
from omniport.runtime.errors import UsageError
from rich.filesize import decimal

from .deploy_record import DeployPlan, Expected

GOALS = ("quality", "speed", "memory")
#: tokens that a recipe is chosen for, the most first; a longer context is taken where the recipe has room for it
CONTEXTS, LONGER = (4096, 2048, 1024), 8192
#: tokenizer, voices, graphs without weights, records
_SMALL = 64_000_000
#: activations that a calibration keeps, of a small set of samples
_SPOOL = 256_000_000


@dataclass(frozen=True)
class Asked:
    """What a user asks of a deployment; None is chosen."""

    target: str
    recipe: str | None = None
    max_context: int | None = None
    goal: str = "quality"
    jetpack: str | None = None

    def check(self) -> None:
        """Raises:
        UsageError: a goal or recipe that does not exist.
        """
        if self.goal not in GOALS:
            raise UsageError(f"--goal {self.goal}: expected {', '.join(GOALS)}")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise UsageError(f"--recipe {self.recipe}: expected one of {', '.join(RECIPES)}")
        if self.target == "all":
            raise UsageError("--target all: a bundle is deployed to one device; omniport targets lists them")


def plan_deployment(model: ModelShape, asked: Asked) -> DeployPlan:
    """Choose for a device.

    Raises:
        UsageError: no such target, goal, recipe or JetPack; a recipe that the target cannot have; nothing that fits.
        BackendError: the target ``this`` where there is no GPU.
    """
    asked.check()
    machine = find_machines(asked.target)[0]
    release = _release(machine, asked.jetpack)
    ops, lowered = _form(release)
    model = replace(model, kv="static" if ops == "native" else "concat")
    rows, context = _fitting(model, machine, asked)
    row = min((row for row in rows if row.works), key=_ORDERS[asked.goal])
    if asked.max_context is None and asked.goal != "memory":
        row, context = _longer(model, machine, row, context)
    recipe, working = row.recipe, {each.recipe.name for each in rows if each.works}
    precision = recipe.precision or machine.precision
    token2wav = "fp32" if precision == "fp32" else "fp16" if recipe.quantized is not None else recipe.token2wav
    target = machine.target
    return DeployPlan(
        model=model.name,
        target=asked.target,
        title=machine.title,
        builder="" if target is None else target.builder,
        built_here=target is not None and target.built_anywhere,
        jetpack="" if release is None else release.version,
        goal=asked.goal,
        recipe=recipe.name,
        precision=precision,
        token2wav=token2wav,
        quantized=recipe.quantized is not None,
        calibrated=tuple(_rounded(model, row, precision)),
        context=context,
        ops=ops,
        kv=model.kv,
        reasons=tuple(_reasons(row, asked, machine, context, lowered)),
        refused={each.recipe.name: _refusal(each) for each in rows if each.recipe.name not in working},
        expected=_expected(model, machine, row, precision),
    )


def _release(machine: Machine, asked: str | None) -> JetPack | None:
    """The JetPack of a board: the one that was named, or the oldest, whose graphs later ones take too."""
    known = () if machine.target is None else machine.target.jetpacks
    if asked is None:
        return known[0] if known else None
    found = next((release for release in known if release.version == asked), None)
    if found is None:
        versions = ", ".join(release.version for release in known) or "none: it is no Jetson board"
        raise UsageError(f"--jetpack {asked}: {machine.name} has {versions}")
    return found


def _form(release: JetPack | None) -> tuple[str, str]:
    """(operators of the graphs, why not those of the newest opset)."""
    lacking = [] if release is None else too_old_for(NATIVE_SINCE, OPSETS["native"], release.tensorrt)
    if release is None or not lacking:
        return "native", ""
    why = (
        f"TensorRT {release.tensorrt} of JetPack {release.version} does not parse {', '.join(lacking)}: graphs of "
        f"opset {OPSETS['decomposed']} and a KV cache that grows (--ops decomposed --kv concat)"
    )
    return "decomposed", why


def _rows(model: ModelShape, machine: Machine, context: int) -> list[RecipePlan]:
    """Every recipe, precisions with DiT and vocoder in FP32 and in FP16."""
    rows = list(make_plan(model, machine, context).recipes)
    if machine.target is not None:
        half = make_plan(model, machine, context, "fp16").recipes
        rows += [row for row in half if row.recipe.precision in ("fp16", "bf16")]
    return rows


def _fitting(model: ModelShape, machine: Machine, asked: Asked) -> tuple[list[RecipePlan], int]:
    """The recipes that were asked for, at the longest context at which one works.

    Raises:
        UsageError: none does.
    """
    asked_for = asked.max_context
    if asked_for is not None and not 64 <= asked_for <= model.max_context:
        raise UsageError(f"--max-context {asked_for}: 64 to {model.max_context} was expected, what {model.name} has")
    contexts = [min(each, model.max_context) for each in ((asked_for,) if asked_for else CONTEXTS)]
    for context in contexts:
        rows = _rows(model, machine, context)
        wanted = [row for row in rows if asked.recipe in (None, row.recipe.name)]
        if any(row.works for row in wanted):
            return (wanted if asked.recipe else rows), context
    raise UsageError(_nothing(model, machine, asked, wanted, contexts[-1]))


def _nothing(model: ModelShape, machine: Machine, asked: Asked, rows: list[RecipePlan], context: int) -> str:
    least = min((row for row in rows if row.memory is not None), key=_memory, default=None)
    what = f"--recipe {asked.recipe}: " if asked.recipe else ""
    reasons = dict.fromkeys(row.problem for row in rows if row.problem)
    if asked.recipe and least is None:
        return f"{what}{'; '.join(reasons)}. Leave --recipe out, and what {machine.title} can have is chosen"
    assert least is not None
    says = _refusal(least)
    other = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"{what}{model.name} does not fit {machine.title} with a context of {context}: the smallest is "
        f"{least.recipe.name}, and {says}{other}. Take a smaller model or a larger board"
    )


def _refusal(row: RecipePlan) -> str:
    """Why a recipe does not work on the machine; empty if it does."""
    if row.problem or row.works:
        return row.problem
    assert row.memory is not None
    if not row.fits:
        return f"it needs {decimal(row.memory.total)} of {decimal(row.usable)}"
    return f"building its largest graph needs {decimal(row.build_bytes)} of {decimal(row.usable)}"


def _real_time(row: RecipePlan) -> bool:
    return row.speed is not None and row.speed.real_time


def _quality(row: RecipePlan) -> tuple[float, ...]:
    """Of those that speak in real time the one that loses least, or else the one that works least on speech."""
    if not _real_time(row):
        return (1, load_of(row))
    return (0, loss_of(row), row.recipe.token2wav != "fp32", load_of(row))


def _memory(row: RecipePlan) -> tuple[float, ...]:
    assert row.memory is not None
    return (row.memory.total, loss_of(row))


_ORDERS = {"quality": _quality, "speed": lambda row: (load_of(row), loss_of(row)), "memory": _memory}
_GOAL_WORDS = {
    "speed": "least work for a second of speech",
    "memory": "least memory",
}


def _longer(model: ModelShape, machine: Machine, row: RecipePlan, context: int) -> tuple[RecipePlan, int]:
    """The same recipe with more tokens, where they fit and change nothing about real time."""
    if context < min(CONTEXTS[0], model.max_context) or model.max_context < LONGER:
        return row, context
    same = (each for each in _rows(model, machine, LONGER) if each.recipe == row.recipe)
    longer = next(same)
    if longer.works and _real_time(longer) == _real_time(row):
        return longer, LONGER
    return row, context


def _rounded(model: ModelShape, row: RecipePlan, precision: str) -> Iterator[str]:
    """Graphs of which the recipe rounds at least one weight."""
    for name, shape in model.graphs.items():
        own = row.recipe.graph_precision(name, precision)
        if any(row.recipe.scheme(name, matrix, own).bits for matrix in shape.matrices):
            yield name


def _reasons(row: RecipePlan, asked: Asked, machine: Machine, context: int, lowered: str) -> Iterator[str]:
    if lowered:
        yield lowered
    name = row.recipe.name
    if row.recipe.quantized is None and row.recipe.token2wav != "fp32":
        name += " with DiT and vocoder in FP16"
    if asked.recipe is not None:
        yield f"{name}: you asked for it"
    elif asked.goal != "quality":
        yield f"{name}: {_GOAL_WORDS[asked.goal]} of all that work"
    elif _real_time(row):
        yield f"{name}: loses least of all that fit and speak in real time"
    else:
        yield f"{name}: nothing that fits speaks in real time, and this is the quickest"
    if asked.max_context is not None:
        yield f"context {context}: you asked for it"
    elif context == LONGER:
        yield f"context {context}: there is room for it"
    else:
        yield f"context {context}: what {machine.title} has room for"


def _expected(model: ModelShape, machine: Machine, row: RecipePlan, precision: str) -> Expected:
    assert row.memory is not None
    assert row.speed is not None
    precisions = {name: row.recipe.graph_precision(name, precision) for name in model.graphs}
    stored = {name: graph_bytes(shape, row.recipe, precisions[name]) for name, shape in model.graphs.items()}
    tables = sum(model.embedding_bytes.values())
    result = sum(stored.values()) + tables + _SMALL
    speed = row.speed
    return Expected(
        memory_bytes=row.memory.total,
        usable_bytes=row.usable,
        build_bytes=row.build_bytes,
        weights=stored,
        decode_tokens_per_second=speed.decode,
        codes_per_second=speed.codes,
        first_token_seconds=speed.first_token,
        first_audio_seconds=speed.first_audio,
        work_per_second_of_speech=speed.speech,
        real_time=speed.real_time,
        solver=speed.solver,
        peak_disk_bytes=max(_peaks(model, machine, row, precision, stored), default=result),
        result_bytes=result,
    )


def _peaks(
    model: ModelShape, machine: Machine, row: RecipePlan, precision: str, stored: Mapping[str, int]
) -> Iterator[int]:
    """Bytes on the disk at the end of each stage: calibrating, each graph while it is quantized, engines."""
    tables, done = sum(model.embedding_bytes.values()), _SMALL
    if row.recipe.quantized is not None:
        yield tables + _SPOOL + _SMALL
        plain = replace(row.recipe, quantized=None)
        for name, shape in model.graphs.items():
            done += stored[name]
            yield done + graph_bytes(shape, plain, row.recipe.graph_precision(name, precision))
    whole = sum(stored.values()) + tables + _SMALL
    yield whole
    if machine.target is not None and machine.target.built_anywhere and machine.target.builder in packages.installed():
        yield whole + sum(stored.values()) + ENGINE_EXTRA * len(stored)
