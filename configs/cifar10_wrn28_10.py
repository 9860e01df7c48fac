"""WRN-28-10 with dropout on CIFAR-10 as in Zagoruyko & Komodakis 2016 (arXiv:1605.07146).

    python -m flaxcls.main --config=configs/cifar10_wrn28_10.py

Published: 96.0 to 96.2 % on the original CIFAR-10; not run here.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.duration = "200 epochs"
    config.data.name = "cifar10"
    config.model.name = "wrn28_10"
    config.model.dropout = 0.3
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "step"
    config.schedule.boundaries = ("60 epochs", "120 epochs", "160 epochs")
    config.schedule.factor = 0.2
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "reflect"}, {"name": "flip"})
    return config
