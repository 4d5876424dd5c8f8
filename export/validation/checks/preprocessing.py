"""Check preprocessing against the reference's processors, and positions against ``get_rope_index``.

No graph and no weight is used: a failure here is in the runtime's host code or in the bundle's settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from omniport.runtime.bundle.parts import encoder_of
from omniport.runtime.errors import OmniportError, PromptTooLong
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import VisionInput, image_input, load_image, video_input
from omniport.runtime.media.log_mel import audio_tokens, chunk_mel, log_mel
from omniport.runtime.pipeline import whole_reply
from omniport.runtime.prompt.builder import Prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.system.files import scratch_folder

from ...evaluation.conversations import Conversation, standard_conversations
from ...evaluation.probe import PROBE
from ...models.signals import RATE, generator, picture, voice
from ..comparison import array_check, equal_check
from ..context import Context
from ..reference_inputs import Inputs, Processor, open_processor
from ..types import Check

#: seconds of sound: less than one chunk, exactly one, and several with a partial last one
_SECONDS = (0.31, 2.0, 4.33)
#: height and width of pictures: small, square, ragged windows, and beyond the largest size that is kept
_PICTURES = ((28, 28), (112, 112), (97, 201), (230, 170))
_LARGE = (600, 700)


def preprocess_checks(context: Context) -> Iterator[Check]:
    """Log-mel, pixels, window layout and token ids; stage ``preprocess``."""
    processor = open_processor(context.checkpoint, context.bundle.manifest.vision)
    if encoder_of("audio").name in context.bundle.manifest.graphs:
        context.progress("preprocess: sound")
        yield from _mel_checks(context, processor)
    if encoder_of("image").name in context.bundle.manifest.graphs:
        context.progress("preprocess: pictures")
        yield from _picture_checks(context, processor)
    context.progress("preprocess: token ids")
    yield from _text_checks(context, processor)
    yield from _conversation_checks(context, processor, "preprocess")


def position_checks(context: Context) -> Iterator[Check]:
    """TMRoPE positions of prompts of every modality, and of the reply's first token; stage ``positions``."""
    context.progress("positions")
    yield from _conversation_checks(
        context, open_processor(context.checkpoint, context.bundle.manifest.vision), "positions"
    )


def _text_checks(context: Context, processor: Processor) -> Iterator[Check]:
    """A wide text with every added token but those that frame a message: nobody can write these."""
    codec, reference = _codec(context), processor.tokenizer
    framing = set(msgspec.structs.asdict(context.bundle.manifest.tokens).values())
    added = [token.content for i, token in sorted(reference.added_tokens_decoder.items()) if i not in framing]
    for name, text in {"a wide text": PROBE, "added tokens": f"a{'b  '.join(added)} {''.join(added)}"}.items():
        ids, wanted = codec.encode(text), reference(text, add_special_tokens=False).input_ids
        yield equal_check("preprocess", f"{name}: token ids", np.asarray(ids, np.int64), np.asarray(wanted, np.int64))
        texts = (codec.decode(ids), reference.decode(wanted, skip_special_tokens=True))
        back = [np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64) for text in texts]
        yield equal_check("preprocess", f"{name}: read back", *back)


def _codec(context: Context) -> TextCodec:
    manifest = context.bundle.manifest
    return TextCodec.from_file(context.bundle.path(manifest.tokenizer_file), manifest.tokens)


def _conversation_checks(context: Context, processor: Processor, stage: str) -> Iterator[Check]:
    with scratch_folder() as folder:
        for conversation in standard_conversations(folder):
            for check in prompt_checks(context, conversation, processor.prompt(conversation)):
                if check.stage == stage:
                    yield check


