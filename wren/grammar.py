"""What the ear expects: every reply of the world as a grammar."""

from __future__ import annotations

from omniport.export.evaluation.hearing import words

from wren.world import COLOURS, DAYS, FACTS, MONTHS, MOVES, NUMBERS, OPPOSITES, REPEATED, SHAPES, UNKNOWN, WORDS, a


def reply_grammar() -> str:
    """Every reply of the world as a JSGF grammar."""

    def any_of(items: tuple[str, ...] | list[str]) -> str:
        return " | ".join(dict.fromkeys(" ".join(words(item)) for item in items))

    counts = [list(NUMBERS[i:j]) for i in range(1, 13) for j in range(i + 2, min(i + 8, 14))]
    counted = any_of([" ".join(c) for c in counts] + [" ".join(c[::-1]) for c in counts])
    fixed = [answer for _, answer in FACTS] + [UNKNOWN, "Yes, there is.", "No, there is not."]
    pairs = [f"the opposite of {x} is {y}" for p in OPPOSITES for x, y in (p, p[::-1])]
    rules = {
        "c": any_of(COLOURS),
        "s": any_of(SHAPES),
        "n": any_of(NUMBERS),
        "w": any_of(REPEATED),
        "d": any_of([f"after {r[i - 1]} comes {r[i]}" for r in (DAYS, MONTHS) for i in range(len(r))])
        + " | "
        + any_of([f"before {r[i]} comes {r[i - 1]}" for r in (DAYS, MONTHS) for i in range(len(r))]),
        "t": " | ".join(f"{a(colour)} <s>" for colour in COLOURS),
        "seen": f"the <c> <s> ( {any_of(MOVES)} ) | the <s> turns from <c> to <c>",
        "heard": f"i hear the word ( {any_of(WORDS)} )",
        "k": any_of([f"{s}s" for s in (*SHAPES, "shape")]),
    }
    replies = [
        "<t> | <t> and <t> | <t> <t> and <t>",
        "there is one ( shape | <s> ) | there are ( no | two | three ) <k> | the <s> is <c>",
        "the <c> <s> is ( above | below | to the left of | to the right of ) the <c> <s>",
        "<seen> | <heard> | <seen> <heard>",
        "<n> ( plus | minus ) <n> is <n> | ( after | before ) <n> comes <n> | <d>",
        f"{counted} | <w> [ <w> ] [ <w> ] [ <w> ]",
        f"{any_of(pairs)} | {any_of(fixed)}",
    ]
    body = "".join(f"<{name}> = {rule};\n" for name, rule in rules.items())
    return f"#JSGF V1.0;\ngrammar world;\n{body}public <reply> = {' | '.join(replies)};\n"
