"""What config.init_from means for a run besides its first weights."""

from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.build import Experiment
from flaxcls.config.tree import get
from flaxcls.runtime import processes
from flaxcls.runtime.output import printable
from flaxcls.weights import pretrained, sources


def complete(config: ConfigDict) -> None:
    """Sets what the config leaves open to what known weights need, and says so.

    A run that is resumed comes to the same.
    """
    name = config.init_from
    if name not in pretrained.PRETRAINED:
        return
    with processes.first_before_others():  # it may have to prepare the data for all
        any_size = None in build.source(config, config.data.eval_split).image_shape
    fields = pretrained.apply_preprocessing(config, name, any_size)
    if fields:
        values = ", ".join(f"config.{field} = {get(config, field)!r}" for field in fields)
        processes.say(f"as {name} needs it: {values}")


def inherited_normalization(experiment: Experiment) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that the first weights were trained with, as far as is known.

    Those of other channels than the images have are averaged over the channels.
    """
    source = experiment.init_from
    if source is None:
        return None
    found = sources.preprocessing(source)
    if found is None:
        processes.say(
            f"note: {printable(source)} does not tell how images were normalised for it, so the "
            "mean and the standard deviation are those of the training split; torchvision's "
            "weights and most of timm's need --config.data.mean=(0.485,0.456,0.406) "
            "--config.data.std=(0.229,0.224,0.225)"
        )
        return None
    channels = experiment.evaluation.image_shape()[-1]
    mean, std = (
        values if len(values) == channels else [sum(values) / len(values)] * channels
        for values in found
    )
    processes.say(
        f"images are normalised as for {printable(source)}: mean "
        f"{[round(value, 4) for value in mean]}, standard deviation "
        f"{[round(value, 4) for value in std]}"
    )
    return mean, std
