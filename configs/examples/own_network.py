"""A network, an augmentation and a schedule of one's own, on scikit-learn's handwritten digits.

    python -m flaxcls.main --config=configs/examples/own_network.py

They are in mixer.py beside this file, and named here as "module:Name". The run's folder keeps a
copy, so that evaluate and predict need nothing else. docs/extending.md shows the other kinds.

Run: test accuracy 95.93 % (n = 3 seeds, standard deviation 0.16), 23 to 38 s a run, on 2 busy
cores (AMD EPYC), jax 0.10.2, November 2026.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 64
    config.duration = "30 epochs"
    config.data.name = "digits"
    config.model.name = "mixer:Mixer"
    config.model.depth = 2
    config.augment = (
        {"name": "pad_crop", "padding": 1, "mode": "zeros"},
        {"name": "mixer:noise", "deviation": 10.0},
    )
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.name = "mixer:stable_then_decay"
    config.schedule.warmup = "1 epochs"
    return config
