"""A fixed budget of updates, spent on the parameters with the highest priority."""

from importlib.metadata import version as _version

from ._allocation import allocate as allocate
from ._depth import infer_depths as infer_depths
from ._prioritize import prioritize as prioritize, PrioritizeState as PrioritizeState
from ._priority import (
    DepthFactor as DepthFactor,
    PriorityPropState as PriorityPropState,
)
from ._schedule import schedule as schedule
from ._scores import Score as Score, ScoreInputs as ScoreInputs
from ._transform import active as active, priority_prop as priority_prop
from ._units import unit_axes as unit_axes
from .report import priority_report as priority_report, PriorityReport as PriorityReport


__version__ = _version("priorityprop_jax")
