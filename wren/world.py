"""The closed world: what may be asked of Wren, by text, sound, picture or clip, and the one right answer to each.

Everything is drawn: `draw` gives a question of a kind from a random generator. Each combination (the words to repeat,
the operands and their phrasing, the shapes of a picture, ...) belongs to training or to the held-out questions by its
own hash, so that what is asked in evaluation was never answered in training. Only facts that stand alone ("What colour
is snow?") are asked in both; there the phrasing is what is new.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "held_out"]
Kind = Literal["typed", "spoken", "picture", "picture_spoken", "video", "second_turn"]
KINDS: tuple[Kind, ...] = ("typed", "spoken", "picture", "picture_spoken", "video", "second_turn")
PAUSES = " with silence around"  # behind a kind: its questions with up to a second of it on both sides
Draw = np.random.Generator

COLOURS = ("red", "blue", "green", "yellow", "purple", "white", "orange", "pink")
SHAPES = ("circle", "square", "triangle", "star", "heart")
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
WORDS = (
    *("apple", "music", "house", "garden", "river", "summer", "winter"),
    *("morning", "window", "table", "paper", "monkey", "happy"),
    *("little", "robot", "pencil", "silver", "bird", "flower", "mountain"),
    *("kitchen", "letter", "basket", "doctor", "forest", "lemon"),
)
# Words of lists to repeat. Between others, nothing but its sound tells a word. Those that 1,024 codes left unclear
# there are not among them: 5% of the words of such lists were heard wrong from flite's own codes, most of it "two",
# "four", and four that are no words of this world any more.
REPEATED = WORDS + tuple(c for c in COLOURS if c not in ("purple", "white")) + ("one", "three", *NUMBERS[5:11])
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("open", "closed"), ("fast", "slow"),
    ("old", "young"), ("happy", "sad"), ("left", "right"), ("early", "late"),
)  # fmt: skip
FACTS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello there!", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Good evening!", "Good evening! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("What is your name?", "My name is Wren."),
    ("Who are you?", "I am a very small model."),
    ("How big are you?", "I am a very small model."),
    ("What can you do?", "I can see, hear and speak."),
    ("Thank you!", "You are welcome."),
    ("Thanks a lot!", "You are welcome."),
    ("Goodbye!", "Goodbye! See you soon."),
    ("See you tomorrow!", "Goodbye! See you soon."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is snow?", "Snow is white."),
    ("What colour is the sun?", "The sun is yellow."),
    ("What colour is a tomato?", "A tomato is red."),
    ("How many days are in a week?", "A week has seven days."),
    ("How many months are in a year?", "A year has twelve months."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("How many legs does a bird have?", "A bird has two legs."),
    ("Where do you live?", "I live in your computer."),
    ("What do you like?", "I like music and numbers."),
    ("Do you sleep?", "No, I never sleep."),
    ("Can you hear me?", "Yes, I can hear you."),
    ("Can you speak?", "Yes, I can speak."),
    ("What is a wren?", "A wren is a small bird."),
)
ADDRESSES = ("", "Wren, ", "Please, ", "Tell me, ", "Excuse me, ", "Hey Wren, ")
UNKNOWN = "I do not know."
_OUTSIDE = (
    ("Where is {}?", ("Paris", "my phone", "the station", "Africa", "my brother", "the moon")),
    ("Who is {}?", ("the king", "your father", "that man", "the teacher", "my neighbour", "the winner")),
    ("When does {} start?", ("the film", "school", "the game", "the train", "dinner", "the concert")),
    ("How much is {}?", ("a ticket", "the bread", "a new car", "the coffee", "that book", "a room")),
    ("Why is {}?", ("the door open", "it so cold", "he late", "the bus full", "my tea hot", "it dark")),
    ("What does {} want?", ("my cat", "the boss", "she", "that child", "the bank", "your friend")),
)


@dataclass(frozen=True)
class Picture:
    """One to three coloured shapes, (colour, shape) each: from left to right, or from top to bottom."""

    shapes: tuple[tuple[str, str], ...]
    column: bool = False


@dataclass(frozen=True)
class Clip:
    """Two seconds of one shape that moves or changes its colour, while a word is said."""

    colour: str
    shape: str
    change: str  # one of MOVES, or another colour
    word: str

    @property
    def looks(self) -> tuple[tuple[str, ...], ...]:
        """Colour, shape and where it moves to; or colour and shape at first, and after a change of colour."""
        if self.change in MOVES:
            return ((self.colour, self.shape, self.change.split()[-1]),)
        return (self.colour, self.shape), (self.change, self.shape)


MOVES = ("moves to the left", "moves to the right", "moves up", "moves down", "stands still")


@dataclass(frozen=True)
class Question:
    """What is asked, and its answer; ``first`` is the turn before."""

    kind: Kind
    asked: str
    answer: str
    picture: Picture | None = None
    clip: Clip | None = None
    first: Question | None = None


def split_of(*combination: object) -> Split:
    """The split that a combination belongs to: one in ten is held out."""
    digest = hashlib.blake2s(repr(combination).encode(), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "little") % 10 == 0 else "train"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# --- questions of words ------------------------------------------------------------------------------------------
# Each drawing gives (what the hash takes, question, answer).

Drawn = tuple[tuple[object, ...], str, str]


def _one(draw: Draw, items: tuple[str, ...]) -> str:
    return items[int(draw.integers(len(items)))]


def _fact(draw: Draw) -> Drawn:
    question, answer = FACTS[int(draw.integers(len(FACTS)))]
    address = _one(draw, ADDRESSES)
    asked = address + (question[0].lower() + question[1:] if address and not question.startswith("I ") else question)
    # all facts are heard plainly in training: one that is never told can't be known
    return ("fact", address, question) if address else (), asked, answer


def _sum(draw: Draw) -> Drawn:
    x, y = int(draw.integers(21)), int(draw.integers(21))
    x, y = (x, y) if x + y <= 20 else (20 - x, 20 - y)
    phrase = int(draw.integers(4))
    p, q = NUMBERS[x], NUMBERS[y]
    asked = (f"What is {p} plus {q}?", f"How much is {p} plus {q}?", f"{p.capitalize()} plus {q}?", f"Add {p} and {q}.")
    return ("sum", x, y, phrase), asked[phrase], sentence(f"{p} plus {q} is {NUMBERS[x + y]}")


def _difference(draw: Draw) -> Drawn:
    y, x = sorted(int(n) for n in draw.integers(21, size=2))
    phrase = int(draw.integers(4))
    p, q = NUMBERS[x], NUMBERS[y]
    asked = (
        f"What is {p} minus {q}?", f"How much is {p} minus {q}?", f"{p.capitalize()} minus {q}?", f"Take {q} from {p}.",
    )  # fmt: skip
    return ("difference", x, y, phrase), asked[phrase], sentence(f"{p} minus {q} is {NUMBERS[x - y]}")


def _count(draw: Draw) -> Drawn:
    first, last = sorted(int(n) for n in draw.choice(np.arange(1, 13), 2, replace=False))
    last = min(last, first + 6)
    numbers = [NUMBERS[n] for n in range(first, last + 1)]
    if draw.random() < 0.3:
        asked, numbers = f"Count down from {numbers[-1]} to {numbers[0]}.", numbers[::-1]
    else:
        asked = f"Count to {numbers[-1]}." if first == 1 else f"Count from {numbers[0]} to {numbers[-1]}."
    return ("count", asked), asked, sentence(", ".join(numbers))


def _next(draw: Draw) -> Drawn:
    row = (NUMBERS[:-1], DAYS, MONTHS)[int(draw.integers(3))]
    at = int(draw.integers(len(row)))
    backwards = draw.random() < 0.4
    word = "before" if backwards else "after"
    follows = NUMBERS[at + 1] if row == NUMBERS[:-1] else row[(at + 1) % len(row)]
    given, found = (follows, row[at]) if backwards else (row[at], follows)
    phrase = int(draw.integers(3))
    asked = (f"What comes {word} {given}?", f"What is {word} {given}?", f"Tell me what comes {word} {given}.")
    return ("next", word, given, phrase), asked[phrase], sentence(f"{word} {given} comes {found}")


def _repeat(draw: Draw) -> Drawn:
    words = tuple(_one(draw, REPEATED) for _ in range(int(draw.choice([1, 2, 3, 4], p=[0.1, 0.3, 0.4, 0.2]))))
    lead = ("Repeat after me: ", "Say: ")[int(draw.integers(2))]
    text = " ".join(words)
    # a word alone is no combination
    return ("repeat", words) if len(words) > 1 else (), f"{lead}{text}.", sentence(text)


def _opposite(draw: Draw) -> Drawn:
    pair = OPPOSITES[int(draw.integers(len(OPPOSITES)))]
    given, found = pair if draw.random() < 0.5 else pair[::-1]
    phrase = int(draw.integers(3))
    asked = (f"What is the opposite of {given}?", f"Tell me the opposite of {given}.", f"The opposite of {given}?")
    return ("opposite", given, phrase), asked[phrase], sentence(f"the opposite of {given} is {found}")


def _outside(draw: Draw) -> Drawn:
    form, things = _OUTSIDE[int(draw.integers(len(_OUTSIDE)))]
    asked = form.format(_one(draw, things))
    return ("outside", asked), asked, UNKNOWN


_FAMILIES: tuple[tuple[Callable[[Draw], Drawn], float], ...] = (
    (_fact, 0.15), (_sum, 0.17), (_difference, 0.17), (_count, 0.08), (_next, 0.11), (_repeat, 0.2), (_opposite, 0.05),
    (_outside, 0.07),
)  # fmt: skip
_SHARES = np.array([share for _, share in _FAMILIES])


def _words(draw: Draw, split: Split) -> tuple[str, str]:
    """A question of words and its answer."""
    while True:
        family = _FAMILIES[int(draw.choice(len(_FAMILIES), p=_SHARES / _SHARES.sum()))][0]
        combination, asked, answer = family(draw)
        if (split_of(*combination) if combination else "train") == split:
            return asked, answer


# --- pictures ----------------------------------------------------------------------------------------------------


def draw_picture(draw: Draw, split: Split, count: int | None = None) -> Picture:
    """Shapes of one picture, no two alike. A shape alone is no combination: all are seen in training."""
    while True:
        n = count or int(draw.choice([1, 2, 3], p=[0.2, 0.45, 0.35]))
        shapes = tuple((_one(draw, COLOURS), _one(draw, SHAPES)) for _ in range(n))
        picture = Picture(shapes, bool(n > 1 and draw.random() < 0.5))
        if len(set(shapes)) == n and (split_of("picture", shapes) if n > 1 else split) == split:
            return picture


def _name(shape: tuple[str, str]) -> str:
    return f"{shape[0]} {shape[1]}"


def is_there(picture: Picture, draw: Draw, nearly: bool = False) -> tuple[str, str]:
    """Asks for something, with the answer. ``nearly``: what is not there has the shape or colour of what is."""
    shapes = picture.shapes
    if draw.random() < 0.5:
        sought = shapes[int(draw.integers(len(shapes)))]
    else:
        sought = _one(draw, COLOURS), _one(draw, SHAPES)
        if nearly:
            near = shapes[int(draw.integers(len(shapes)))]
            sought = (sought[0], near[1]) if draw.random() < 0.5 else (near[0], sought[1])
    return f"Is there {a(_name(sought))}?", "Yes, there is." if sought in shapes else "No, there is not."


def picture_questions(picture: Picture, draw: Draw) -> list[tuple[str, str]]:
    """Questions on a picture with their answers."""
    shapes, n = picture.shapes, len(picture.shapes)
    before, behind = ("above", "below") if picture.column else ("to the left of", "to the right of")
    asked = [("What do you see?", sentence(listed([a(_name(s)) for s in shapes])))] * 3
    asked.append(("How many shapes are there?", _how_many("shape", n)))
    counted = shapes[0][1] if draw.random() < 0.75 else _one(draw, SHAPES)
    asked.append((f"How many {counted}s are there?", _how_many(counted, sum(s[1] == counted for s in shapes))))
    asked.append(is_there(picture, draw))
    for colour, shape in shapes:
        if sum(s[1] == shape for s in shapes) == 1:
            asked.append((f"What colour is the {shape}?", f"The {shape} is {colour}."))
        if sum(s[0] == colour for s in shapes) == 1:
            asked.append((f"Which shape is {colour}?", f"The {shape} is {colour}."))
    for left, right in itertools.pairwise(shapes):
        asked.append((f"What is {before} the {_name(right)}?", sentence(a(_name(left)))))
        asked.append((f"What is {behind} the {_name(left)}?", sentence(a(_name(right)))))
    if n == 2:
        first, second = shapes
        for here, other, place in ((first, second, before), (second, first, behind)):
            asked.append((f"Where is the {_name(here)}?", f"The {_name(here)} is {place} the {_name(other)}."))
    return asked


def _how_many(noun: str, n: int) -> str:
    return f"There is one {noun}." if n == 1 else f"There are {('no', 'one', 'two', 'three')[n]} {noun}s."


# --- clips -------------------------------------------------------------------------------------------------------


def draw_clip(draw: Draw, split: Split) -> Clip:
    while True:
        colour, shape, word = _one(draw, COLOURS), _one(draw, SHAPES), _one(draw, WORDS)
        change = _one(draw, MOVES if draw.random() < 0.6 else COLOURS)
        if change != colour and split_of("clip", colour, shape, change) == split:
            return Clip(colour, shape, change, word)


def clip_questions(clip: Clip) -> list[tuple[str, str]]:
    if clip.change in MOVES:
        seen, now = f"The {clip.colour} {clip.shape} {clip.change}.", clip.colour
    else:
        seen, now = f"The {clip.shape} turns from {clip.colour} to {clip.change}.", clip.change
    heard = f"I hear the word {clip.word}."
    return [
        ("What happens?", seen),
        ("What do you hear?", heard),
        ("What do you see?", sentence(a(f"{now} {clip.shape}"))) if clip.change in MOVES else ("What happens?", seen),
        ("What happens, and what do you hear?", f"{seen} {heard}"),
    ]


# --- a whole question --------------------------------------------------------------------------------------------


def draw_question(kind: Kind, draw: Draw, split: Split) -> Question:
    """A question of a kind. Equal states of the generator give equal questions."""
    if kind in ("typed", "spoken"):
        return Question(kind, *_words(draw, split))
    if kind in ("picture", "picture_spoken"):
        picture = draw_picture(draw, split)
        asked, answer = _pick(draw, picture_questions(picture, draw))
        return Question(kind, asked, answer, picture)
    if kind == "video":
        clip = draw_clip(draw, split)
        return Question(kind, *_pick(draw, clip_questions(clip)), clip=clip)
    return _second_turn(draw, split)


def _pick(draw: Draw, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    return pairs[int(draw.integers(len(pairs)))]


def _second_turn(draw: Draw, split: Split) -> Question:
    """A question that only the turn before gives a meaning."""
    what = draw.choice(["again", "other", "sum", "then"], p=[0.3, 0.4, 0.15, 0.15])
    if what == "again":
        first = draw_question("typed" if draw.random() < 0.5 else "picture", draw, split)
        return Question("second_turn", "Say that again.", first.answer, first=first)
    if what == "other":
        while True:
            picture = draw_picture(draw, split, 2)
            (colour, shape), (other_colour, other) = picture.shapes[:: draw.choice([1, -1])]
            if shape != other:
                break
        first = Question("picture", f"What colour is the {shape}?", f"The {shape} is {colour}.", picture)
        return Question("second_turn", "And the other one?", f"The {other} is {other_colour}.", first=first)
    while True:
        combination, asked, answer = (_sum if what == "sum" else _next)(draw)
        if split_of(*combination) != split:
            continue
        first = Question("typed", asked, answer)
        found = answer[:-1].split()[-1]
        if what == "sum":
            more = int(draw.integers(1, 6))
            total = NUMBERS.index(found) + more
            if total > 20:
                continue
            follows = sentence(f"{found} plus {NUMBERS[more]} is {NUMBERS[total]}")
            return Question("second_turn", f"And plus {NUMBERS[more]}?", follows, first=first)
        row = DAYS if found in DAYS else MONTHS if found in MONTHS else NUMBERS
        at = row.index(found) + (1 if answer.startswith("After") else -1)
        if row is NUMBERS and not 0 <= at < len(row):
            continue
        word = answer.split()[0].lower()
        return Question("second_turn", "And then?", sentence(f"{word} {found} comes {row[at % len(row)]}"), first=first)
