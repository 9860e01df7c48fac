"""The PyTorch tutorial's convolutional network on CIFAR-10, as the tutorial trains it."""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 100
    config.duration = "10 epochs"
    config.data.name = "cifar10"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.model.name = "torch_convnet"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.001
    config.optimizer.momentum = 0.9
    config.schedule.name = "constant"
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "zeros"}, {"name": "flip"})
    return config
