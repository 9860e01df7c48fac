"""A dense network on scikit-learn's 8x8 handwritten digits."""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 64
    config.duration = "40 epochs"
    config.data.name = "digits"
    config.model.name = "dense"
    config.model.widths = (256, 128)
    config.model.dropout = 0.2
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "cosine"
    config.augment = ({"name": "pad_crop", "padding": 1, "mode": "zeros"},)
    return config
