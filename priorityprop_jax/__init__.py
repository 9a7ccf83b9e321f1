"""A fixed budget of updates, spent on the parameters with the highest priority."""

from importlib.metadata import version as _version

from . import plots as plots, presets as presets, propagation as propagation
from ._allocation import allocate as allocate
from ._costs import backward_costs as backward_costs, BackwardCosts as BackwardCosts
from ._depth import infer_depths as infer_depths
from ._gradients import grad as grad, value_and_grad as value_and_grad
from ._masks import static_mask as static_mask, StaticMask as StaticMask
from ._prioritize import prioritize as prioritize, PrioritizeState as PrioritizeState
from ._priority import (
    DepthFactor as DepthFactor,
    PriorityPropState as PriorityPropState,
)
from ._row_sparse import row_sparse as row_sparse, RowSparseState as RowSparseState
from ._rows import (
    put_rows as put_rows,
    Rows as Rows,
    take_rows as take_rows,
    touched_rows as touched_rows,
)
from ._savings import Savings as Savings
from ._schedule import schedule as schedule
from ._scores import Score as Score, ScoreInputs as ScoreInputs
from ._transform import active as active, priority_prop as priority_prop
from ._units import unit_axes as unit_axes
from .report import priority_report as priority_report, PriorityReport as PriorityReport
from .training import (
    ArrayLoader as ArrayLoader,
    CachedPrefix as CachedPrefix,
    History as History,
    make_train_step as make_train_step,
    PriorityPropTrainer as PriorityPropTrainer,
    TrainStep as TrainStep,
)


__version__ = _version("priorityprop_jax")
