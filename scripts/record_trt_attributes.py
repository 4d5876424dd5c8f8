"""Print what `omniport.export.tensorrt.builder_api` reads off the installed builders.

The result is tests/data/trt_attributes.json.

python -m scripts.record_trt_attributes
"""

from __future__ import annotations

import json

from omniport.export.tensorrt.builder_api import MODULES, attributes_of, installed_builders, load_api


def main() -> None:
    """Print the recorded sets of every builder that is installed."""
    found = {}
    for builder in installed_builders():
        api = load_api(builder)
        found[f"{builder} {api.version}"] = {
            "source": f"recorded from the Python module {MODULES[builder]}",
            "attributes": attributes_of(api.module),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
