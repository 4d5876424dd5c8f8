"""Reckon whether stopping for the first sound, or longer windows, cost a reply gaps that it would not have.

Usage: python scripts/simulate_pacing.py [--json F]

A reply is played through on machines that run one graph at a time: the costs of a token, a code, a code in the DiT and
a mel frame in the vocoder are those of docs/results/bench.md or of models of other proportions, at 1 to 1,000 times the
speed. Counted are replies that are made faster than they are heard and get more gaps than with windows of 12, 24, 48
codes and nobody stopping.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniport.runtime.events import underruns

HZ, EVALUATIONS, BACK, AHEAD, CONTEXT = 50, 36, 24, 12, 34
CHUNKS = (12, 24, 48)
LEAD, RATE = CHUNKS[0] + AHEAD, CHUNKS[1] / (CHUNKS[0] / HZ)
#: rows that the thinker is ahead at most
ROWS = 64


@dataclass(frozen=True)
class Costs:
    """Seconds of a thinker's token, a talker's code, a code through the whole solution, and a mel frame."""

    token: float
    code: float
    dit: float
    frame: float

    def times(self, factor: float) -> Costs:
        """All of them scaled."""
        return Costs(self.token * factor, self.code * factor, self.dit * factor, self.frame * factor)


PROPORTIONS = {
    "small, rk4": Costs(0.075, 0.008, 0.061, 0.0158),
    "small, midpoint": Costs(0.075, 0.008, 0.031, 0.0158),
    "small, vocoder four times as fast": Costs(0.075, 0.008, 0.031, 0.004),
    "thinker, talker and DiT of the 3B's depth": Costs(0.65, 0.048, 0.33, 0.0158),
    "slow talker": Costs(0.03, 0.02, 0.02, 0.004),
}


class Reply:
    """One reply on one machine.

    Attributes:
        now: seconds. sounds: when each piece was ready, and the seconds it lasts.
    """

    def __init__(self, costs: Costs, codes: int, *, paced: bool, longer: tuple[int, ...] = (), behind: int = 0) -> None:
        self.costs, self.codes, self.tokens = costs, codes, codes // 6
        self.paced, self.chunks, self.behind = paced, CHUNKS + longer, behind
        self.now = 0.0
        self.sounds: list[tuple[float, float]] = []
        self._rows = self._made = self._solved = self._windows = 0
        self._window: tuple[int, int] | None = None  # new codes, codes in all
        self._left = 0  # evaluations of it
        self._mels: list[tuple[int, int]] = []  # frames to vocode, codes
        self._held: dict[str, bool] = {}
        self._last = ""

    def run(self) -> Reply:
        """To the end."""
        while sum(seconds for _, seconds in self.sounds) < self.codes / HZ - 1e-9:
            able = self._able()
            # Who has just run is not among those that wait.
            self._last = next((name for name in able if name != self._last), able[0])
            getattr(self, f"_{self._last}")()
        return self

    def _able(self) -> list[str]:
        """Who has something to do, the nearest to the sound first."""
        if self._window is None and len(self._mels) < 2:
            self._open_window()
        window = 0 if self._window is None else self._window[0]
        ahead = self._made - self._solved - window
        rows = self._rows > self._made or self._rows >= self.tokens
        able = {
            "vocoder": bool(self._mels),
            "dit": self._window is not None,
            "talker": self._made < self.codes and rows and ahead < max(*self.chunks, self.behind) + AHEAD,
            "thinker": self._rows < min(self.tokens, self._made + ROWS),
        }
        return [name for name, has in able.items() if has and not self._stops(name)]

    def _stops(self, name: str) -> bool:
        made = {"talker": self._made, "thinker": self._rows}.get(name, 0)
        if not self.paced or self.sounds or made < LEAD:
            return False
        return self._held.setdefault(name, made < RATE * self.now)

    def _open_window(self) -> None:
        chunk = self.chunks[min(self._windows, len(self.chunks) - 1)]
        window = self.costs.dit * (BACK + CHUNKS[-1] + AHEAD) + self.costs.frame * 2 * (CHUNKS[-1] + CONTEXT)
        slow = window > CHUNKS[-1] / HZ
        if self.behind and self._windows and slow:
            chunk = self.behind
        end = self._made == self.codes
        if self._made < self._solved + chunk + AHEAD and not (end and self._solved < self.codes):
            return
        chunk = min(chunk if self._made >= self._solved + chunk + AHEAD else self.codes, self.codes - self._solved)
        stop = min(self._made, self._solved + chunk + AHEAD)
        self._window = chunk, stop - max(0, self._solved - BACK)
        self._left = EVALUATIONS

    def _thinker(self) -> None:
        self.now += self.costs.token
        self._rows += 1

    def _talker(self) -> None:
        self.now += self.costs.code
        self._made += 1

    def _dit(self) -> None:
        assert self._window is not None
        chunk, codes = self._window
        self.now += self.costs.dit * codes / EVALUATIONS
        self._left -= 1
        if not self._left:
            right = min(2 * AHEAD, 2 * (self._made - self._solved - chunk))
            self._mels.append((min(2 * self._solved, CONTEXT) + 2 * chunk + right, chunk))
            self._solved, self._windows, self._window = self._solved + chunk, self._windows + 1, None

    def _vocoder(self) -> None:
        frames, codes = self._mels.pop(0)
        self.now += self.costs.frame * frames
        self.sounds.append((self.now, codes / HZ))


WAYS: dict[str, dict[str, Any]] = {
    "stopping for the first sound": {"paced": True},
    "and windows of 240 where behind": {"paced": True, "behind": 240},
    "and a window of 96 always": {"paced": True, "longer": (96,)},
    "and a window of 96 after 132 codes": {"paced": True, "longer": (48, 96)},
}


def simulate() -> list[dict[str, Any]]:
    """A row for each proportion and way of working."""
    rows = []
    for name, costs in PROPORTIONS.items():
        for way in WAYS:
            worse = [factor for codes in (250, 1000) for factor in more_gaps(costs, way, codes)]
            span = (round(min(worse), 2), round(max(worse), 2)) if worse else None
            rows.append({"costs": name, "way": way, "replies_with_more_gaps": len(worse), "real_time_factors": span})
    return rows


def more_gaps(costs: Costs, way: str, codes: int, machines: int = 121) -> list[float]:
    """Real-time factors of the replies that get more gaps by that way of working."""
    factors = []
    for step in range(machines):
        scaled = costs.times(1000 ** (-step / (machines - 1)))
        before = Reply(scaled, codes, paced=False).run()
        after = Reply(scaled, codes, **WAYS[way]).run()
        factor = before.now / (codes / HZ)
        if factor < 1 and underruns(after.sounds)[0] > underruns(before.sounds)[0]:
            factors.append(factor)
    return factors


def main() -> None:
    """Reckon and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = simulate()
    for row in rows:
        where = f", at real-time factors of {row['real_time_factors']}" if row["real_time_factors"] else ""
        print(f"{row['costs']}: {row['way']}: {row['replies_with_more_gaps']} with more gaps{where}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
