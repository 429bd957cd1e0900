"""L0: the frozen dataclasses that pass between measuring, planning and running. Standard library only.

Seconds and bytes in every field and file.
"""

from llmpq.spec.cluster import Cluster, Device, Link, parse_bytes, parse_devices
from llmpq.spec.costs import CostRow, CostTable, Op, Profile
from llmpq.spec.demand import Attained, Demand
from llmpq.spec.errors import (
    DeviceMemoryError,
    GrammarLostError,
    HostError,
    InfeasibleError,
    LlmpqError,
    NotMeasuredError,
    PromptError,
    UsageError,
    WorkerLostError,
    one_line,
)
from llmpq.spec.latency import Latency, RequestTimes
from llmpq.spec.layers import Experts, LayerKind, LinearShape, Rope
from llmpq.spec.model import DTYPE_BYTES, Dtype, KvBits, KvDtype, ModelSpec, kv_dtype
from llmpq.spec.ops import Context, product_op, rest_op, stage_ops, stage_seconds, unit_ops
from llmpq.spec.plan import Placement, Plan, Stage
from llmpq.spec.precision import (
    ACTIVATION_MODES,
    BITS,
    BLOCK,
    DEFAULT_ACTIVATIONS,
    GROUP_SIZES,
    NATIVE,
    W16,
    WIDTHS,
    ActivationMode,
    Mixed,
    Native,
    Precision,
    UnitPrecision,
    Width,
    ZeroKind,
    widths_of,
)
from llmpq.spec.record import InvalidField, Record, load_either
from llmpq.spec.result import DeviceLoss, LogProb, Output, Prediction, Quality, Report, Solution, Solved
from llmpq.spec.sensitivity import Sensitivity, SensitivityMethod, default_method
from llmpq.spec.trace import SPANS_KEPT, Busy, Span, SpanLog, busy
from llmpq.spec.workload import Workload

__all__ = [
    "ACTIVATION_MODES",
    "BITS",
    "BLOCK",
    "DEFAULT_ACTIVATIONS",
    "DTYPE_BYTES",
    "GROUP_SIZES",
    "NATIVE",
    "SPANS_KEPT",
    "W16",
    "WIDTHS",
    "ActivationMode",
    "Attained",
    "Busy",
    "Cluster",
    "Context",
    "CostRow",
    "CostTable",
    "Demand",
    "Device",
    "DeviceLoss",
    "DeviceMemoryError",
    "Dtype",
    "Experts",
    "GrammarLostError",
    "HostError",
    "InfeasibleError",
    "InvalidField",
    "KvBits",
    "KvDtype",
    "Latency",
    "LayerKind",
    "LinearShape",
    "Link",
    "LlmpqError",
    "LogProb",
    "Mixed",
    "ModelSpec",
    "Native",
    "NotMeasuredError",
    "Op",
    "Output",
    "Placement",
    "Plan",
    "Precision",
    "Prediction",
    "Profile",
    "PromptError",
    "Quality",
    "Record",
    "Report",
    "RequestTimes",
    "Rope",
    "Sensitivity",
    "SensitivityMethod",
    "Solution",
    "Solved",
    "Span",
    "SpanLog",
    "Stage",
    "UnitPrecision",
    "UsageError",
    "Width",
    "WorkerLostError",
    "Workload",
    "ZeroKind",
    "busy",
    "default_method",
    "kv_dtype",
    "load_either",
    "one_line",
    "parse_bytes",
    "parse_devices",
    "product_op",
    "rest_op",
    "stage_ops",
    "stage_seconds",
    "unit_ops",
    "widths_of",
]
