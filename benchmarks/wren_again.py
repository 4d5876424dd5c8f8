"""Wren's speech parts trained again from nothing, beside those that ship; writes docs/results/wren-again.md.

    python -m benchmarks.wren_again SHIPPED AGAIN

SHIPPED is a work folder that `python -m wren.restore` filled from the checkpoint, AGAIN one in which `make wren` was
run as far as its DiT. Both have the same speech, and both were heard by `python -m wren.hear_speech --bf16 --count 80`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, record, table

#: What was seen of the other parts, as `wren.vision` and `wren.thinker` print it while they train.
REST = [
    "The vision encoder was trained again to its end as well, and the thinker to step 3,900 of the 5,000 of its first",
    "course. Of 60 held-out questions of each kind, at step 3,000, it answered 93% of the typed ones right, 88% of",
    "those on pictures and 97% of second turns; the shipped one had 95%, 85% and 98% there. Behind it come four more",
    "courses and the talker, some seven hours of a core: these were not trained a second time.",
]
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


def measure(args: argparse.Namespace, _: Any) -> Iterator[Any]:
    if args.again is None:
        raise SystemExit("name two work folders: of the parts that ship, and of those trained again")
    heard = {name: json.loads((getattr(args, name) / "speech.json").read_text()) for name in ("shipped", "again")}
    yield {"codes": equal_codes(args.shipped, args.again), **heard}


def page(found: Any) -> str:
    """docs/results/wren-again.md"""
    shipped, again, (equal, total) = found["shipped"], found["again"], found["codes"]
    chance = [name for name in shipped if name.startswith("chance")]
    count = max(row["sentences"] for row in shipped.values())

    def wrong(rows: Any, name: str) -> str:
        return f"{100 * rows[name]['word_error_rate']:.2f}%"

    lines = [
        "# Wren's speech parts, trained again",
        "",
        "Made by `python -m benchmarks.wren_again` from [wren-again.json](wren-again.json). Codebook, vocoder and DiT",
        "were trained from nothing by the commands of `make wren`, on another machine than those that ship, and both",
        f"spoke {count} held-out sentences of each voice, with weights rounded to BF16. A recogniser that knows the",
        f"grammar of all answers heard them. The two codebooks give {equal:,} of {total:,} codes alike.",
        "",
    ]
    rows = [
        [
            *name.split(": "),
            wrong(shipped, name),
            wrong(again, name),
            *(f"{100 * rows[name]['right_voice']:.1f}%" for rows in (shipped, again)),
        ]
        for name in shipped
        if name not in chance
    ]
    head = ["voice", "what speaks", "words heard wrong, shipped", "trained again", "voices told right, shipped"]
    lines += table([*head, "trained again"], rows)
    lines += ["", *table(["chance", "words heard wrong"], [[n.partition(": ")[2], wrong(shipped, n)] for n in chance])]
    lines += ["", *REST]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("shipped", type=Path, nargs="?")
    parser.add_argument("again", type=Path, nargs="?")
    record("wren-again", page, measure, parser)
