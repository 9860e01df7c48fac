"""Any network on CIFAR-10 in few epochs: Muon and a rate that falls linearly to 0.

    python -m flaxcls.main --config=configs/cifar10_short.py --config.model.name=cifar_resnet20

For a network that is to be seen at work within minutes on two CPU cores. Muon turns the kernels at
a rate that suits networks of all kinds, so only the network and the length (`--config.duration`)
are chosen, such as

    --config.model.name=cifar_alexnet                                      10 epochs  76.16 %
    --config.model.name=cifar_resnet20                                      5 epochs  84.18 %
    --config.model.name=cifar_vgg16_bn                                      2 epochs  83.16 %
    --config.model.name=densenet_bc --config.model.depth=40                 2 epochs  76.44 %
    --config.model.name=convnext --config.model.depths='(2,2,2)'            6 epochs  72.58 %
        --config.model.width=64 --config.model.layer_scale=0.1
    --config.model.name=vit --config.model.patch=4 --config.model.width=128
        --config.model.heads=4 --config.model.depth=6                       8 epochs  75.74 %
        --config.model.pool=average --config.optimizer.learning_rate=0.03

with --config.duration='10 epochs' and so on. The accuracies are those of the test split of a
CIFAR-10 re-encoded as JPEG (n = 1 each), on 2 cores (AMD EPYC) with jax 0.10.2, other jobs running;
the times are in docs/recipes.md. November 2026.
"""

from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 250
    config.duration = "10 epochs"
    config.log_every = "20 steps"
    config.data.name = "cifar10"
    config.augment = (
        {"name": "pad_crop", "padding": 2, "mode": "reflect"},
        {"name": "flip", "mode": "alternating"},
    )
    config.model.name = "cifar_resnet20"
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.newton_schulz_steps = 3
    config.optimizer.rest_learning_rate = 0.06  # Adam's, for what is no kernel: 0.003
    config.schedule.name = "linear"
    config.schedule.warmup = "5%"
    config.eval.every = "2 epochs"
    return config
