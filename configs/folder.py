"""Anybody's pictures: a folder DIR/CLASS/* or DIR/train/CLASS/* with DIR/val/CLASS/*.

    python -m flaxcls.main --config=configs/folder.py --config.data.path=DIR

Image size, network, optimizer, batch size and length follow from the number and the size of the
pictures and from the speed of the devices, and are said; each can be given instead, such as
--config.image_size=160. On a CPU a few steps are timed first, and the run is made to end within
some 20 minutes. What is wrong with the pictures says `python -m flaxcls.data check --source=DIR`,
before any training.

Run on 3,600 pictures of 64 pixels (ten classes of CIFAR-10, enlarged) on 2 cores (AMD EPYC) with
jax 0.10.2: held-out accuracy 74.7 % (n = 1, 360 pictures) after 744 s, all included. November 2026.
"""

from flaxcls.config import default

SIZES = (32, 64, 96, 128, 224)  # pixels a side
CPU_SIZES = (32, 48, 64, 96)
MINUTES = 20  # on a CPU


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
    """Fills in what was not given, by what the pictures are like and how fast the devices are."""
    from flaxcls import build
    from flaxcls.data import pipeline
    from flaxcls.runtime import processes, sharding

    build.source(config, config.data.eval_split)  # if it is wrong, before steps are timed
    source = build.source(config, config.data.train_split)
    images, classes, short_side = pipeline.summarize(source)
    if config.batch_size is None:  # at least some 20 updates an epoch, for small sets too
        batch = max(b for b in (16, 32, 64, 128, 256) if b == 16 or 20 * b <= images)
        config.batch_size = -(-batch // processes.count()) * processes.count()
    mesh = build.mesh(config)
    largest = max(size for size in SIZES if size <= max(short_side, 32))
    epochs = min(100, max(20, 200_000 // images))  # small sets are gone through more often
    network = "resnet50" if images >= 50_000 else "resnet18"
    about = ""
    if sharding.platform(mesh) != "cpu":
        _fill_in(config, network, largest, epochs)
    elif None in (config.model.name, config.image_size, config.duration):
        about = _fit_to_cpu(config, mesh, images, classes, largest, epochs)
        about += f"; a GPU would train {network} at {largest} pixels for {epochs} epochs"
    return (
        f"{images:,} pictures of {classes} classes, half of them at least {short_side} pixels wide "
        f"and high: trained at {config.image_size} pixels with {config.model.name} for "
        f"{config.duration}, {config.batch_size} at a time{about}"
    )


def _fill_in(config, network, size, epochs):
    if config.image_size is None:
        config.image_size = size
    if config.model.name is None:
        config.model.name = network
        if config.model.get("stem") is None and isinstance(config.image_size, int):
            config.model.stem = "cifar" if config.image_size <= 64 else "imagenet"
    if config.duration is None:
        config.duration = f"{epochs} epochs"


def _fit_to_cpu(config, mesh, images, classes, largest, epochs):
    """Chooses a network that learns in minutes, and what of size and length there is time for."""
    from flaxcls.perf.step import step_rate

    if config.model.name is None:
        config.model.name = "quick"
        if config.optimizer == get_config().optimizer:
            _use_muon(config)
        if config.model.get("widths") is None:
            config.model.widths = (32, 128, 256)
    tried = config.image_size if isinstance(config.image_size, int) else CPU_SIZES[0]
    rate = step_rate(config, mesh, image_size=tried, num_classes=classes)
    enough = rate * 60 * MINUTES * 0.85 / images  # epochs at that size; the rest: start, evaluation

    def affordable(size):
        return max(1, min(epochs, int(enough * (tried / size) ** 2)))

    if config.image_size is None:
        smallest, *larger = (size for size in CPU_SIZES if size <= largest)
        # Seen more often small pictures teach more than larger ones: on 3,240 of CIFAR-10, made 64
        # pixels, 20 epochs gave 75.3 % at 32 pixels and 73.6 % at 48, in twice the time.
        larger = (size for size in larger if affordable(size) == epochs)
        config.image_size = max(larger, default=smallest)
    size = config.image_size if isinstance(config.image_size, int) else tried
    if config.duration is None:
        config.duration = f"{affordable(size)} epochs"
    return f", {rate * (tried / size) ** 2:,.0f} images/s on this CPU"


def _use_muon(config):
    """As in cifar10_quick.py; the rates of `rest` are meant for the summed loss."""
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = None
    config.optimizer.weight_decay = 0.0
    config.optimizer.momentum = 0.6
    config.optimizer.nesterov = None
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.renormalize = True
    config.optimizer.rest = "sgd"
    config.optimizer.rest_momentum = 0.85
    config.optimizer.rest_learning_rate = 0.53 * config.batch_size
    config.optimizer.learning_rate_factors = ((r"^head/", 12.6),)
    config.schedule.name = "linear"
    config.schedule.warmup = None
