"""From a checkpoint to a bundle that is proven and built: export, validate, build engines, plan a device.

Names are loaded on first use: ``import omniport.export`` imports neither torch nor onnx. See docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omniport.runtime.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from omniport.runtime.errors import (
        BackendError,
        BuildError,
        BundleError,
        CheckpointError,
        ExportError,
        OmniportError,
        UsageError,
        UserError,
    )

    from .exporter import ExportReport, GraphReport, export_checkpoint
    from .planning.plan import Memory, RecipePlan, Speed, TargetPlan, plan
    from .tensorrt.build import BuildReport, GraphBuild, build_engines
    from .tensorrt.build_check import CheckReport, GraphCheck, check_engines
    from .tensorrt.profiles import EngineLimits
    from .validation.types import Check, ValidationReport
    from .validation.validate import Validation, validate

__all__ = [
    "BackendError",
    "BuildError",
    "BuildReport",
    "BundleError",
    "Check",
    "CheckReport",
    "CheckpointError",
    "EngineLimits",
    "ExportError",
    "ExportReport",
    "GraphBuild",
    "GraphCheck",
    "GraphReport",
    "Memory",
    "OmniportError",
    "RecipePlan",
    "Speed",
    "TargetPlan",
    "UsageError",
    "UserError",
    "Validation",
    "ValidationReport",
    "build_engines",
    "check_engines",
    "export_checkpoint",
    "plan",
    "validate",
]

_MODULES = {
    "omniport.runtime.errors": (
        "BackendError",
        "BuildError",
        "BundleError",
        "CheckpointError",
        "ExportError",
        "OmniportError",
        "UsageError",
        "UserError",
    ),
    ".exporter": ("ExportReport", "GraphReport", "export_checkpoint"),
    ".planning.plan": ("Memory", "RecipePlan", "Speed", "TargetPlan", "plan"),
    ".tensorrt.build": ("BuildReport", "GraphBuild", "build_engines"),
    ".tensorrt.build_check": ("CheckReport", "GraphCheck", "check_engines"),
    ".tensorrt.profiles": ("EngineLimits",),
    ".validation.types": ("Check", "ValidationReport"),
    ".validation.validate": ("Validation", "validate"),
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES, extra="export")
