"""AlexNet for images of 32 pixels on CIFAR-10, by bearpaw's pytorch-classification.

    python -m flaxcls.main --config=configs/cifar10_alexnet.py

Published: 77.22 % on the original CIFAR-10 (22.78 % error in that project's table); not run here.
Unlike there, biases do not decay, and the deviations that images are normalised by are right.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.duration = "164 epochs"
    config.data.name = "cifar10"
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "zeros"}, {"name": "flip"})
    config.model.name = "cifar_alexnet"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "step"
    config.schedule.boundaries = ("81 epochs", "122 epochs")
    config.schedule.factor = 0.1
    return config
