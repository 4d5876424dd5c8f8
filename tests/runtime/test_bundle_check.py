"""inspect --verify: a file that is as bundle.json lists it and cannot be used fails all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from omniport.runtime.bundle.activation_ranges import Ranges, encode_ranges
from onnx import TensorProto, helper, numpy_helper
from support.bundles import make_bundle, make_manifest, stand_in, write_manifest
from support.command_line import Omniport, refused


def model(**attribute: Any) -> onnx.ModelProto:
    made = onnx.ModelProto.FromString(stand_in("thinker"))
    made.graph.node.append(helper.make_node("Constant", [], ["value"]))
    made.graph.node[0].attribute.append(onnx.AttributeProto(name="value", **attribute))
    return made


def elsewhere(location: str) -> TensorProto:
    tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def sparse() -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.array([3], np.int64), "indices")
    return onnx.SparseTensorProto(values=elsewhere("unlisted.bin"), indices=indices, dims=[8])


def put_graph(made: onnx.ModelProto) -> Callable[[Path], object]:
    return lambda root: (root / "graphs/thinker.onnx").write_bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("doctor", "message"),
    [
        (put_graph(model(sparse_tensor=sparse())), "attribute field 22 is not known to be safe"),
        (put_graph(model(t=elsewhere("unlisted.bin"))), "takes weights from 'unlisted.bin'"),
        (lambda root: (root / "graphs/dit.onnx").write_bytes(b"x"), "not a readable ONNX file"),
        (lambda root: (root / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda root: np.save(root / "talker_embedding.npy", np.zeros((64, 3), np.float32)), "embedding table"),
        (lambda root: (root / "voices/Ethan.npz").write_bytes(b"PK"), "voice 'Ethan'"),
    ],
    ids=["sparse tensor", "unlisted weights", "no graph", "tokenizer", "embedding table", "voice"],
)
def test_verify_fails_what_cannot_be_used(
    tmp_path: Path, omniport: Omniport, doctor: Callable[[Path], object], message: str
) -> None:
    root = make_bundle(tmp_path / "bundle")
    assert omniport("inspect", root, "--verify", "--quiet")[0] == 0
    doctor(root)
    write_manifest(root, make_manifest())
    refused(omniport("inspect", root, "--verify", "--quiet"), message)


def test_verify_fails_ranges_of_another_checkpoint(tmp_path: Path, omniport: Omniport) -> None:
    root = make_bundle(tmp_path / "bundle")
    manifest = msgspec.structs.replace(make_manifest(), ranges_file="ranges.json")
    ranges = Ranges(fingerprint="1" * 64, ops="native", kv="static", samples=(), graphs={})
    (root / "ranges.json").write_bytes(encode_ranges(ranges))
    write_manifest(root, manifest)
    refused(omniport("inspect", root, "--verify", "--quiet"), "was measured on a checkpoint with fingerprint")
