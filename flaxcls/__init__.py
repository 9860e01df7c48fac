"""Trains image classifiers with JAX and Flax.

`python -m flaxcls.main --help` is the way in from a shell; from Python, and in notebooks:

    import flaxcls

    summary = flaxcls.train("digits_cnn", "runs/digits", overrides={"duration": "5 epochs"})
    classifier = flaxcls.load("runs/digits")

Importing flaxcls takes no time and changes nothing: what follows is loaded when it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxcls.api import Ensemble as Ensemble
    from flaxcls.api import Explanation as Explanation
    from flaxcls.api import FlaxclsError as FlaxclsError
    from flaxcls.api import Interrupted as Interrupted
    from flaxcls.api import Neighbor as Neighbor
    from flaxcls.api import ParityError as ParityError
    from flaxcls.api import Prediction as Prediction
    from flaxcls.api import Predictor as Predictor
    from flaxcls.api import StopTraining as StopTraining
    from flaxcls.api import attack as attack
    from flaxcls.api import average as average
    from flaxcls.api import calibrate as calibrate
    from flaxcls.api import corrupt as corrupt
    from flaxcls.api import cross_validate as cross_validate
    from flaxcls.api import default_config as default_config
    from flaxcls.api import evaluate as evaluate
    from flaxcls.api import explain as explain
    from flaxcls.api import export as export
    from flaxcls.api import load as load
    from flaxcls.api import load_config as load_config
    from flaxcls.api import search as search
    from flaxcls.api import sweep_recipe as sweep_recipe
    from flaxcls.api import train as train
    from flaxcls.api import write_report as write_report

__all__ = (
    "Ensemble",
    "Explanation",
    "FlaxclsError",
    "Interrupted",
    "Neighbor",
    "ParityError",
    "Prediction",
    "Predictor",
    "StopTraining",
    "attack",
    "average",
    "calibrate",
    "corrupt",
    "cross_validate",
    "default_config",
    "evaluate",
    "explain",
    "export",
    "load",
    "load_config",
    "search",
    "sweep_recipe",
    "train",
    "write_report",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        from flaxcls import api

        return getattr(api, name)
    raise AttributeError(f"module 'flaxcls' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
