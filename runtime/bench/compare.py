"""Compare two benchmark reports: which ratios became worse by more than the noise."""

from __future__ import annotations

from dataclasses import dataclass

from .results import BenchReport, Figure

#: ratios of one run differ by as much between runs on a shared machine of two cores
BAND = 0.25


@dataclass(frozen=True)
class Change:
    """One ratio, then and now: ``times as fast`` or ``share`` of the roofline."""

    stage: str
    name: str
    what: str
    before: float
    now: float
    band: float

    @property
    def ok(self) -> bool:
        """Whether it lost less than the noise."""
        return self.now >= self.before * (1 - self.band)


def changes(before: BenchReport, now: BenchReport, band: float = BAND) -> list[Change]:
    """Ratios that both have. Times are not compared: they are another machine's, or another hour's."""
    rows = []
    for stage, result in now.stages.items():
        for figure in result.figures:
            try:
                known = before.figure(stage, figure.name)
            except KeyError:
                continue
            for what, (then, today) in _ratios(known, figure).items():
                if then is not None and today is not None:
                    rows.append(Change(stage, figure.name, what, then, today, band))
    return rows


def _ratios(before: Figure, now: Figure) -> dict[str, tuple[float | None, float | None]]:
    """Where there is a reference, it is the yardstick: it feels the same neighbours."""
    if before.faster is not None and now.faster is not None:
        return {"times as fast": (before.faster.median, now.faster.median)}
    return {"share of the roofline": (before.share, now.share)}
