"""Networks equal to their references, without PyTorch: by logits that it has computed."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxcls import models

_PATH = Path(__file__).parents[1] / "golden" / "update_networks.py"
_spec = importlib.util.spec_from_file_location("update_networks", _PATH)
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

LOGITS = json.loads(golden.FILE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.NETWORKS)
def test_logits_are_those_of_the_reference(name):
    size = golden.NETWORKS[name][2]
    network = models.build(name, num_classes=golden.CLASSES)
    apply = jax.jit(lambda variables, images: network.apply(variables, images, train=False))
    logits = apply(golden.variables_of(network, size), golden.images_of(size))
    expected = np.asarray(LOGITS[name])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
