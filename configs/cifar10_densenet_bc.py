"""DenseNet-BC of depth 40 and growth 12 on CIFAR-10 as in Huang et al. 2016 (arXiv:1608.06993).

    python -m flaxcls.main --config=configs/cifar10_densenet_bc.py

Published: 93.57 % on the original CIFAR-10 (6.43 % error in pytorchcv's table; the paper has no
network as small: `--config.model.depth=100` has its 95.49 %); not run here. Unlike there, norms
do not decay.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 64
    config.duration = "300 epochs"
    config.data.name = "cifar10"
    config.augment = ({"name": "pad_crop", "padding": 4, "mode": "zeros"}, {"name": "flip"})
    config.model.name = "densenet_bc"
    config.model.depth = 40
    config.model.growth = 12
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.boundaries = ("50%", "75%")
    config.schedule.factor = 0.1
    return config
