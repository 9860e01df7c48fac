"""ResNet-18 on ImageNet, 90 epochs.

    python -m flaxcls.main --config=configs/imagenet_resnet18.py

Published: 69.8 % (torchvision, with a rate divided by 10 at 30 and 60 epochs, and BatchNorm of the
32 images of each of 8 GPUs, as here). Not trained here.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 256
    config.duration = "90 epochs"
    config.log_every = "100 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.image_size = 224
    config.crop.name = "random_resized_crop"
    config.crop.antialias = False
    config.augment = ({"name": "flip"},)
    config.model.name = "resnet18"
    config.model.batch_norm_group = 32
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = 256
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.eval.crop.antialias = True  # as torchvision's figure
    return config
