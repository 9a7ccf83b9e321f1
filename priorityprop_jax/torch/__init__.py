"""The budget for PyTorch: torch trains, the allocator and the schedule of JAX decide.

Once per cycle one number per parameter, the size of its gradient, goes to JAX on the
CPU; quotas come back. Needs ``pip install "priorityprop_jax[torch]"``.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'priorityprop_jax.torch needs PyTorch: pip install "priorityprop_jax[torch]"'
    ) from error

from ._budget import PriorityBudget as PriorityBudget
from ._depths import infer_depths as infer_depths
from ._trainer import PriorityPropTrainer as PriorityPropTrainer
