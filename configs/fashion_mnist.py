"""The quick network, small, on Fashion-MNIST; as cifar10_quick with fewer channels.

    python -m flaxcls.main --config=configs/fashion_mnist.py --config.data.path=DIR

DIR holds the four files `train-images-idx3-ubyte.gz` and so on (Debian's package
dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist, which is the default).

Run: test accuracy 94.12 % (n = 1) in 878 s on 2 cores (AMD EPYC) with jax 0.10.2, some tests
running beside it for a third of the time. November 2026.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 500
    config.duration = "14 epochs"
    config.log_every = "20 steps"
    config.data.name = "idx"
    config.data.path = "/usr/share/datasets/fashion-mnist"
    config.augment = (
        {"name": "pad_crop", "padding": 2, "mode": "reflect"},
        {"name": "flip", "mode": "alternating"},
    )
    config.model.name = "quick"
    config.model.widths = (24, 64, 128)
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.6
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.renormalize = True
    config.optimizer.rest = "sgd"
    config.optimizer.rest_momentum = 0.85
    config.optimizer.rest_learning_rate = 350.0
    config.optimizer.learning_rate_factors = ((r"^head/", 12.6),)
    config.schedule.name = "linear"
    config.eval.every = "2 epochs"
    return config
