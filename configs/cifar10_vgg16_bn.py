"""VGG-16 with BatchNorm on CIFAR-10, by chenyaofo's pytorch-cifar-models.

    python -m flaxcls.main --config=configs/cifar10_vgg16_bn.py

Published: 94.16 % on the original CIFAR-10; not run here. Unlike there, norms and biases do not
decay, the rate falls at every step and not once an epoch, and the deviations that images are
normalised by are right.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 256
    config.duration = "200 epochs"
    config.data.name = "cifar10"
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "zeros"}, {"name": "flip"})
    config.model.name = "cifar_vgg16_bn"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    return config
