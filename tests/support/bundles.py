"""A tiny bundle folder made by hand: right in every field, with stand-ins for the graph files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.manifest import (
    AudioFrontend,
    ChatSpec,
    CodecTokens,
    DecoderGeometry,
    DitGeometry,
    FileRecord,
    KvSpec,
    Manifest,
    SamplingConfig,
    Source,
    SpecialTokens,
    TextTokens,
    VisionFrontend,
    VocoderGeometry,
    VoiceSpec,
)
from omniport.runtime.speech.ode import rk4_schedule
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROLS = {
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
}
VOCABULARY = 280
WIDTH = 16
CODES = 48  # below this: sound


def tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: one token a byte, then the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(content, special=True) for content in CONTROLS.values()])
    return made


def decoder(embedding_file: str, dtype: str, vocabulary: int, width: int = WIDTH) -> DecoderGeometry:
    return DecoderGeometry(
        hidden_size=width,
        embedding_size=WIDTH,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
        vocab_size=vocabulary,
        rope_theta=1e6,
        mrope_section=(2, 1, 1),
        rms_norm_eps=1e-6,
        embedding_file=embedding_file,
        embedding_dtype=dtype,
    )


def make_manifest(speak: bool = True, max_context: int = 2048) -> Manifest:
    """Every field but ``files``."""
    made = tokenizer()
    ids = {name: made.token_to_id(content) for name, content in CONTROLS.items()}
    graphs = ["audio_encoder", "vision_encoder", "thinker"] + (["talker", "dit", "bigvgan"] if speak else [])
    speech: dict[str, Any] = {}
    if speak:
        speech = {
            "talker": decoder("talker_embedding.npy", "float32", 64, width=12),
            "talker_sampling": SamplingConfig(
                max_new_tokens=40, temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05
            ),
            "text_tokens": TextTokens(bos=270, eos=271, pad=272),
            "codec": CodecTokens(
                pad=50, bos=51, eos=52, mask=53, stop=(50, 52), suppress=(51, *range(CODES, 50), *range(53, 64))
            ),
            "dit": DitGeometry(num_embeds=CODES, speaker_dim=6, reference_dim=5),
            "vocoder": VocoderGeometry(),
            "solver": rk4_schedule(),
            "voices": (
                VoiceSpec(name="Ethan", bos_token=273, file="voices/Ethan.npz"),
                VoiceSpec(name="Chelsie", bos_token=274, file="voices/Chelsie.npz"),
            ),
        }
    return Manifest(
        created_by="tests",
        source=Source(name="tiny", fingerprint="0" * 64),
        precision="fp32",
        audio=AudioFrontend(),
        vision=VisionFrontend(
            image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25), min_pixels=56 * 56, max_pixels=112 * 112
        ),
        tokens=SpecialTokens(**ids),
        chat=ChatSpec(system_prompt="You are Qwen.", stop=(ids["im_end"], ids["endoftext"])),
        thinker=decoder("thinker_embedding.npy", "bfloat16", VOCABULARY),
        thinker_sampling=SamplingConfig(max_new_tokens=8),
        kv=KvSpec(form="static", dtype="float32", max_context=max_context),
        graphs={
            name: GraphSpec(
                name=name,
                file=f"graphs/{name}.onnx",
                data=(f"graphs/{name}.data",),
                precision="float32",
                opset=24,
                inputs=(),
                outputs=(),
                dims={},
            )
            for name in graphs
        },
        files={},
        **speech,
    )


def stand_in(name: str) -> bytes:
    """An ONNX file of a graph that has a name and nothing else."""
    graph = b"\x12" + bytes([len(name)]) + name.encode()
    return b"\x08\x0b\x3a" + bytes([len(graph)]) + graph


def make_bundle(root: Path, speak: bool = True, max_context: int = 2048) -> Path:
    """Write the bundle folder ``root``."""
    manifest = make_manifest(speak, max_context)
    rng = np.random.default_rng(0)
    (root / "graphs").mkdir(parents=True)
    (root / "voices").mkdir()
    tokenizer().save(str(root / "tokenizer.json"))
    table = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    np.save(root / "thinker_embedding.npy", (table.view(np.uint32) >> 16).astype(np.uint16))
    if manifest.talker is not None:
        np.save(root / "talker_embedding.npy", rng.standard_normal((64, WIDTH)).astype(np.float32))
    for voice in manifest.voices:
        vectors = {"speaker": rng.standard_normal(6), "reference": rng.standard_normal(5)}
        np.savez(root / voice.file, **{k: v.astype(np.float32) for k, v in vectors.items()})
    for graph in manifest.graphs.values():
        (root / graph.file).write_bytes(stand_in(graph.name))
        (root / graph.data[0]).write_bytes(b"weights")
    write_manifest(root, manifest)
    return root


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write bundle.json, listing every file there is but engines, which have a listing of their own."""
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name != "bundle.json" and not name.startswith("engines/"):
            data = path.read_bytes()
            files[name] = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = msgspec.structs.replace(manifest, files=files)
    (root / "bundle.json").write_bytes(msgspec.json.encode(manifest))


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json as a plain object."""
    path = root / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
