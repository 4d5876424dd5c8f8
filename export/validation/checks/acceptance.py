"""Check a bundle of the real weights against the answer that transformers' own integration test records.

The test (huggingface/transformers, tests/models/qwen2_5_omni/test_modeling_qwen2_5_omni.py) asks Qwen2.5-Omni-7B about
a sound and a picture. Its prompt and its pixels are what any checkpoint's bundle gives; its answer is the 7B's. No
reference is loaded: a machine that runs the bundle can run this.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omniport.runtime.bundle.manifest import SamplingConfig
from omniport.runtime.events import TextDelta
from omniport.runtime.media.image import image_input, load_image
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.session import OmniSession
from omniport.runtime.system.files import cache_folder, replace_file

from ..context import Context
from ..types import FAIL, PASS, Check

STAGE = "acceptance"
SYSTEM = "You are a helpful assistant."
QUESTION = "What's that sound and what kind of dog is this?"
SOUND = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen2-Audio/audio/glass-breaking-151256.mp3"
PICTURE = "https://qianwen-res.oss-accelerate-overseas.aliyuncs.com/Qwen2-VL/demo_small.jpg"
#: the greedy answers of the 7B in bfloat16 and in float32
ANSWERS = (
    "The sound is glass shattering, and the dog is a Labrador Retriever.",
    "The sound is glass shattering, and the dog appears to be a Labrador Retriever.",
)
#: what an answer of other sizes and precisions has to say
WORDS = ("glass", "labrador")
#: the prompt's first tokens, up to the first two of the sound
PROMPT = (151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151647, 151646, 151646)
#: the first three values of the picture's first six patches, and how far the test lets them be off
PIXELS = (
    (0.8792, 0.8792, 0.9084),
    (1.1858, 1.1858, 1.2296),
    (1.2004, 1.2004, 1.2150),
    (1.4340, 1.4340, 1.4194),
    (1.3902, 1.4048, 1.4194),
    (1.5216, 1.5362, 1.5362),
)
PIXEL_LIMIT = 3e-3

_MOST_BYTES = 16 << 20
_TOKENS = 64


def acceptance_checks(context: Context) -> Iterator[Check]:
    """The recorded question: its prompt, its pixels, and the answer.

    The two files are fetched once and kept in the cache folder; whoever has no network puts them there.
    """
    try:
        sound, picture = media()
    except OSError as error:
        yield Check.not_run(STAGE, "the recorded question", str(error))
        return
    content = [
        {"type": "audio", "audio": sound},
        {"type": "image", "image": picture},
        {"type": "text", "text": QUESTION},
    ]
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    manifest = context.bundle.manifest
    codec = TextCodec.from_file(context.bundle.path(manifest.tokenizer_file), manifest.tokens)
    yield prompt_check(build_prompt(messages, manifest, codec).token_ids)
    context.progress("acceptance: the recorded question")
    patches = image_input(load_image(picture), manifest.vision).patches
    yield pixel_check(patches.reshape(-1, patches.shape[-1])[:6, :3])
    session = OmniSession(context.bundle, context.backend)
    events = session.reply(messages, speak=False, thinker=SamplingConfig(max_new_tokens=_TOKENS))
    yield answer_check("".join(event.text for event in events if isinstance(event, TextDelta)))


def media() -> tuple[Path, Path]:
    """The recorded sound and picture.

    Raises:
        OSError: they are not in the cache folder and cannot be fetched; says where to put them.
    """
    folder = cache_folder()
    if folder is None:
        raise OSError("OMNIPORT_CACHE is empty, so that its sound and picture have no place: name a folder")
    found = []
    for address in (SOUND, PICTURE):
        path = folder / STAGE / address.rpartition("/")[2]
        if not path.exists():
            try:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    content = answer.read(_MOST_BYTES)
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, content)
            except OSError as error:
                raise OSError(f"cannot fetch {address} ({error}): put the file at {path}") from error
        found.append(path)
    return found[0], found[1]


def prompt_check(ids: object) -> Check:
    """The prompt's first tokens."""
    got = tuple(int(k) for k in np.asarray(ids)[: len(PROMPT)])
    name = "the recorded prompt"
    if got == PROMPT:
        return Check(stage=STAGE, name=name, status=PASS)
    at = next((k for k, (a, b) in enumerate(zip(got, PROMPT, strict=False)) if a != b), len(got))
    return Check.failed(STAGE, name, f"token {at} differs: the prompt begins with {got}, recorded is {PROMPT}")


def pixel_check(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Check:
    """The picture's first values [6, 3]."""
    error = float(np.abs(values - np.asarray(PIXELS)).max())
    holds = error <= PIXEL_LIMIT
    return Check(
        stage=STAGE,
        name="the recorded pixels",
        status=PASS if holds else FAIL,
        figures={"max_abs": error},
        limits={"max_abs": PIXEL_LIMIT},
        reasons={"max_abs": "what transformers' own test allows"},
        message="" if holds else f"the picture is not normalised or resized as recorded: off by {error:.4f}",
    )


def answer_check(text: str) -> Check:
    """The answer: one of those recorded, or one that names what is heard and seen."""
    name = f"the recorded question: {QUESTION}"
    missing = [word for word in WORDS if word not in text.lower()]
    if missing:
        message = f"it answers {text!r}, without {' and '.join(missing)}; the 7B answers {ANSWERS[0]!r}"
        return Check.failed(STAGE, name, message)
    figures: dict[str, float | int | bool | str | None] = {"answer": text, "as_recorded": text.strip() in ANSWERS}
    return Check(stage=STAGE, name=name, status=PASS, figures=figures)
