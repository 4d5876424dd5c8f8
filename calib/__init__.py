"""Bundles whose weights are stored as integers: calibrate a checkpoint, quantize a bundle, compare what it cost;
and deploy a checkpoint to a device.

Names are loaded on first use: ``import omniport.calib`` imports neither torch nor onnx. See docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omniport.runtime.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from omniport.runtime.errors import (
        BundleError,
        CheckFailed,
        CheckpointError,
        ExportError,
        OmniportError,
        UsageError,
        UserError,
    )

    from .calibration_file import Calibration
    from .calibrator import CalibrateReport, calibrate
    from .deployer import DeployReport, deploy, deploy_plan
    from .deployment.deploy_record import DeployPlan
    from .goal_quantizer import GoalReport, quantize_to_goal
    from .quantizer import GraphResult, QuantizeReport, quantize
    from .report.compare import BundleLoss, Comparison, GraphLoss, LossReport, SoundLoss, compare
    from .search import Goal

__all__ = [
    "BundleError",
    "BundleLoss",
    "CalibrateReport",
    "Calibration",
    "CheckFailed",
    "CheckpointError",
    "Comparison",
    "DeployPlan",
    "DeployReport",
    "ExportError",
    "Goal",
    "GoalReport",
    "GraphLoss",
    "GraphResult",
    "LossReport",
    "OmniportError",
    "QuantizeReport",
    "SoundLoss",
    "UsageError",
    "UserError",
    "calibrate",
    "compare",
    "deploy",
    "deploy_plan",
    "quantize",
    "quantize_to_goal",
]

_MODULES = {
    "omniport.runtime.errors": (
        "BundleError",
        "CheckFailed",
        "CheckpointError",
        "ExportError",
        "OmniportError",
        "UsageError",
        "UserError",
    ),
    ".calibration_file": ("Calibration",),
    ".calibrator": ("CalibrateReport", "calibrate"),
    ".deployer": ("DeployReport", "deploy", "deploy_plan"),
    ".deployment.deploy_record": ("DeployPlan",),
    ".goal_quantizer": ("GoalReport", "quantize_to_goal"),
    ".quantizer": ("GraphResult", "QuantizeReport", "quantize"),
    ".report.compare": ("BundleLoss", "Comparison", "GraphLoss", "LossReport", "SoundLoss", "compare"),
    ".search": ("Goal",),
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES, extra="calib")
