"""Test signals for both sides of a comparison, made from formulas and the checkpoint's embeddings."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.parts import PARTS, decoders
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec

from .part import Subject

RATE = 16000

Floats = NDArray[np.float32]


def generator(name: str) -> np.random.Generator:
    """Random numbers that belong to a case, so that adding a case changes no other."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def voice(seconds: float) -> Floats:
    """Voice-like sound, [n] at 16 kHz: harmonics of a gliding pitch through two moving formants, in syllables."""
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 130 + 30 * np.sin(2.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = (550 + 250 * np.sin(5.1 * time), 1600 + 500 * np.sin(3.7 * time + 1))
    wave = np.zeros_like(time)
    for k in range(1, 28):
        gain = sum(np.exp(-(((k * pitch - centre) / 180) ** 2)) for centre in formants)
        wave += (gain + 0.02) * np.sin(k * phase) / np.sqrt(k)
    wave *= np.clip(np.sin(2 * np.pi * 3.1 * time + 0.6), 0.02, 1)
    return np.asarray(0.5 * wave / np.abs(wave).max(), np.float32)


def picture(height: int, width: int, shift: float = 0.0) -> NDArray[np.uint8]:
    """A drawn picture [height, width, 3]: sky, striped ground, a disc that ``shift`` (0..1) moves, a dark square."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = y / height, x / width
    sky = np.stack([130 + 90 * y, 170 + 60 * y, 250 - 20 * y], -1)
    stripes = 60 + 50 * (np.sin(40 * x + 25 * y) > 0)
    ground = np.stack([stripes * 0.9, stripes + 60, stripes * 0.5], -1)
    image = np.where((y > 0.65)[..., None], ground, sky)
    image[(x - 0.2 - 0.6 * shift) ** 2 + (y - 0.3) ** 2 < 0.02] = (230, 60, 40)
    image[(np.abs(x - 0.6) < 0.12) & (np.abs(y - 0.6) < 0.15)] = (30, 40, 90)
    return np.clip(image, 0, 255).astype(np.uint8)


def random_positions(length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Three unequal, growing components, as multimodal prompts have: [3, length]."""
    return np.cumsum(rng.integers(0, 3, (3, length)), axis=-1).astype(np.int64)


def random_tokens(bundle: Bundle, part: str, length: int, rng: np.random.Generator) -> Floats:
    """Embeddings [length, width] of random tokens of a decoder. Tables are alike in bundles of any precision."""
    table = bundle.embedding(part)
    return table.rows(rng.integers(0, table.vocab_size, length))


def prompt_inputs(subject: Subject, graph: str) -> tuple[Floats, NDArray[np.int64]]:
    """Embeddings [S, E] and positions [3, S] of a prompt with text, a picture and a question spoken by `voice`.

    Media rows are random with the energy of the text's. The talker's rows have a random hidden state added to the
    text's embedding, as its conditioning has.
    """
    manifest = subject.bundle.manifest
    codec = TextCodec.from_file(subject.bundle.path(manifest.tokenizer_file), manifest.tokens)
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": "Look at this picture, please. 请看这张图。"},
        {"type": "image", "image": picture(140, 112)},
        {"type": "audio", "audio": (voice(1.7), RATE)},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": parts},
    ]
    prompt = build_prompt(messages, manifest, codec)
    rng, mask = generator("prompt"), prompt.media_mask
    rows = subject.bundle.embedding(decoders()[0].name).rows(prompt.token_ids)
    noise = rng.standard_normal(rows.shape).astype(np.float32)
    if PARTS[graph].speaks:
        rows = np.where(mask[:, None], 0, rows) + noise
    else:
        rows[mask] = noise[mask] * float(np.sqrt(np.mean(rows[~mask] ** 2)))
    return rows.astype(np.float32), prompt.position_ids
