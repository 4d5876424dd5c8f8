"""Pack Wren's weights by GPTQ and AWQ with GPTQModel, for the rows of docs/results/wren.md that import them.

    python -m venv packing
    packing/bin/pip install gptqmodel==7.7.0 transformers==5.20.2 audioread librosa av torchvision
    packing/bin/python benchmarks/wren_packed.py .work/wren-loss

Writes WORK/packed-gptq and WORK/packed-awq. GPTQModel 7.7 finds its way in the modules of transformers 5.20, not in
those of 5.24, so it has an environment of its own. Nothing of omniport is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # with one worker, of two cores, its thread pool refuses to start

WREN = Path(__file__).resolve().parent.parent / "wren"
GROUP = 64  # divides every input width of the thinker's layers: 192 and 512


def conversations() -> list[Any]:
    """The typed questions with their answers, as chat messages of text parts."""
    found = []
    for line in (WREN / "questions" / "questions.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "typed":
            answer = {"role": "assistant", "content": [{"type": "text", "text": entry["answer"]}]}
            found.append([*entry["messages"], answer])
    return found


def main(work: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
    from gptqmodel.quantization import FORMAT, METHOD  # type: ignore[import-not-found]
    from transformers import Qwen2_5OmniForConditionalGeneration as Omni

    work = work.resolve()
    os.chdir(work)  # GPTQModel leaves its logs where it runs
    # GPTQModel asks the whole model for its embeddings; transformers' has none of its own and raises
    setattr(Omni, "get_input_embeddings", lambda model: model.thinker.get_input_embeddings())  # noqa: B010
    for name, method, layout in (("gptq", METHOD.GPTQ, FORMAT.GPTQ), ("awq", METHOD.AWQ, FORMAT.GEMM)):
        config = QuantizeConfig(bits=4, group_size=GROUP, method=method, format=layout)
        model = GPTQModel.load(str(WREN / "checkpoint"), config, device="cpu")
        model.quantize(conversations(), batch_size=1)
        model.save(str(work / f"packed-{name}"))
        shutil.copy(WREN / "checkpoint" / "spk_dict.pt", work / f"packed-{name}")  # it leaves the voices behind


if __name__ == "__main__":
    main(Path(sys.argv[1]))
