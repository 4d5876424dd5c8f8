"""Pictures and videos that are too large for the KV cache are shown smaller; what a part asks for is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from omniport.runtime.bundle.manifest import VisionFrontend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import PromptTooLong
from omniport.runtime.media.limits import VisionLimits
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.room import PlannedImage, Room
from omniport.runtime.prompt.tokenizer import TextCodec
from support.bundles import make_bundle

#: as published
FRONTEND = VisionFrontend(image_mean=(0.5,) * 3, image_std=(0.25,) * 3, min_pixels=3136, max_pixels=12845056)
CONTEXT = 4096
REPLY = 512  # tokens that are left for it


def photo(**asked: Any) -> PlannedImage:
    """A picture of 12 megapixels."""
    return PlannedImage(3024, 4032, FRONTEND, VisionLimits(**asked))


def fitted(capacity: int, *pictures: PlannedImage, text: int = 100) -> Room:
    room = Room(capacity)
    room.take("text", text)
    for picture in pictures:
        room.add("image", picture)
    room.fit()
    return room


def test_what_fits_keeps_its_size() -> None:
    room = fitted(32768, photo())
    assert room.share == 1
    assert room.tokens == 100 + 108 * 144


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_phones_photos_fit_and_leave_room_for_a_reply(count: int) -> None:
    pictures = [photo() for _ in range(count)]
    room = fitted(CONTEXT, *pictures)
    assert 0.85 * (CONTEXT - REPLY) < room.tokens <= CONTEXT - REPLY
    height, width = pictures[0].size(room.share)
    assert width / height == pytest.approx(4 / 3, rel=0.05)


def test_a_size_that_was_asked_for_is_kept() -> None:
    asked, other = photo(max_pixels=1000 * 784), photo()
    room = fitted(CONTEXT, asked, other)
    assert asked.size(room.share) == asked.size(1.0)
    assert other.tokens(room.share) < other.tokens(1.0) / 4
    with pytest.raises(PromptTooLong, match=r"of media\).*holds 4096: give pictures a smaller max_pixels"):
        fitted(CONTEXT, photo(max_pixels=12845056))


def test_text_that_leaves_no_room_is_named() -> None:
    with pytest.raises(PromptTooLong, match=r"3700 of text.*holds 4096: shorten the text"):
        fitted(CONTEXT, photo(), text=3700)


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ({"type": "image", "image": np.zeros((3024, 4032, 3), np.uint8)}, {"max_pixels": 12845056}),
        ({"type": "video", "video": np.zeros((240, 360, 640, 3), np.uint8)}, {"max_pixels": 602112, "nframes": 240}),
    ],
    ids=["picture", "video"],
)
def test_a_prompt_of_large_media(tmp_path: Path, part: dict[str, Any], remedy: dict[str, Any]) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", max_context=CONTEXT))
    manifest = msgspec.structs.replace(bundle.manifest, vision=FRONTEND)
    codec = TextCodec.from_file(bundle.path(manifest.tokenizer_file), manifest.tokens)
    prompt = build_prompt([{"role": "user", "content": [part]}], manifest, codec)
    assert CONTEXT / 2 < len(prompt.token_ids) <= CONTEXT - REPLY
    with pytest.raises(PromptTooLong, match=f"smaller {'max_pixels' if part['type'] == 'image' else 'fps'}"):
        build_prompt([{"role": "user", "content": [{**part, **remedy}]}], manifest, codec)
