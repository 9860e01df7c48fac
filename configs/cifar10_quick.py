"""A quick network on CIFAR-10."""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 500
    config.duration = "16 epochs"
    config.data.name = "cifar10"
    config.augment = (
        {"name": "pad_crop", "padding": 2, "mode": "reflect"},
        {"name": "flip", "mode": "alternating"},
    )
    config.model.name = "quick"
    config.model.widths = (32, 64, 128)
    config.loss.label_smoothing = 0.2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.08
    config.optimizer.momentum = 0.6
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.renormalize = True
    config.optimizer.rest = "sgd"
    config.optimizer.rest_momentum = 0.85
    config.optimizer.rest_learning_rate = 330.0
    config.optimizer.learning_rate_factors = ((r"^head/", 3.2),)
    config.schedule.name = "linear"
    return config
