"""A recipe on made-up images, to be timed or inspected without its data."""

from ml_collections import ConfigDict

from flaxcls.config import default
from flaxcls.config.tree import get


def on_fake_data(config: ConfigDict, *, image_size: int, num_classes: int) -> ConfigDict:
    """A copy of a config whose data are two batches of made-up images of one size."""
    config = config.copy_and_resolve_references()
    channels = config.data.get("channels") or 3
    for name in ("data", "crop", "eval.crop"):
        section, standard = get(config, name), get(default(), name)
        for field in list(section):
            section[field] = standard.get(field)
    config.data.name, config.data.train_split, config.data.eval_split = "fake", "train", "test"
    config.data.image_shape = (image_size, image_size, channels)
    config.data.num_classes, config.data.num_examples = num_classes, 2 * config.batch_size
    config.image_size = config.eval.image_size = None
    config.schedule.warmup = None
    config.profile.start = config.profile.stop = None
    return config
