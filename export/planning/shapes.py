"""Models of a plan: the weights of every graph, and how often each is multiplied.

The shapes come from a checkpoint's config.json, from the files of a bundle, or from the published sizes; no weight is
read and neither torch nor transformers is imported. Tests hold the counts to those of exported graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omniport.runtime.bundle.manifest import DecoderGeometry, DitGeometry, SolverSpec
from omniport.runtime.bundle.parts import speech_parts
from omniport.runtime.bundle.reader import MANIFEST_FILE, Bundle
from omniport.runtime.errors import CheckpointError, UsageError
from omniport.runtime.speech.ode import rk4_schedule
from omniport.runtime.speech.solver_choice import candidates, evaluations, name_of

from ..checkpoint.config import normalise_config, read_json, whole_config
from ..synthetic.geometries import SIZES, geometry_config
from .weights import GraphShape, Matrix

#: sizes that need no files
PUBLISHED = ("3b", "7b")
#: widths of a head in the encoders and the DiT, which a bundle does not say
_VISION_HEAD, _AUDIO_HEAD = 80, 64


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of thinker or talker, beyond its matrices."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    ffn: int
    vocabulary: int
    input_width: int

    def cache_elements(self, context: int) -> int:
        """Keys and values of all layers for that many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        embedding_bytes: of the token tables, by decoder; they stay in mapped files.
        max_context: positions that it was trained on, or that a bundle was exported for.
        solvers: evaluations of the DiT for one window of speech, by the names of the solvers that ``auto`` chooses
            from, the most exact first.
        kv: form of a bundle's KV caches, ``static`` or ``concat``; empty before an export, which chooses it.
        dit: what windows of speech are made of.
    """

    name: str
    graphs: Mapping[str, GraphShape]
    decoders: Mapping[str, DecoderShape]
    embedding_bytes: Mapping[str, int]
    max_context: int
    solvers: Mapping[str, int] = field(default_factory=lambda: _solvers(rk4_schedule()))
    kv: str = ""
    dit: DitGeometry = field(default_factory=DitGeometry)

    @property
    def speaks(self) -> bool:
        """Whether it has a voice."""
        return all(part.name in self.graphs for part in speech_parts())


def find_model(name: str) -> ModelShape:
    """The shapes of ``3b``, ``7b``, a checkpoint's folder or a bundle's.

    Raises:
        UsageError: nothing of that name.
        CheckpointError, BundleError: a checkpoint or bundle that cannot be read.
    """
    path = Path(name)
    if name in PUBLISHED and not path.exists():
        return shape_of_config(geometry_config(SIZES[name]), f"Qwen2.5-Omni-{name.upper()}")
    if (path / MANIFEST_FILE).exists():
        return shape_of_bundle(Bundle.open(path))
    if (path / "config.json").exists():
        return shape_of_config(read_json(path / "config.json"), path.name)
    what = "holds neither bundle.json nor config.json" if path.is_dir() else "is no folder"
    raise UsageError(f"{name} {what}: give a bundle, a checkpoint's folder, or one of {', '.join(PUBLISHED)}")


# --- from config.json ----------------------------------------------------------------------------------------


def shape_of_config(raw: Mapping[str, Any], name: str) -> ModelShape:
    """The shapes that a config.json states.

    Raises:
        CheckpointError: not the configuration of a Qwen2.5-Omni model.
    """
    raw = whole_config(raw)
    if raw.get("model_type") != "qwen2_5_omni":
        raise CheckpointError(f"{name}: config.json describes {raw.get('model_type')!r}; 'qwen2_5_omni' was expected")
    config = normalise_config(raw)
    try:
        return _from_config(config, name)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: config.json lacks {error}, or has it in another type; download the file again"
        ) from error


def _from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    thinker = config["thinker_config"]
    text = thinker["text_config"]
    decoders = {"thinker": _decoder_of_config(text, int(text["hidden_size"]))}
    graphs = [_audio(thinker["audio_config"], text), _vision(thinker["vision_config"], text)]
    if config.get("enable_audio_output", True):
        talker = config["talker_config"]
        decoders["talker"] = _decoder_of_config(talker, int(talker["embedding_size"]))
        token2wav = config["token2wav_config"]
        graphs += [_dit(token2wav["dit_config"]), _vocoder(token2wav["bigvgan_config"])]
    graphs += [decoder_graph(part, shape) for part, shape in decoders.items()]
    return ModelShape(
        name=name,
        graphs={graph.name: graph for graph in graphs},
        decoders=decoders,
        embedding_bytes={part: 2 * d.vocabulary * d.input_width for part, d in decoders.items()},
        max_context=int(text.get("max_position_embeddings", 32768)),
        dit=_windows(config.get("token2wav_config", {}).get("dit_config")),
    )


def _decoder_of_config(c: Mapping[str, Any], input_width: int) -> DecoderShape:
    heads = int(c["num_attention_heads"])
    return DecoderShape(
        layers=int(c["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(c["num_key_value_heads"]),
        head_dim=int(c.get("head_dim") or c["hidden_size"] // heads),
        width=int(c["hidden_size"]),
        ffn=int(c["intermediate_size"]),
        vocabulary=int(c["vocab_size"]),
        input_width=input_width,
    )


def decoder_graph(name: str, d: DecoderShape) -> GraphShape:
    """The weights of thinker or talker."""
    inner, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    layer = (
        Matrix("self_attn.q_proj", d.width, inner),
        Matrix("self_attn.k_proj", d.width, kv, 2),
        Matrix("self_attn.o_proj", inner, d.width),
        Matrix("mlp.up_proj", d.width, d.ffn, 2),
        Matrix("mlp.down_proj", d.ffn, d.width),
    )
    matrices = [
        # some recipes treat the first layer otherwise
        *(replace(m, name=f"model.layers.0.{m.name}") for m in layer),
        *(replace(m, name=f"model.layers.1.{m.name}", count=m.count * (d.layers - 1)) for m in layer if d.layers > 1),
        # logits are for the last token alone
        Matrix("head", d.width, d.vocabulary, steps=0.0),
    ]
    if d.input_width != d.width or name == "talker":
        matrices.append(Matrix("thinker_to_talker_proj", d.input_width, d.width))
    vectors = d.layers * (inner + 2 * kv + 2 * d.width) + d.width
    return GraphShape(name, tuple(matrices), other=vectors, width=d.width, ffn=d.ffn, heads=d.heads)


def _audio(c: Mapping[str, Any], text: Mapping[str, Any]) -> GraphShape:
    width, ffn, layers = int(c["d_model"]), int(c["encoder_ffn_dim"]), int(c["encoder_layers"])
    mels, frames = int(c.get("num_mel_bins", 128)), 2 * int(c.get("n_window", 100))
    matrices = (
        # rows are mel frames: the second convolution halves their number, and so does pooling before the last product
        Matrix("conv1", mels * 3, width, convolves=True),
        Matrix("conv2", width * 3, width, steps=0.5, convolves=True),
        Matrix("self_attn", width, width, 4 * layers, 0.5),
        Matrix("fc1", width, ffn, layers, 0.5),
        Matrix("fc2", ffn, width, layers, 0.5),
        Matrix("proj", width, int(c.get("output_dim", text["hidden_size"])), steps=0.25),
    )
    other = frames // 2 * width + layers * (8 * width + ffn) + 6 * width
    return GraphShape("audio_encoder", matrices, other, 0, width, ffn, int(c["encoder_attention_heads"]))


def _vision(c: Mapping[str, Any], text: Mapping[str, Any]) -> GraphShape:
    width, ffn, layers = int(c["hidden_size"]), int(c["intermediate_size"]), int(c["depth"])
    patch = int(c.get("in_channels", 3)) * int(c.get("temporal_patch_size", 2)) * int(c.get("patch_size", 14)) ** 2
    merged = width * int(c.get("spatial_merge_size", 2)) ** 2
    matrices = (
        Matrix("patch_embed", patch, width),
        Matrix("attn", width, width, 4 * layers),
        Matrix("mlp.up_proj", width, ffn, 2 * layers),
        Matrix("mlp.down_proj", ffn, width, layers),
        Matrix("merger.0", merged, merged, steps=0.25),
        Matrix("merger.2", merged, int(c.get("out_hidden_size", text["hidden_size"])), steps=0.25),
    )
    other = layers * (7 * width + 2 * ffn) + 2 * merged
    return GraphShape("vision_encoder", matrices, other, 0, width, ffn, int(c["num_heads"]))


def _dit(c: Mapping[str, Any]) -> GraphShape:
    width, layers, mult = int(c["hidden_size"]), int(c["num_hidden_layers"]), int(c.get("ff_mult", 2))
    heads, mel = int(c["num_attention_heads"]), int(c.get("mel_dim", 80))
    inner, codes = heads * int(c.get("head_dim", 64)), int(c["emb_dim"])
    inputs = mel + int(c.get("enc_dim", 128)) + int(c.get("enc_emb_dim", 192)) + codes
    # rows are mel frames; guidance doubles them
    matrices = (
        Matrix("input_embed", inputs, width, steps=2),
        Matrix("attn.to_q", width, inner, 3 * layers, 2),
        Matrix("attn.to_out", inner, width, layers, 2),
        Matrix("ff.0", width, mult * width, layers, 2),
        Matrix("ff.3", mult * width, width, layers, 2),
        Matrix("proj_out", width, mel, steps=2),
    )
    table = (int(c.get("num_embeds", 8193)) + 1) * codes
    vectors = layers * (3 * inner + (2 + mult) * width) + width + mel
    # modulations at every time point of the solver
    fixed = len(rk4_schedule().table) * (6 * layers + 2) * width
    return GraphShape("dit", matrices, table + vectors, fixed, width, mult * width, heads)


def _windows(c: Mapping[str, Any] | None) -> DitGeometry:
    """What an export says of windows of speech."""
    if c is None or "num_attention_heads" not in c:  # a thinker alone
        return DitGeometry()
    layers = tuple(sorted(map(int, c.get("look_backward_layers", (0, 20)))))
    return DitGeometry(past_layers=layers, past_width=int(c["num_attention_heads"]) * int(c.get("head_dim", 64)))


def _vocoder(c: Mapping[str, Any]) -> GraphShape:
    channels, mel = int(c["upsample_initial_channel"]), int(c.get("mel_dim", 80))
    kernels, dilations = c["resblock_kernel_sizes"], c["resblock_dilation_sizes"]
    matrices = [Matrix("conv_pre", mel * 7, channels, convolves=True)]
    other, rate, width = channels, 1, channels
    for stride, kernel in zip(c["upsample_rates"], c["upsample_kernel_sizes"], strict=True):
        matrices.append(Matrix("ups", width * kernel, width // 2, steps=rate, convolves=True))
        width, rate = width // 2, rate * stride
        for size, times in zip(kernels, dilations, strict=True):
            name = "resblocks.convs1.0"
            matrices.append(Matrix(name, width * size, width, 2 * len(times), rate, convolves=True))
        layers = 2 * sum(len(times) for times in dilations)
        # a bias, two filters of 7 taps for two phases, and two vectors
        other += width + layers * width * (1 + 28 + 2)
    matrices.append(Matrix("conv_post", width * 7, 1, steps=rate, convolves=True))
    return GraphShape("bigvgan", tuple(matrices), other + 30 * width, 0, channels, channels, 1)


# --- from a bundle -------------------------------------------------------------------------------------------


def _solvers(spec: SolverSpec) -> dict[str, int]:
    return {name_of(each): evaluations(each) for each in candidates(spec, "auto", True)}


def shape_of_bundle(bundle: Bundle) -> ModelShape:
    """The shapes of a bundle's graphs.

    Raises:
        BundleError: a graph that cannot be read.
    """
    manifest = bundle.manifest
    decoders = {n: _decoder_of_manifest(g) for n, g in manifest.decoders.items() if n in manifest.graphs}
    graphs = {name: decoder_graph(name, shape) for name, shape in decoders.items()}
    for name in manifest.graphs:
        if name not in graphs:
            graphs[name] = _graph_of_file(bundle, name)
    solver = manifest.solver
    return ModelShape(
        name=bundle.root.name,
        graphs=graphs,
        decoders=decoders,
        embedding_bytes={name: manifest.files[g.embedding_file].size for name, g in manifest.decoders.items()},
        max_context=manifest.kv.max_context,
        solvers={} if solver is None else _solvers(solver),
        kv=manifest.kv.form,
        dit=manifest.dit or DitGeometry(),
    )


def _decoder_of_manifest(g: DecoderGeometry) -> DecoderShape:
    return DecoderShape(
        g.num_layers,
        g.num_heads,
        g.num_kv_heads,
        g.head_dim,
        g.hidden_size,
        g.intermediate_size,
        g.vocab_size,
        g.embedding_size,
    )


def _graph_of_file(bundle: Bundle, name: str) -> GraphShape:
    """A graph that is no decoder, from the shapes of its initializers."""
    from ..tensorrt.onnx_file import open_onnx

    weights = open_onnx(bundle.path(bundle.manifest.graphs[name].file)).operands()
    matrices, other, fixed = [], 0, 0
    half = bundle.manifest.graphs[name].compute_dtype != "float32"
    levels = _levels(weights)
    for weight in weights:
        dims = weight.dims
        if weight.operator == "MatMul" and len(dims) == 2:
            matrices.append(Matrix(weight.name, dims[0], dims[1], steps=_STEPS.get(name, 1.0)))
        elif weight.operator == "Conv" and len(dims) in (3, 4) and dims[1] > 2:  # others are filters of single channels
            steps = levels.get(dims[0], levels[1])
            matrices.append(Matrix(weight.name, math.prod(dims[1:]), dims[0], steps=steps, convolves=True))
        elif weight.operator == "ConvTranspose" and len(dims) == 3:
            matrices.append(Matrix(weight.name, dims[0] * dims[2], dims[1], steps=levels[dims[0]], convolves=True))
        elif half and weight.single:
            fixed += math.prod(dims)
        elif not weight.scale:
            other += math.prod(dims)
    width = matrices[0].n if matrices else 0
    ffn = max((m.n for m in matrices if m.k == width), default=width)
    head = {"vision_encoder": _VISION_HEAD, "audio_encoder": _AUDIO_HEAD}.get(name, _AUDIO_HEAD)
    return GraphShape(name, tuple(matrices), other, fixed, width, ffn, max(1, width // head))


#: rows of a layer for one row of the graph: the audio encoder halves mel frames, guidance doubles the DiT's
_STEPS: Mapping[str, float] = {"audio_encoder": 0.5, "dit": 2.0}


def _levels(weights: Iterable[Any]) -> dict[int, float]:
    """Channels -> samples a mel frame at which a vocoder's convolutions of that width run; 1 where nothing is known."""
    levels: dict[int, float] = {}
    rate = 1.0
    for weight in weights:
        if weight.operator == "ConvTranspose" and len(weight.dims) == 3:
            levels.setdefault(weight.dims[0], rate)
            rate *= weight.stride
            levels[weight.dims[1]] = rate
    return {1: rate} | levels
