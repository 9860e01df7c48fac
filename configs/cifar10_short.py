"""Any network on CIFAR-10 in few epochs: Muon and a rate that falls linearly to 0.

    python -m flaxcls.main --config=configs/cifar10_short.py --config.model.name=cifar_resnet20

For a network that is to be seen at work within minutes on two CPU cores. Muon turns the kernels at
a rate that suits networks of all kinds, so only the length is chosen: `--config.duration`.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 250
    config.duration = "10 epochs"
    config.log_every = "20 steps"
    config.data.name = "cifar10"
    config.augment = (
        {"name": "pad_crop", "padding": 2, "mode": "reflect"},
        {"name": "flip", "mode": "alternating"},
    )
    config.model.name = "cifar_resnet20"
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.rest_learning_rate = 0.06  # Adam's, for what is no kernel: 0.003
    config.schedule.name = "linear"
    config.schedule.warmup = "5%"
    config.eval.every = "2 epochs"
    return config
