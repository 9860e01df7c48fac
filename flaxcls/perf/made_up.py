"""A recipe on made-up images, so that it can be timed where its data are not."""

from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.errors import ConfigError


def made_up(config: ConfigDict) -> ConfigDict:
    """A copy of a config on two batches of made-up images, of the size that its network is given.

    Of several sizes it is the last; the classes are those of the data. ConfigError where the size
    or the classes are not known without the data.
    """
    described = build.source_or_description(config, config.data.train_split)
    size = config.image_size
    if isinstance(size, (tuple, list)):
        size = size[-1][-1]
    size = size or described.image_shape[0]
    if size is None:
        raise ConfigError(
            f"--fake needs config.image_size: the images of {config.data.name} have several sizes"
        )
    fake = build.on_fake_data(config, image_size=size, num_classes=len(described.class_names))
    fake.data.image_shape = (size, size, described.image_shape[-1])
    return fake
