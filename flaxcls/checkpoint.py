"""Checkpoints of a run, saved in the background; the only file that knows Orbax.

A checkpoint holds the whole training state and, as JSON, all else that using or resuming it needs:
the resolved config, class names, normalisation, best metrics so far. Orbax writes a step into a
temporary folder and renames it when it is complete, so that a killed run leaves no half of one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from flaxcls.errors import ConfigError, did_you_mean


class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps and the best one."""

    def __init__(self, newest: int):
        self.newest = newest
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        count = len(checkpoints)
        return [
            index >= count - self.newest or info.step == self.best_step
            for index, info in enumerate(checkpoints)
        ]


class Checkpoints:
    """The checkpoints in one folder.

    Args:
      directory: where they lie, one folder a step; made when the first one is saved.
      keep: how many of the newest are kept; the best one is kept besides.
    """

    def __init__(self, directory: Path, keep: int = 1):
        self._policy = _NewestAndBest(keep)
        self._manager = ocp.CheckpointManager(
            directory.resolve(),
            item_names=("state", "facts"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy, enable_async_checkpointing=True
            ),
        )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts saving `state` (arrays) and `facts` (JSON) and returns; a failure shows in `wait`.

        The step that `facts["progress"]["best"]` names is kept from then on.
        """
        self._policy.best_step = facts["progress"]["best"].get("step")
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave(facts)
        )
        self._manager.save(step, args=arguments)

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first."""
        return sorted(self._manager.all_steps())

    def find(self, which: str) -> int:
        """The step that "last", "best" or a number means; ConfigError if there is none."""
        steps = self.steps()
        if not steps:
            raise ConfigError(f"there is no checkpoint in {self._manager.directory}")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.facts(steps[-1])["progress"]["best"]
            if not best:
                raise ConfigError("the run has no best checkpoint yet: it was not evaluated")
            which = str(best["step"])
        known = [str(step) for step in steps]
        if which not in known:
            raise ConfigError(f"there is no checkpoint {which!r}{did_you_mean(which, known)}")
        return int(which)

    def facts(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        arguments = ocp.args.Composite(facts=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments).facts

    def state(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The arrays of a checkpoint that `shapes` names, placed as `shardings` says.

        `shapes` may be a part of what was saved, such as the parameters without the optimizer.
        """
        arguments = jax.tree.map(
            lambda shape, sharding: ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=shape.shape, dtype=shape.dtype
            ),
            shapes,
            shardings,
        )
        restore = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=restore)).state

    def wait(self) -> None:
        """Returns when everything is saved; raises what went wrong meanwhile."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Returns when everything is saved, and ends what saves in the background."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
