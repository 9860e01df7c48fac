"""Anybody's pictures: a folder DIR/CLASS/* or DIR/train/CLASS/* with DIR/val/CLASS/*.

    python -m flaxcls.main --config=configs/folder.py --config.data.path=DIR

Image size, network, batch size and length follow from the number and the size of the pictures and
from the devices, and are said; each can be given instead, such as --config.image_size=160. What is
wrong with the pictures says `python -m flaxcls.data check --source=DIR`, before any training.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = None
    config.duration = None
    config.data.name = "folder"
    config.data.eval_split = "validation"
    config.crop.area = (0.25, 1.0)
    config.augment = (
        {"name": "flip"},
        {"name": "color_jitter", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
    )
    config.model.name = None
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = 256
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.warmup = "5%"
    config.log_every = "20 steps"
    config.eval.every = "5%"
    config.checkpoint.every = "2 minutes"
    return config


def adapt(config):
    """Fills in what was not given, by what the pictures are like."""
    import jax

    from flaxcls import build, inputs, sharding

    sharding.set_up_devices(config.mesh.cpu_devices, config.batch_size or 16)  # before a first use
    images, classes, short_side = inputs.survey(build.source(config, config.data.train_split))
    accelerated = jax.default_backend() != "cpu"

    if config.image_size is None:
        sizes = (32, 64, 96, 128, 224) if accelerated else (32, 64, 96)
        config.image_size = max(size for size in sizes if size <= max(short_side, 32))
    size = config.image_size if isinstance(config.image_size, int) else 224
    if config.model.name is None:
        config.model.name = "resnet50" if accelerated and images >= 50_000 else "resnet18"
        if config.model.stem is None and size <= 64:
            config.model.stem = "cifar"
        if config.model.width is None and not accelerated:
            config.model.width = 32
    if config.batch_size is None:  # at least some 30 updates an epoch, for small sets too
        config.batch_size = max(b for b in (16, 32, 64, 128, 256) if b == 16 or 30 * b <= images)
    if config.duration is None:  # small sets are gone through more often
        config.duration = f"{min(100, max(20, 100_000 // images))} epochs"
    return (
        f"{images:,} pictures of {classes} classes, half of them at least {short_side} pixels wide "
        f"and high: trained at {size} pixels with {config.model.name} for {config.duration}, "
        f"{config.batch_size} at a time"
    )
