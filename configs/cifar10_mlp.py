"""A dense network on CIFAR-10: what can be had without convolutions.

    python -m flaxcls.main --config=configs/cifar10_mlp.py

Not run to its end.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 128
    config.duration = "20 epochs"
    config.data.name = "cifar10"
    config.model.name = "dense"
    config.model.widths = (1024, 512)
    config.model.dropout = 0.2
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "cosine"
    config.augment = ({"name": "pad_crop", "padding": 2}, {"name": "flip"})
    return config
