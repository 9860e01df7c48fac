"""A quick network on CIFAR-10: airbench94's ideas, narrower, for two CPU cores."""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 1000
    config.duration = "10 epochs"
    config.log_every = "10 steps"
    config.data.name = "cifar10"
    config.augment = (
        {"name": "pad_crop", "padding": 2, "mode": "reflect"},
        {"name": "flip", "mode": "alternating"},
    )
    config.model.name = "quick"
    config.model.widths = (32, 128, 256)
    config.loss.label_smoothing = 0.2
    # Muon turns the kernels; biases and head have SGD, whose rates are meant for the mean loss.
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.15
    config.optimizer.momentum = 0.6
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.renormalize = True
    config.optimizer.rest = "sgd"
    config.optimizer.rest_momentum = 0.85
    config.optimizer.rest_learning_rate = 350.0
    config.optimizer.learning_rate_factors = ((r"^head/", 12.6),)
    config.schedule.name = "linear"
    return config
