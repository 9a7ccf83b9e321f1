"""Presets: ways to let parameters rest that were measured, each with a guard.

Where resting cannot be expected to pay, a preset trains in full, and says so.
"""

from ._finetune import (
    FineTune as FineTune,
    finetune as finetune,
    FineTuneState as FineTuneState,
)
from ._from_scratch import from_scratch as from_scratch, Preset as Preset
