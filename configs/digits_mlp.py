"""A dense network on scikit-learn's 8x8 handwritten digits.

    python -m flaxcls.main --config=configs/digits_mlp.py

Run: test accuracy 96.89 % (n = 5 seeds, standard deviation 0.36), 12 to 14 s a run, on
2 cores (AMD EPYC), jax 0.10.2, November 2026.
"""

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
