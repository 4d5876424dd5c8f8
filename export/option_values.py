"""Values of the export's options, without imports, so that the command line can list them at once."""

from __future__ import annotations

PRECISIONS = ("fp32", "fp16", "bf16")
#: of DiT and vocoder. Eight bits of mantissa are too few for an ODE state, and no runtime has BF16 transposed
#: convolutions
TOKEN2WAV_PRECISIONS = ("fp32", "fp16")
#: operators of the graphs: those of the newest opset, or for parsers that are older
OPS = ("native", "decomposed")
#: where zero points of GPTQ and AWQ weights go: with the weights, or into a separate product for TensorRT
ZERO_POINTS = ("keep", "separate")
#: how much is validated
SUITES = ("quick", "full")
#: who builds engines
BUILDERS = ("auto", "tensorrt", "tensorrt-rtx")
