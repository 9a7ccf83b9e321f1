"""The loop around the transformations: a step, a trainer, a cache for what rests."""

from ._batches import ArrayLoader as ArrayLoader
from ._cache import (
    CachedPrefix as CachedPrefix,
    CacheStats as CacheStats,
    Features as Features,
)
from ._checkpoint import Checkpoints as Checkpoints
from ._checkpoint_files import load_report as load_report
from ._history import History as History
from ._loop import Event as Event
from ._programs import Metrics as Metrics, Variant as Variant
from ._step import make_train_step as make_train_step, TrainStep as TrainStep
from ._trainer import PriorityPropTrainer as PriorityPropTrainer
