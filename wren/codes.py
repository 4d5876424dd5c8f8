"""Codes: 50 a second, each one of 1,024 typical pairs of mel frames of either voice (k-means).

The k-means sees the 48 strongest components of the pairs, so that it spends its centres on what differs between sounds
and not on noise. ``encode`` is how every sentence becomes what the talker learns to say.

    python -m wren.codes [--work DIR]      makes the codebook where there is none, and codes of what is spoken since
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wren import corpus, sizes

COMPONENTS = 48
ROUNDS, LAST_ROUNDS = 20, 5
SAMPLE = 80  # pairs a centre, in all but the last rounds


def pairs(mel: Tensor) -> Tensor:
    """[n, 80] -> [n / 2, 160]"""
    return mel[: len(mel) // 2 * 2].reshape(-1, sizes.FRAMES_PER_CODE * sizes.MELS)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index int64 [n] of each point's centre, by Euclidean distance."""
    half = (centres**2).sum(1) / 2
    return torch.cat([(half - part @ centres.T).argmin(1) for part in points.split(16384)])


def kmeans(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """Centres [count, width]; a centre that nothing is near to moves to a point drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=draw)[:count]].clone()
    for number in range(ROUNDS + LAST_ROUNDS):
        last = number >= ROUNDS
        some = points if last else points[torch.randperm(len(points), generator=draw)[: SAMPLE * count]]
        near = nearest(some, centres)
        members = torch.bincount(near, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, near, some)
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], centres)
        lonely = (members < 2).nonzero().flatten()
        if not last:
            centres[lonely] = some[torch.randperm(len(some), generator=draw)[: len(lonely)]]
    return centres


def make_codebook(mels: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of codes/codebook.safetensors."""
    points = torch.cat([pairs(mel) for mel in mels])
    mean = points.mean(0)
    spread = (points - mean).T @ (points - mean)
    basis = torch.linalg.eigh(spread).eigenvectors[:, -COMPONENTS:].contiguous()
    centres = kmeans((points - mean) @ basis, sizes.CODES)
    near = nearest((points - mean) @ basis, centres)
    members = torch.bincount(near, minlength=sizes.CODES).clamp(min=1)
    typical = torch.zeros(sizes.CODES, points.shape[1]).index_add_(0, near, points) / members[:, None]
    error = (points - typical[near]).square().mean().sqrt()
    print(f"{len(points)} pairs of frames, mel RMS {error:.3f} of {points.std():.3f}", flush=True)
    return {"mean": mean, "basis": basis, "centres": centres, "mels": typical}


def encode(mel: Tensor, codebook: dict[str, Tensor]) -> Tensor:
    """[n, 80] -> ids int64 [n / 2], as talker and DiT know them."""
    return nearest((pairs(mel) - codebook["mean"]) @ codebook["basis"], codebook["centres"]) + sizes.FIRST_CODE


def decode(codes: Tensor, codebook: dict[str, Tensor]) -> Tensor:
    """ids [n] -> their typical mels [2 n, 80]"""
    return codebook["mels"][codes - sizes.FIRST_CODE].reshape(-1, sizes.MELS)


def blur(said: Tensor, share: float, table: Tensor, draw: np.random.Generator) -> Tensor:
    """Ids [n] with a share of them replaced by similar sounds, as a talker confuses them.

    Args:
        table: what ``neighbours`` gives.
    """
    other = table[said - sizes.FIRST_CODE, torch.from_numpy(draw.integers(table.shape[1], size=len(said)))]
    return torch.where(torch.from_numpy(draw.random(len(said)) < share), other, said)


def neighbours(codebook: dict[str, Tensor], count: int = 8) -> Tensor:
    """Ids [CODES, count] of the sounds that are most like each."""
    distance = torch.cdist(codebook["centres"], codebook["centres"])
    return distance.argsort(1)[:, 1 : count + 1] + sizes.FIRST_CODE


def load(work: Path, voice: str, split: str | None = None) -> dict[str, list[int]]:
    """text -> ids, of every sentence that is encoded (of a split)."""
    index = work / "codes" / f"{voice}.jsonl"
    lines = map(json.loads, index.read_text().splitlines()) if index.exists() else ()
    return {line["text"]: line["codes"] for line in lines if split in (None, line["split"])}


def encode_all(work: Path, voice: str, codebook: dict[str, Tensor]) -> None:
    """Add to codes/VOICE.jsonl what was spoken since."""
    index = work / "codes" / f"{voice}.jsonl"
    done = load(work, voice).keys()
    begin = time.monotonic()
    # written beside it and then moved, so that a run that is stopped leaves no half line
    part = index.with_suffix(".part")
    part.write_bytes(index.read_bytes() if index.exists() else b"")
    with part.open("a") as file:
        for split in ("held_out", "train"):
            for reply in corpus.replies(work, voice, split, skip=done):
                codes = encode(reply.mel, codebook).tolist()
                file.write(json.dumps({"text": reply.text, "split": split, "codes": codes}) + "\n")
    part.replace(index)
    print(f"{voice}: {len(load(work, voice))} sentences encoded, {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.work / "codes").mkdir(parents=True, exist_ok=True)
    path = args.work / "codes" / "codebook.safetensors"
    if not path.exists():
        save_file(make_codebook([r.mel for r in corpus.both_voices(args.work, "train", sizes.SPEECH_REPLIES)]), path)
    for voice in sizes.REPLY_VOICES:
        encode_all(args.work, voice, load_file(path))


if __name__ == "__main__":
    main()
