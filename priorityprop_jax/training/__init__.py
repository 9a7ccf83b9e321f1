"""The loop around the transformations: a step, and a cache for what rests long."""

from ._cache import (
    CachedPrefix as CachedPrefix,
    CacheStats as CacheStats,
    Features as Features,
)
from ._programs import Metrics as Metrics, Variant as Variant
from ._step import make_train_step as make_train_step, TrainStep as TrainStep
