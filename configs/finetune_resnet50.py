"""ResNet-50, fine-tuned from torchvision's weights of ImageNet.

    python -c "import torchvision; torchvision.models.resnet50(weights='DEFAULT')"
    python -m flaxcls.main --config=configs/finetune_resnet50.py --config.data.name=folder \
        --config.data.path=DIR

The first command fetches the weights to where `init_from` below expects them; others, or a run of
flaxcls, by --config.init_from=PATH. All is trained, the head ten times as fast as the rest, and
BatchNorm keeps ImageNet's statistics. --config.finetune.freeze='^(conv1|norm1|stage1)' would leave
the first layers as they are. The values are usual ones, not a paper's. Not run here with these
weights.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.init_from = "~/.cache/torch/hub/checkpoints/resnet50-11ad3fa6.pth"
    config.batch_size = 64
    config.duration = "20 epochs"
    config.data.name = "cifar10"
    config.data.mean = (0.485, 0.456, 0.406)  # as the weights need it
    config.data.std = (0.229, 0.224, 0.225)
    config.image_size = 224
    config.crop.name = "random_resized_crop"
    config.crop.area = (0.25, 1.0)
    config.augment = ({"name": "flip"},)
    config.model.name = "resnet50"
    config.finetune.freeze_batch_stats = True
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.learning_rate_batch = 256
    config.optimizer.learning_rate_factors = ((r"^head/", 10.0),)
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.warmup = "5%"
    return config
