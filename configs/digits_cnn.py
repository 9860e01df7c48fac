"""A small convolutional network on scikit-learn's handwritten digits.

    python -m flaxcls.main --config=configs/digits_cnn.py

Run: test accuracy 98.83 % (n = 5 seeds, standard deviation 0.23), 16 to 21 s a run, on
2 cores (AMD EPYC), jax 0.10.2, November 2026.
"""

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