def prompt_checks(context: Context, conversation: Conversation, inputs: Inputs) -> Iterator[Check]:
    """One conversation's token ids (stage ``preprocess``) and positions (stage ``positions``)."""
    try:
        prompt = laid_out(context, conversation)
    except OmniportError as error:
        refused = Check.not_run if isinstance(error, PromptTooLong) else Check.failed
        for stage, what in (("preprocess", "token ids"), ("positions", "prompt")):
            yield refused(stage, f"{conversation.name}: {what}", str(error))
        return
    yield equal_check("preprocess", f"{conversation.name}: token ids", prompt.token_ids, inputs.token_ids)
    got, wanted = prompt.position_ids, inputs.positions
    yield equal_check(
        "positions",
        f"{conversation.name}: prompt",
        np.concatenate([got, np.full((3, 1), prompt.next_position)], axis=1),
        np.concatenate([wanted, np.full((3, 1), inputs.next_position)], axis=1),
    )


def laid_out(context: Context, conversation: Conversation) -> Prompt:
    """The prompt as a session makes it."""
    manifest, codec = context.bundle.manifest, _codec(context)
    # through a reply's own name, so that what is checked is what replies
    return whole_reply.build_prompt(conversation.messages(), manifest, codec)  # type: ignore[attr-defined]


def _mel_checks(context: Context, processor: Processor) -> Iterator[Check]:
    frontend = context.bundle.manifest.audio
    clips = {f"{seconds:g} s of voice": voice(seconds) for seconds in _SECONDS}
    clips["1 s of noise"] = (0.1 * generator("mel noise").standard_normal(RATE)).astype(np.float32)
    for name, samples in clips.items():
        chunks, frames = chunk_mel(log_mel(load_audio((samples, RATE), frontend.sampling_rate), frontend), frontend)
        got = np.concatenate([chunk[:, :count] for chunk, count in zip(chunks, frames, strict=True)], axis=1)
        mel, mask = processor.mel(samples)
        wanted = mel[0][:, mask[0].bool()].numpy()
        yield array_check("preprocess", f"log-mel, {name}", got, wanted, rule="preprocess.rel_rms")
    from transformers.models.qwen2_5_omni import processing_qwen2_5_omni as processing

    counts = np.arange(3, 1201)
    ours = np.asarray([audio_tokens(int(count)) for count in counts], np.int64)
    lengths: Any = processing._get_feat_extract_output_lengths
    theirs = lengths(torch.from_numpy(counts)).numpy()
    yield equal_check("preprocess", "audio tokens of 3 to 1200 mel frames", ours, theirs)


def _picture_checks(context: Context, processor: Processor) -> Iterator[Check]:
    frontend = context.bundle.manifest.vision
    sizes = [*_PICTURES, _LARGE] if context.full else _PICTURES
    for height, width in sizes:
        pixels = picture(height, width)
        vision = image_input(load_image(pixels), frontend)
        patches, grid = processor.still(pixels)
        yield from _vision_checks(f"picture {height}x{width}", vision, patches, grid, processor)
    frames = np.stack([picture(84, 112, shift / 5) for shift in range(5)])
    yield from _vision_checks("5 frames of 84x112", video_input(frames, frontend), *processor.clip(frames), processor)


def _vision_checks(
    name: str, vision: VisionInput, patches: torch.Tensor, grid: Sequence[int], processor: Processor
) -> Iterator[Check]:
    """Pixels, grid, 2-D positions of patches, and windows of one medium."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    got = vision.patches.reshape(-1, vision.patches.shape[-1])
    yield array_check("preprocess", f"pixels, {name}", got, patches.numpy(), rule="preprocess.rel_rms")
    yield equal_check("preprocess", f"grid, {name}", np.asarray(vision.grid_thw), np.asarray(grid))
    config = processor.config.vision_config
    merge, window, patch = config.spatial_merge_size, config.window_size, config.patch_size
    frame = torch.tensor([[1, *grid[1:]]])  # windows and positions repeat from frame to frame
    places = get_vision_position_ids(frame, merge).numpy()
    yield equal_check("preprocess", f"patch positions, {name}", vision.grid_hw, places)
    units, bounds = get_vision_window_index(frame, merge, window, patch)
    order = (units.numpy()[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)
    valid = vision.window_valid
    index = vision.window_index.reshape(valid.shape)
    ours = np.concatenate([index[valid], np.cumsum(valid.sum(axis=1))])
    yield equal_check("preprocess", f"windows, {name}", ours, np.concatenate([order, bounds.numpy()[1:]]))
