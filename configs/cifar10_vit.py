"""A small vision transformer on CIFAR-10: 64 patches of 4x4 pixels, 6 blocks of width 192.

    python -m flaxcls.main --config=configs/cifar10_vit.py

The schedule is that of omihub777's ViT-CIFAR, which has 7 blocks of width 384 and publishes
90.92 % on the original CIFAR-10. Not run here, and there is no published figure for this network.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.duration = "200 epochs"
    config.data.name = "cifar10"
    config.augment = (
        {"name": "pad_crop", "padding": 4, "mode": "zeros"},
        {"name": "flip"},
        {"name": "auto_augment", "policy": "cifar10"},
    )
    config.model.name = "vit"
    config.model.patch = 4
    config.model.width = 192
    config.model.depth = 6
    config.model.heads = 3
    config.model.pool = "average"
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 5e-5
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.schedule.final = 0.01
    return config
