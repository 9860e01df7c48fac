"""ResNet-18 with a 3x3 stem on CIFAR-10.

    python -m flaxcls.main --config=configs/cifar10_resnet18.py

Published: 94.87 % on the original CIFAR-10 (OpenMixup, 200 epochs); not run here.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.duration = "200 epochs"
    config.data.name = "cifar10"
    config.model.name = "resnet18"
    config.model.stem = "cifar"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "zeros"}, {"name": "flip"})
    return config
