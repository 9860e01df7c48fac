"""A small ConvNeXt on CIFAR-10: stages of 2, 2 and 2 blocks, 64, 128 and 256 wide.

    python -m flaxcls.main --config=configs/cifar10_convnext.py

The stem's patches of 4 pixels make 8x8 pixels of the images. The optimizer is that of ConvNeXt on
ImageNet (arXiv:2201.03545) at a smaller batch. Not run here, and there is no published figure for
this network.
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
    config.model.name = "convnext"
    config.model.depths = (2, 2, 2)
    config.model.width = 64
    config.model.drop_path = 0.1
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    return config
