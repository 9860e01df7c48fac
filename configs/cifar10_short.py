"""Any network on CIFAR-10 in few epochs: Muon and a rate that falls linearly to 0.

    python -m flaxcls.main --config=configs/cifar10_short.py --config.model.name=cifar_resnet20

For a network that is to be seen at work within minutes on two CPU cores. Muon turns the kernels at
a rate that suits networks of all kinds, so only the network and the length (`--config.duration`)
are chosen, such as

    --config.model.name=cifar_alexnet
    --config.model.name=cifar_vgg16_bn
    --config.model.name=densenet_bc --config.model.depth=40
    --config.model.name=convnext --config.model.depths='(2,2,2)' --config.model.width=64
    --config.model.name=vit --config.model.patch=4 --config.model.width=128
        --config.model.heads=4 --config.model.depth=6 --config.model.pool=average

Run on a CIFAR-10 re-encoded as JPEG: test accuracy 76.16 % with cifar_alexnet after 10 epochs, and
84.18 % with cifar_resnet20 after 5 (n = 1 each), on 2 cores (AMD EPYC) with jax 0.10.2, other jobs
taking most of the machine. November 2026.
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
