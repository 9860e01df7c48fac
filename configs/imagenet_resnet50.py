"""ResNet-50 v1.5 on ImageNet, 90 epochs.

    python -m flaxcls.main --config=configs/imagenet_resnet50.py

Published: 76.1 to 76.5 % (torchvision, timm). Not run here, and not to be run yet: ImageNet needs
the streaming input with its random resized crops. On made-up images it builds and runs:

    ... --config.data.name=fake --config.data.image_shape='(224, 224, 3)' \\
        --config.data.num_classes=1000 --config.batch_size=8 --config.duration='8 epochs'
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 256
    config.duration = "90 epochs"
    config.log_every = "100 steps"
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.model.name = "resnet50"
    config.model.zero_init_residual = True
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = 256  # larger batches: larger rate, in proportion
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    config.augment = ({"name": "flip"},)
    return config
