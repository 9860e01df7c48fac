"""All that training carries from one step to the next."""

from typing import Any

import flax.struct
import jax


class TrainState(flax.struct.PyTreeNode):
    """A pytree; every leaf is on the devices and goes into the checkpoint.

    Attributes:
      step: int32 [], the number of updates made.
      rng: uint32 key data; every random choice of a step is keyed by it and the step.
      params: float32, what the optimizer trains.
      batch_stats: float32, BatchNorm's running mean and (biased) variance; {} without BatchNorm.
      opt_state: the optimizer's.
      ema: {"params", "batch_stats"} averaged over the steps, or {} where it is off.
      skipped: int32 [], the updates skipped in a row until now.
      metrics: name -> (sum, count) of the steps since the last log.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    metrics: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What a model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}
