"""ResNet-20 on CIFAR-10 as in He et al. 2015 (arXiv:1512.03385).

    python -m flaxcls.main --config=configs/cifar10_resnet20.py

Published: 91.25 % on the original CIFAR-10; not run here. Unlike there, norms and biases do not
decay.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.duration = "64000 steps"
    config.data.name = "cifar10"
    config.model.name = "cifar_resnet20"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.boundaries = ("50%", "75%")
    config.schedule.factor = 0.1
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "zeros"}, {"name": "flip"})
    return config
