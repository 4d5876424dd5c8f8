"""Wren's parts trained again from nothing, beside those that ship; writes docs/results/wren-again.md.

    python -m benchmarks.wren_again [--speech SHIPPED AGAIN] [--talker WORK]

SHIPPED, AGAIN and WORK are work folders with the same speech. SHIPPED is one that `python -m wren.restore` filled from
the checkpoint, AGAIN one in which `make wren` was run as far as its DiT: both were heard by
`python -m wren.hear_speech --bf16 --count 80`. In WORK all but the talker was restored, the talker trained, and
`python -m wren.evaluate` run on a bundle of what `python -m wren.assemble --out` made of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, command_line, record, table

#: What was seen of the other parts, as `wren.vision` and `wren.thinker` print it while they train.
REST = [
    "The vision encoder was trained again to its end as well, and the thinker to step 3,900 of the 5,000 of its first",
    "course. Of 60 held-out questions of each kind, at step 3,000, it answered 93% of the typed ones right, 88% of",
    "those on pictures and 97% of second turns; the shipped one had 95%, 85% and 98% there. Behind it come four more",
    "courses, some three hours of a core: these were not trained a second time.",
]
CARD = ROOT / "wren" / "checkpoint" / "README.md"
#: what the card tells of each kind and voice, in its order
SHARES = ("right", "word_error_rate", "right_and_heard", "ended")
HEARD = ("shipped", "again")
#: held-out sentences of each voice whose codes are compared
COMPARED = 200


def equal_codes(shipped: Path, again: Path) -> tuple[int, int]:
    """Codes of held-out sentences that both codebooks give alike, and how many there are."""
    from safetensors.torch import load_file

    from wren import codes, corpus, sizes

    one, other = (load_file(work / "codes" / "codebook.safetensors") for work in (shipped, again))
    equal = total = 0
    for voice in sizes.REPLY_VOICES:
        for reply in corpus.replies(again, voice, "held_out", COMPARED):
            mine, theirs = codes.encode(reply.mel, one), codes.encode(reply.mel, other)
            equal, total = equal + int((mine == theirs).sum()), total + len(mine)
    return equal, total


def card() -> dict[str, dict[str, float]]:
    """What the shipped model card says of each kind of question and voice, as `wren.evaluate` names it."""
    rows = {}
    for line in CARD.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(SHARES) + 3 and cells[1].isdecimal():
            shares = (float(cell.removesuffix("%")) / 100 for cell in (cells[2], *cells[4:]))
            name = f"{cells[0].replace(' ', '_')}, {cells[3]}"
            rows[name] = {"questions": int(cells[1]), **dict(zip(SHARES, shares, strict=True))}
    return rows


def measure(args: argparse.Namespace, found: Any) -> Iterator[Any]:
    if args.speech is None and args.talker is None:
        raise SystemExit("name what was trained again: --speech SHIPPED AGAIN or --talker WORK")
    if args.speech is not None:
        shipped, again = args.speech
        heard = {
            name: json.loads((work / "speech.json").read_text()) for name, work in zip(HEARD, args.speech, strict=True)
        }
        yield (found := found | {"codes": equal_codes(shipped, again), **heard})
    if args.talker is not None:
        answers = json.loads((args.talker / "answers.json").read_text())
        yield found | {"talker": {"card": card(), "answers": answers}}


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def parts(found: Any) -> list[str]:
    """The section on codebook, vocoder and DiT."""
    shipped, again, (equal, total) = *(found[name] for name in HEARD), found["codes"]
    chance = [name for name in shipped if name.startswith("chance")]
    count = max(row["sentences"] for row in shipped.values())
    lines = [
        "## Codebook, vocoder and DiT",
        "",
        "Trained from nothing by the commands of `make wren`, on another machine than those that ship. Both spoke",
        f"{count} held-out sentences of each voice, with weights rounded to BF16. A recogniser that knows the grammar",
        f"of all answers heard them. The two codebooks give {equal:,} of {total:,} codes alike.",
        "",
    ]
    rows = [
        [
            *name.split(": "),
            *(percent(rows[name]["word_error_rate"], 2) for rows in (shipped, again)),
            *(percent(rows[name]["right_voice"]) for rows in (shipped, again)),
        ]
        for name in shipped
        if name not in chance
    ]
    head = ["voice", "what speaks", "words heard wrong, shipped", "trained again", "voices told right, shipped"]
    lines += table([*head, "trained again"], rows)
    wrong = [[name.partition(": ")[2], percent(shipped[name]["word_error_rate"], 2)] for name in chance]
    return [*lines, "", *table(["chance", "words heard wrong"], wrong)]


def replies(found: Any) -> list[str]:
    """The section on the talker."""
    shipped, again = found["card"], found["answers"]
    lines = [
        "## Talker",
        "",
        "Trained from nothing by two processes, on thinker, codebook, DiT and vocoder as they ship: 7,000 and 4,000",
        "steps, of 0.75 and 0.72 s where nothing else ran, so 2.3 hours of two cores; stopped at step 4,043, it went",
        "on from there. Held-out questions were asked as for the model card, whose figures stand beside, but half as",
        "many; replies are streamed and sampled, so no two talkers say the same codes. Right answers are the",
        "thinker's, and equal but for rounding.",
        "",
    ]
    asked = [name for name in shipped if name in again]
    pairs = [[name.split(", ")[0].replace("_", " "), name.split(", ")[1], shipped[name], again[name]] for name in asked]
    columns = ("word_error_rate", "right_and_heard", "ended")
    rows = [
        [kind, voice, f"{one['questions']} and {other['questions']}"]
        + [percent(of[column]) for column in columns for of in (one, other)]
        for kind, voice, one, other in pairs
    ]
    head = ["questions", "voice", "asked", "words heard wrong, shipped", "trained again"]
    head += ["right and heard, shipped", "trained again", "speech ended, shipped", "trained again"]
    lines += table(head, rows)
    ear, spoken = again["ear"], [again[name] for name in asked]
    voiced = sum(row["right_voice"] * row["questions"] for row in spoken) / sum(row["questions"] for row in spoken)
    clipped = sum(row["clipped_samples"] for row in spoken)
    lines += ["", f"Of the talker that was trained again {percent(voiced)} of the voices are told right, and {clipped}"]
    lines += [
        f"samples clip. The recogniser hears {percent(ear['truth'])} of the words wrong in flite's own sound, and"
    ]
    return [*lines, f"{percent(ear['chance'])} when another sentence is played."]


def page(found: Any) -> str:
    """docs/results/wren-again.md"""
    lines = [
        "# Wren's parts, trained again",
        "",
        "Made by `python -m benchmarks.wren_again` from [wren-again.json](wren-again.json).",
        "",
        *parts(found),
        "",
    ]
    if "talker" in found:
        lines += [*replies(found["talker"]), ""]
    else:
        lines += ["## Talker", "", "Not yet trained a second time to its end.", ""]
    return "\n".join([*lines, "## Vision encoder and thinker", "", *REST, ""])


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--speech", type=Path, nargs=2, metavar=("SHIPPED", "AGAIN"))
    parser.add_argument("--talker", type=Path, metavar="WORK")
    record("wren-again", page, measure, parser)
