"""A small convolutional network on scikit-learn's handwritten digits."""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 64
    config.duration = "30 epochs"
    config.data.name = "digits"
    config.model.name = "digits_cnn"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "cosine"
    config.schedule.warmup = "1 epochs"
    config.augment = ({"name": "pad_crop", "padding": 1, "mode": "zeros"},)
    return config
