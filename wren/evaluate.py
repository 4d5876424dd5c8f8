"""What Wren can do: held-out questions of every kind to an exported bundle, answered by the product's runtime.

    python -m wren.evaluate BUNDLE [--work DIR] [--count N] [--kinds KIND,KIND] [--silent] [--pauses]
        [--reference CHECKPOINT]

Text is greedy; speech is sampled as it ships, in both voices in turn, streamed in windows, and heard by the ear. A
second turn is asked behind the model's own first answer. The same run says what the ear makes of flite's own sound (as
good as it gets) and of other sentences' (chance). With a checkpoint, transformers' own `generate` answers some
of the questions too, and both say the greedy text and codes. Results go to WORK/answers.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation.hearing import Ear, Score, words
from omniport.runtime import AudioChunk, Done, OmniSession, SamplingConfig
from omniport.runtime.media.video import load_video

from wren import corpus, media, sizes, world
from wren.conversations import Conversations
from wren.grammar import reply_grammar
from wren.hear_speech import SEEN, VoiceClassifier, chances, true_sound
from wren.mel import mel_of
from wren.prompts import Turn
from wren.reference import Reference

MOST_TOKENS, MOST_CODES = 64, 500
MEASURED = 100  # sentences of each voice that the ear is measured by
CLIPPED = 0.999
GREEDY = SamplingConfig(max_new_tokens=MOST_TOKENS, temperature=0.0)
SPOKEN = SamplingConfig(max_new_tokens=MOST_CODES, top_k=40, top_p=0.8, temperature=0.9, repetition_penalty=1.05)


@dataclass(frozen=True, eq=False)
class Reply:
    """A reply of the runtime. ``ended``: the speech came to its end by itself."""

    text: str
    token_ids: list[int]
    codec_ids: list[int]
    sound: NDArray[np.float32]
    ended: bool


class Asker:
    """Asks a bundle."""

    def __init__(self, session: OmniSession, folder: Path) -> None:
        self.session, self.folder = session, folder

    def content(self, turn: Turn) -> list[dict[str, Any]]:
        """A turn's question as the runtime takes it."""
        parts: list[dict[str, Any]] = []
        if turn.picture is not None:
            parts.append({"type": "image", "image": turn.picture})
        if turn.clip is not None:
            media.write_clip(self.folder / "clip.mkv", *turn.clip)
            parts.append({"type": "video", "video": self.folder / "clip.mkv", "use_audio": True})
        if turn.sound is not None:
            parts.append({"type": "audio", "audio": (turn.sound, sizes.QUESTION_RATE)})
        return [*parts, {"type": "text", "text": turn.text}] if turn.text else parts

    def seen(self, turn: Turn) -> Turn:
        """A turn whose clip has the frames that the runtime shows, and the sound as the file has it."""
        if turn.clip is None:
            return turn
        media.write_clip(self.folder / "clip.mkv", *turn.clip)
        clip = load_video(self.folder / "clip.mkv", self.session.manifest.vision, with_audio=True)
        assert clip.audio is not None
        return replace(turn, clip=(clip.frames, clip.audio))

    def reply(self, turns: list[Turn], voice: str | None, talker: SamplingConfig = SPOKEN, seed: int = 0) -> Reply:
        """The reply to the last turn; the answers of the others are as they stand."""
        messages: list[dict[str, Any]] = []
        for turn in turns[:-1]:
            messages.append({"role": "user", "content": self.content(turn)})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": self.content(turns[-1])})
        voiced: dict[str, Any] = {"voice": voice, "talker": talker, "seed": seed} if voice else {}
        chunks: list[NDArray[np.float32]] = []
        for event in self.session.reply(messages, speak=voice is not None, thinker=GREEDY, **voiced):
            if isinstance(event, AudioChunk):
                chunks.append(event.samples)
            elif isinstance(event, Done):
                done = event
        sound = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
        return Reply(done.text, done.token_ids, done.codec_ids, sound, done.speech_finish_reason == "stop")


@dataclass
class Tally:
    """Counts of one kind and voice. ``both`` counts right answers whose every word was heard."""

    count: int = 0
    right: int = 0
    ended: int = 0
    voiced: int = 0
    clipped: int = 0
    both: int = 0

    def shares(self, score: Score) -> dict[str, float]:
        return {
            "questions": self.count,
            "right": self.right / self.count,
            "word_error_rate": score.rate,
            "ended": self.ended / self.count,
            "right_voice": self.voiced / self.count,
            "clipped_samples": self.clipped,
            "right_and_heard": self.both / self.count,
        }


def questions(conversations: Conversations, kind: world.Kind, count: int, asker: Asker) -> list[list[Turn]]:
    """Held-out questions; the turn before a second one has the model's own answer."""
    draw = np.random.default_rng((11, world.KINDS.index(kind)))
    asked = []
    for _ in range(count):
        turns = conversations.question(kind, draw)
        for i in range(len(turns) - 1):
            turns[i] = replace(turns[i], answer=asker.reply(turns[: i + 1], None).text)
        asked.append(turns)
    return asked


