"""bundle.json: everything the runtime needs to know about an exported model.

The format is written down in docs/bundle.md. Unknown fields are refused, never dropped.
"""

from __future__ import annotations

import msgspec

from .graph_spec import GraphSpec
from .parts import PARTS, speech_parts

SCHEMA_VERSION = 3

#: forms of the KV cache (`KvSpec.form`)
KV_FORMS = ("static", "concat")


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the bundle came from."""

    name: str
    """Checkpoint folder name or hub id."""
    fingerprint: str
    """sha256 over config.json, every weight file's header and size, and 64 bytes of each tensor."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Size in bytes and sha256 of one file of the bundle."""

    size: int
    sha256: str


class AudioFrontend(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Log-mel front end (Whisper feature extraction) and audio encoder chunking."""

    sampling_rate: int = 16000
    n_fft: int = 400
    hop_length: int = 160
    n_mels: int = 128
    chunk_frames: int = 200
    """mel frames of one encoder chunk (2 s)"""
    chunk_tokens: int = 50
    """embeddings of one full chunk"""
    max_seconds: float = 300.0
    """longest clip the reference processor takes (chunk_length of preprocessor_config.json)"""


class VisionFrontend(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Image and video preprocessing and window geometry."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112
    """attention window in pixels"""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    video_fps: float = 2.0
    video_max_frames: int = 768


class SpecialTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ids of the control tokens in the thinker's vocabulary. No id is ever hard-coded."""

    endoftext: int
    im_start: int
    im_end: int
    audio: int
    audio_bos: int
    audio_eos: int
    vision_bos: int
    vision_eos: int
    image: int
    video: int


class TextTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Thinker-vocabulary ids that condition the talker."""

    bos: int
    eos: int
    pad: int


class CodecTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ids in the talker's vocabulary."""

    pad: int
    bos: int
    eos: int
    mask: int
    stop: tuple[int, ...]
    """sampling one of these ends the speech"""
    suppress: tuple[int, ...]
    """never sampled"""


class DecoderGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder stack (thinker or talker)."""

    hidden_size: int
    embedding_size: int
    """width of inputs_embeds: hidden_size for the thinker, the thinker's width for the talker"""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    rms_norm_eps: float
    embedding_file: str
    """token embedding table, .npy [vocab_size, embedding_size], float32, float16, or uint16 holding bfloat16"""
    embedding_dtype: str


class KvSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """KV cache form: ``static`` (fixed capacity, updated in place) or ``concat`` (each call returns a longer one)."""

    form: str
    dtype: str
    max_context: int
    """capacity in tokens that export was asked for"""


class DitGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flow-matching DiT."""

    mel_dim: int = 80
    repeats: int = 2
    """mel frames per codec token"""
    block_size: int = 24
    """attention block, mel frames"""
    look_back_blocks: int = 2
    look_ahead_blocks: int = 1
    num_embeds: int = 8193
    """codec tokens below this id are sound"""
    speaker_dim: int = 192
    reference_dim: int = 128
    codec_hz: float = 50.0
    past_layers: tuple[int, ...] = ()
    """layers that look back, whose keys and values for the block before the first are inputs; none before version 3"""
    past_width: int = 1024
    """width of those keys and values"""

    @property
    def past_names(self) -> tuple[str, ...]:
        """What the graph's inputs ``past_NAME`` and outputs ``present_NAME`` are called."""
        return tuple(f"{part}_{layer}" for layer in self.past_layers for part in ("key", "value"))

    @property
    def block_codes(self) -> int:
        """Codec tokens of one attention block."""
        return self.block_size // self.repeats

    @property
    def look_back_codes(self) -> int:
        """Codec tokens before a block that its attention sees."""
        return self.block_codes * self.look_back_blocks

    @property
    def look_ahead_codes(self) -> int:
        """Codec tokens after a block that its attention sees."""
        return self.block_codes * self.look_ahead_blocks


class VocoderGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """BigVGAN."""

    sample_rate: int = 24000
    hop: int = 240
    """samples per mel frame"""
    context_frames: int = 34
    """mel frames each side that a sample can depend on"""


class SolverSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ODE schedule that the DiT graph's modulation table was folded for.

    ``grid`` holds the interval ends; ``table`` every time at which the velocity can be evaluated: the graph's ``step``
    input is an index into it. ``stages[i]`` are the table indices of interval i's evaluations, in order.
    """

    method: str
    grid: tuple[float, ...]
    table: tuple[float, ...]
    stages: tuple[tuple[int, ...], ...]
    guidance_scale: float
    sway: float


class SamplingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the next token is picked.

    ``temperature=0`` (or ``top_k=1``) is greedy. ``top_k=0`` and ``top_p=1`` switch those filters off.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class ChatSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ChatML texts."""

    system_prompt: str
    """put in when the messages hold no system message; the talker was trained with it"""
    stop: tuple[int, ...]
    """thinker ids that end the reply"""


class VoiceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One voice: its text-bos token and the file that holds its vectors.

    The .npz holds ``speaker`` float32 [192] (conditioning) and ``reference`` float32 [128] (ECAPA vector).
    """

    name: str
    bos_token: int
    file: str


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How this bundle came to be quantized."""

    recipe: str
    precision: str
    """of the bundle that was quantized: fp32, fp16 or bf16"""
    calibration: str = ""
    """sha256 of the calibration file; empty if none was used"""
    keep: tuple[str, ...] = ()
    """patterns of weights that were kept as they were"""
    graph_recipes: dict[str, str] = {}
    """graph -> what it was given instead of what the recipe says"""
    layers: dict[str, dict[str, str]]
    """graph -> weight -> scheme, ``none`` for one that could have been quantized and was not"""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """bundle.json."""

    format: str = "omniport-bundle"
    schema_version: int = SCHEMA_VERSION
    created_by: str
    source: Source
    precision: str
    audio: AudioFrontend
    vision: VisionFrontend
    tokens: SpecialTokens
    chat: ChatSpec
    position_id_per_seconds: int = 25
    seconds_per_chunk: float = 2.0
    thinker: DecoderGeometry
    thinker_sampling: SamplingConfig
    kv: KvSpec
    talker: DecoderGeometry | None = None
    talker_sampling: SamplingConfig | None = None
    text_tokens: TextTokens | None = None
    codec: CodecTokens | None = None
    dit: DitGeometry | None = None
    vocoder: VocoderGeometry | None = None
    solver: SolverSpec | None = None
    voices: tuple[VoiceSpec, ...] = ()
    graphs: dict[str, GraphSpec]
    tokenizer_file: str = "tokenizer.json"
    ranges_file: str | None = None
    quantization: Quantization | None = None
    files: dict[str, FileRecord]

    @property
    def decoders(self) -> dict[str, DecoderGeometry]:
        """The language models that the model has, by name; the first writes the reply."""
        found = {name: getattr(self, name, None) for name, part in PARTS.items() if part.decodes}
        return {name: geometry for name, geometry in found.items() if geometry is not None}

    @property
    def speaks(self) -> bool:
        """Whether every graph that speech takes is there."""
        return all(part.name in self.graphs for part in speech_parts())


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of bundle.json."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
