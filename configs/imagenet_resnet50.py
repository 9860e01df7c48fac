"""ResNet-50 v1.5 on ImageNet, 90 epochs."""

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
