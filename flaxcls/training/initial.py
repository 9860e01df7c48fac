"""What config.init_from means for a run besides its first weights."""

import contextlib

from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.buckets import AnyPath
from flaxcls.build import Experiment
from flaxcls.config.fields import changes, plain
from flaxcls.errors import ConfigError, FlaxclsError
from flaxcls.runtime import processes
from flaxcls.runtime.output import printable
from flaxcls.weights import pretrained, sources


def complete(config: ConfigDict, workdir: AnyPath | None = None) -> str:
    """Sets what the config leaves open to what its first weights need; says so, or "".

    Known weights bring their whole preprocessing, a run's its network and image size. The run in
    `workdir` that is resumed comes to the same, also where that other run is no more.
    """
    source, before = config.init_from, plain(config)
    if source is None:
        return ""
    is_known = source in pretrained.PRETRAINED
    if not is_known and config.model.name is not None:
        return ""
    with processes.first_before_others():  # it may have to prepare the data for all
        shape = build.source(config, config.data.eval_split).image_shape
    if is_known:
        pretrained.apply_preprocessing(config, source, shape)
    else:
        found = None
        with contextlib.suppress(FlaxclsError):
            found = sources.network(str(workdir))
        found = found or sources.network(source)
        if found is None:
            raise ConfigError(
                f"config.init_from={printable(source)} does not tell its network: name it by "
                "--config.model.name"
            )
        model, size = found
        config.model.update(model)
        if config.image_size is None and None in shape:
            config.image_size = size
    set_now = changes(before, config)
    values = ", ".join(f"config.{field} = {now!r}" for field, (_, now) in set_now.items())
    return f"as {printable(source)} needs it: {values}" if values else ""


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
    mean, std = (list(pretrained.for_channels(values, channels)) for values in found)
    processes.say(
        f"images are normalised as for {printable(source)}: mean "
        f"{[round(value, 4) for value in mean]}, standard deviation "
        f"{[round(value, 4) for value in std]}"
    )
    return mean, std
