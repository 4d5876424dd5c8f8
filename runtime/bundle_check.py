"""Whether what a bundle lists can be used: the checks that a session makes when it first needs a file, all at once."""

from __future__ import annotations

from .bundle.activation_ranges import read_ranges
from .bundle.geometry import check_shapes
from .bundle.onnx_scan import check_graph_file
from .bundle.reader import Bundle
from .prompt.tokenizer import TextCodec


def check_usable(bundle: Bundle) -> None:
    """Read the tokenizer, tables and voices, and scan the graphs; nothing is run.

    Raises:
        BundleError: a file is what bundle.json lists, and is refused all the same.
    """
    manifest = bundle.manifest
    check_shapes(manifest, bundle.root)
    for spec in manifest.graphs.values():
        check_graph_file(bundle.path(spec.file), spec)
    TextCodec.from_file(bundle.path(manifest.tokenizer_file), manifest.tokens)
    for name in manifest.decoders:
        bundle.embedding(name)
    for voice in manifest.voices:
        bundle.voice(voice.name)
    if manifest.ranges_file is not None:
        read_ranges(bundle.path(manifest.ranges_file), manifest)