def compare(asker: Asker, reference: Reference, asked: list[list[Turn]]) -> dict[str, float]:
    """Shares of questions to which runtime and transformers give the same greedy text, and the same codes."""
    greedy = SamplingConfig(max_new_tokens=MOST_CODES, temperature=0.0, repetition_penalty=1.05)
    texts = codes = 0
    for number, turns in enumerate(asked):
        voice = list(sizes.REPLY_VOICES)[number % 2]
        ours = asker.reply(turns, voice, greedy)
        seen = [asker.seen(turn) for turn in turns]
        text, said = reference.reply([*seen[:-1], replace(seen[-1], answer="")], voice, MOST_CODES)
        texts += text == ours.token_ids
        codes += said == ours.codec_ids
    return {"questions": len(asked), "same_text": texts / len(asked), "same_codes": codes / len(asked)}


def measure_of(work: Path, ear: Ear) -> dict[str, float]:
    """Words that the ear hears wrong of flite's own held-out sentences, and of others in their place."""
    voices = [list(corpus.replies(work, voice, "held_out", MEASURED)) for voice in sizes.REPLY_VOICES]
    truth = ear.score((reply.text, true_sound(reply)) for replies in voices for reply in replies)
    chance = ear.score(pair for replies in voices for pair in chances(replies)["other sentence"])
    return {"sentences": sum(map(len, voices)), "truth": truth.rate, "chance": chance.rate}


def merge_json(path: Path, results: dict[str, Any]) -> None:
    """Write results beside those of other kinds, which another process may be asking."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--count", type=int, default=200, help="questions of each kind")
    parser.add_argument("--kinds", default=",".join(world.KINDS), help="these kinds alone; others' figures stay")
    parser.add_argument("--silent", action="store_true", help="text only")
    parser.add_argument(
        "--pauses", action="store_true", help="text only, questions with up to a second of silence around"
    )
    parser.add_argument("--reference", type=Path, help="checkpoint that transformers answers with")
    parser.add_argument("--compared", type=int, default=20, help="questions of each kind for transformers")
    args = parser.parse_args()
    conversations = Conversations(args.work, "held_out", whole_clips=True)
    conversations.pauses = float(args.pauses)
    silent = args.silent or args.pauses
    ear = Ear(reply_grammar())
    seen = {v: [r.mel for r in corpus.replies(args.work, v, "train", SEEN)] for v in sizes.REPLY_VOICES}
    voice_of = None if silent else VoiceClassifier(seen)
    if voice_of:
        merge_json(args.work / "answers.json", {"ear": (measure := measure_of(args.work, ear))})
        print("ear", json.dumps(measure), flush=True)
    reference = Reference(args.reference, conversations.prompts) if args.reference else None
    with OmniSession.open(args.bundle) as session, tempfile.TemporaryDirectory() as folder:
        asker = Asker(session, Path(folder))
        for kind in args.kinds.split(","):
            results: dict[str, Any] = {}
            begin = time.monotonic()
            asked = questions(conversations, kind, args.count, asker)
            tallies: dict[str, Tally] = defaultdict(Tally)
            scores: dict[str, Score] = defaultdict(Score)
            for number, turns in enumerate(asked):
                voice = list(sizes.REPLY_VOICES)[number % 2]
                reply = asker.reply(turns, None if silent else voice, seed=number)
                tally, right = tallies[voice], reply.text == turns[-1].answer
                tally.count, tally.right = tally.count + 1, tally.right + right
                if not right and tally.count - tally.right <= 5:
                    print(f"  {turns[-1].said or turns[-1].text} {turns[-1].answer!r}: {reply.text!r}", flush=True)
                if voice_of and len(reply.sound):
                    heard = ear.hear(reply.sound)
                    tally.ended += reply.ended
                    tally.voiced += voice_of(mel_of(reply.sound)) == voice
                    tally.clipped += int((np.abs(reply.sound) >= CLIPPED).sum())
                    tally.both += right and heard == words(reply.text)
                    scores[voice].add(reply.text, heard)
            name = f"{kind}{world.PAUSES}" if args.pauses else kind
            if voice_of:
                for voice, tally in tallies.items():
                    results[f"{kind}, {voice}"] = tally.shares(scores[voice])
            results[name] = {
                "questions": len(asked),
                "right": sum(tally.right for tally in tallies.values()) / len(asked),
            }
            if reference:
                results[name] |= {"transformers": compare(asker, reference, asked[: args.compared])}
            for name, found in results.items():
                print(name, json.dumps(found), f"{time.monotonic() - begin:.0f} s", flush=True)
            merge_json(args.work / "answers.json", results)


if __name__ == "__main__":
    main()
