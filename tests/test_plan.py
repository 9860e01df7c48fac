"""What a recipe needs is planned without its data and, for TPUs, without one."""

import importlib.util
import json
import os
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flaxcls import build
from flaxcls.data.described import FACTS
from flaxcls.errors import ConfigError, DataError
from flaxcls.perf import devices, hlo
from flaxcls.perf.hlo_text import Module
from flaxcls.perf.plan import StepPlan, TooLarge, available, image_seconds
from flaxcls.perf.plan_search import Planner, Variant
from flaxcls.perf.roofline import Roofline, roofline
from flaxcls.perf.traffic import traffic
from flaxcls.runtime import compilation_cache, sharding, topologies
from flaxcls.training.data import RunData
from flaxcls.training.program import Program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed"
)

has_cuda = any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin")))

RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 64
    config.duration = "2 epochs"
    config.data.name = "imagenet2012"
    config.data.dir = "/nowhere"
    config.data.eval_split = "validation"
    config.image_size = 8
    config.model.name = "dense"
    config.model.widths = (32,)
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    """The file of a recipe whose data are not on this machine."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def plan(run_main):
    """Runs `python -m flaxcls.plan` on two CPU devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return partial(run_main, module="flaxcls.plan", env=environment)


def dense_config(tiny_config, **changes):
    """64 -> 512 -> 256 -> 5, 512 images at a time."""
    changes = {"model__widths": (512, 256), "batch_size": 512, **changes}
    return tiny_config(**{"data__num_examples": 2048, **changes})


PARAMETERS = 64 * 512 + 512 + 512 * 256 + 256 + 256 * 5 + 5


def test_figures_are_those_computed_by_hand(tiny_config):
    (plan,) = Planner(dense_config(tiny_config, ema_decay=0.99), None).plan()
    products = (64 * 512, 512 * 256, 256 * 5)
    # Forward, the gradient by the kernels, and by the inputs of all layers but the first.
    flops = 2 * (2 * sum(products) + sum(products[1:]))
    assert plan.per_image(plan.flops) == pytest.approx(flops, rel=0.05)
    assert plan.batch_size == 512 and plan.chips == 8 and plan.image_size == (8, 8)
    assert plan.memory.parts["parameters"] == 4 * PARAMETERS
    assert plan.memory.parts["average (EMA)"] == 4 * PARAMETERS
    momentum = plan.memory.parts["optimizer state"] - 4 * PARAMETERS
    assert 0 <= momentum < 100  # and counters
    assert plan.memory.parts["data kept on the chip"] == 2048 * (64 + 4)
    assert plan.memory.peak > sum(plan.memory.parts.values())
    (gradient,) = plan.collectives
    assert gradient.kind == "all-reduce"
    assert 0 <= gradient.bytes - 4 * PARAMETERS < 1000  # and the metrics' sums


def test_fsdp_shards_the_state_and_gathers_it(tiny_config):
    planner = Planner(dense_config(tiny_config), None)
    (whole,), (sharded,) = planner.plan(), planner.plan(Variant(fsdp=8))
    large = 4 * (64 * 512 + 512 * 256)  # of the parameters; the rest is too small to be split
    saved = whole.memory.parts["parameters"] - sharded.memory.parts["parameters"]
    assert saved == large * 7 // 8
    gathered = {found.kind: found.bytes for found in sharded.collectives}["all-gather"]
    assert gathered >= large


def test_recipe_with_several_image_sizes_is_planned_for_each(tiny_config):
    sizes = (("0 steps", 12), ("9 steps", 16))
    config = dense_config(tiny_config, image_size=sizes, model__name="quick")
    del config.model.widths
    plans = Planner(config, None).plan()
    assert [(plan.image_size, plan.steps) for plan in plans] == [((12, 12), 9), ((16, 16), 3)]
    assert plans[1].flops > 1.5 * plans[0].flops


@pytest.mark.parametrize("image_size", [None, 8])  # resident and streamed
def test_step_is_compiled_the_same_without_its_data(tiny_config, image_size):
    crop = "random_resized_crop" if image_size else None
    config = tiny_config(image_size=image_size, crop__name=crop, loss__class_weights="balanced")
    config.data.mean, config.data.std = (0.5,), (0.25,)
    config.loss.class_weights = None
    experiment = build.make_experiment(config, build.mesh(config))
    with Program.open(experiment) as program:
        expected = program.lower().as_text()
    assert Program(experiment, RunData.unread(experiment)).lower().as_text() == expected


def test_data_that_are_not_here_are_taken_as_known(tiny_config, tmp_path):
    config = tiny_config(data__name="imagenet2012", data__dir=str(tmp_path))
    for option in ("image_shape", "num_classes", "num_examples"):
        config.data[option] = None
    source = build.source_or_description(config, "train[:50%]")
    assert (len(source), len(source.class_names)) == (640_584, 1000)
    assert source.image_shape == (None, None, 3)
    with pytest.raises(DataError, match="not on this machine"):
        source[0]
    source = build.source_or_description(config, "train+test", num_examples=70, num_classes=4)
    assert (len(source), len(source.class_names)) == (140, 4)
    config.data.name = "caltech101"
    with pytest.raises(ConfigError, match="--num_examples=N --num_classes=N"):
        build.source_or_description(config, "train")


def test_known_data_sets_are_tfds(tiny_config):
    from flaxcls.data import check_tfds_name

    for name in FACTS:
        check_tfds_name(name)


HLO = """
HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %permuted = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x)
  %done = f32[8,4]{1,0} collective-permute-done(%permuted)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %done)
}

%wrapped (q: bf16[16]) -> bf16[4] {
  %q = bf16[16]{0:T(256)} parameter(0)
  ROOT %scattered = bf16[4]{0:T(256)} reduce-scatter(%q), dimensions={0}, to_apply=%sum
}

%first_piece (r: bf16[16]) -> bf16[32] {
  %r = bf16[16]{0} parameter(0)
  %piece = bf16[32]{0} all-gather(%r), channel_id=7, x={"async_collective_fusion_config":{}}
}

%last_piece (s: bf16[16]) -> bf16[32] {
  %s = bf16[16]{0} parameter(0)
  %whole = bf16[32]{0} all-gather(%s), channel_id=7, x={"async_collective_fusion_config":{}}
}

ENTRY %main (k: f32[10], b: bf16[16]) -> f32[10] {
  %k = f32[10]{0:T(128)} parameter(0)
  %b = bf16[16]{0:T(256)} parameter(1)
  %reduced = (f32[10]{0:T(128)S(1)}, /*index=1*/bf16[16]{0}) all-reduce(%k, %b), to_apply=%sum
  %again = f32[10]{0:T(128)} all-reduce-start(%k), channel_id=2, to_apply=%sum
  %again_done = f32[10]{0:T(128)} all-reduce-done(%again)
  %gathering = (bf16[16]{0}, bf16[64]{0}) all-gather-start(%b), channel_id=3, dimensions={0}
  %gathered = bf16[64]{0} all-gather-done(%gathering)
  %begun = ((bf16[16]{0}), bf16[4]{0}, s32[]) async-start(%b), calls=%wrapped
  %ended = bf16[4]{0} async-done(%begun), calls=%wrapped
  %first = bf16[32]{0} fusion(%b), kind=kCustom, calls=%first_piece
  %last = bf16[32]{0} fusion(%b), kind=kCustom, calls=%last_piece
  %loop = (s32[], f32[8,4]{1,0}) while(%start), body=%body, x={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[10]{0:T(128)} copy(%k)
}
"""


def test_collectives_are_read_off_the_compiled_text():
    assert hlo.collectives(Module(HLO)) == [
        ("collective-permute", 5, 5 * 8 * 4 * 4),
        ("all-gather", 2, 128 + 64),
        ("all-reduce", 2, (40 + 32) + 40),
        ("reduce-scatter", 1, 32),
    ]


TRAFFIC = """
HloModule step

%fused (a: bf16[8,100], w: bf16[100,100]) -> bf16[8,100] {
  ROOT %product = bf16[8,100]{1,0:T(8,128)(2,1)} convolution(%a, %w), dim_labels=bf_io->bf
}

%body (p: (s32[], f32[128])) -> (s32[], f32[128]) {
  %x = f32[128]{0:T(128)} get-tuple-element(%p), index=1
  %negative = f32[128]{0:T(128)} negate(%x)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=0
  %two = s32[]{:S(6)} constant(2)
  %added = s32[]{:S(6)} add(%i, %two)
  ROOT %next = (s32[], f32[128]{0:T(128)}) tuple(%added, %negative)
}

%goes_on (q: (s32[], f32[128])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

ENTRY %main (a: bf16[8,100], w: bf16[100,100]) -> bf16[8,100] {
  %a = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[104,128]{1,0:T(8,128)} parameter(1)
  %begun = (f32[104,128]{1,0:T(8,128)S(1)}, f32[104,128]{1,0:T(8,128)}, u32[]) copy-start(%w)
  %near = f32[104,128]{1,0:T(8,128)S(1)} copy-done(%begun)
  %half = ((bf16[8,100]{1,0:T(8,128)(2,1)}), bf16[4,100]{1,0:T(4,128)S(1)}, s32[]) slice-start(%a)
  %done = bf16[4,100]{1,0:T(4,128)S(1)} slice-done(%half)
  %loop = (s32[], f32[128]{0}) while(%start), condition=%goes_on, body=%body
  ROOT %y = bf16[8,100]{1,0:T(8,128)(2,1)} fusion(%a, %near), kind=kOutput, calls=%fused
}
"""


def test_memory_traffic_is_read_off_the_compiled_text():
    map_, weights = 8 * 128 * 2, 104 * 128 * 4
    assert traffic(Module(TRAFFIC)) == [
        ("copies", 2, weights + map_ // 2, 0),
        ("convolutions", 1, map_, map_),
        ("others", 9, 3 * (512 + 4 + 4), 3 * (512 + 1)),  # and the counter
    ]


SLICES = """
HloModule step

%fused (p: f32[1000], i: s32[4]) -> f32[4] {
  %p = f32[1000]{0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %begin = f32[4]{0} slice(%p), slice={[0:4]}
  %taken = f32[4]{0} gather(%p, %i), slice_sizes={1}
  ROOT %sum = f32[4]{0} add(%begin, %taken)
}

%whole (p: f32[1000]) -> f32[] {
  %p = f32[1000]{0} parameter(0)
  %begin = f32[4]{0} slice(%p), slice={[0:4]}
  ROOT %sum = f32[] custom-call(%p, %begin)
}

ENTRY %main (a: f32[1000], i: s32[4]) -> f32[4] {
  %a = f32[1000]{0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %x = f32[4]{0} fusion(%a, %i), kind=kLoop, calls=%fused
  %y = f32[] fusion(%a), kind=kLoop, calls=%whole
  ROOT %z = f32[10]{0} dynamic-slice(%a, %y), dynamic_slice_sizes={10}
}
"""


def test_of_an_array_that_is_sliced_the_slices_are_read():
    fused, whole, alone = (16 + 16) + 16, 4000, 40 + 4
    assert traffic(Module(SLICES)) == [("others", 3, fused + whole + alone, 16 + 4 + 40)]


UPDATES = """
HloModule step

%updated (p: f32[1000], u: f32[4], i: s32[]) -> (f32[1000], f32[4]) {
  %p = f32[1000]{0} parameter(0)
  %u = f32[4]{0} parameter(1)
  %i = s32[] parameter(2)
  %first = f32[1000]{0} dynamic-update-slice(%p, %u, %i)
  %old = f32[1000]{0} bitcast(%first)
  %new = f32[1000]{0} dynamic-update-slice(%old, %u, %i)
  ROOT %both = (f32[1000]{0}, f32[4]{0}) tuple(%new, %u)
}

%filled (v: f32[4]) -> f32[1000] {
  %v = f32[4]{0} parameter(0)
  %nought = f32[1000]{0} broadcast()
  ROOT %new = f32[1000]{0} dynamic-update-slice(%nought, %v, %v)
}

%inner (q: f32[1000], j: s32[]) -> f32[4] {
  %j = s32[] parameter(1)
  %q = f32[1000]{0} parameter(0)
  %padded = f32[1004]{0} pad(%q), padding=0_4
  ROOT %part = f32[4]{0} dynamic-slice(%padded, %j), dynamic_slice_sizes={4}
}

%outer (r: f32[1000], k: s32[]) -> f32[4] {
  %r = f32[1000]{0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %taken = f32[4]{0} fusion(%r, %k), kind=kLoop, calls=%inner
}

ENTRY %main (a: f32[1000], b: f32[4], i: s32[]) -> f32[4] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %i = s32[] parameter(2)
  %x = (f32[1000]{0}, f32[4]{0}) fusion(%a, %b, %i), kind=kLoop, calls=%updated
  %y = f32[1000]{0} fusion(%b), kind=kLoop, calls=%filled
  ROOT %z = f32[4]{0} fusion(%y, %i), kind=kLoop, calls=%outer
}
"""


def test_of_an_array_that_is_updated_what_is_new_is_written():
    read = (16 + 4) + 16 + (16 + 4)
    assert traffic(Module(UPDATES)) == [("others", 3, read, (2 * 16 + 16) + 4000 + 16)]


def test_memory_traffic_of_a_compiled_program():
    shape = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    compiled = jax.jit(lambda x: x.T @ jnp.ones_like(x)).lower(shape).compile()
    found = traffic(Module(compiled.as_text()))
    assert found and all(one.read >= 0 and one.written > 0 for one in found)


def test_collectives_of_a_compiled_program():
    mesh = sharding.make_mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=sharding.everywhere(mesh))
    assert hlo.collectives(Module(total.lower(shape).compile().as_text())) == [
        ("all-reduce", 1, 128)
    ]


def test_chips_are_found_by_the_whole_name():
    assert devices.find("TPU v5 lite").peak_tflops == 197
    assert devices.find("NVIDIA H100 80GB HBM3").hbm_bandwidth == 3.35e12
    assert devices.find("NVIDIA H100 PCIe") is None and devices.find("cpu") is None


def test_all_gpus_that_are_planned_for_have_peaks():
    for name, gpu in topologies.GPUS.items():
        assert devices.find(gpu.name).name.startswith(name)
        # A GB is 10**9 bytes to some makers and 2**30 to others.
        assert gpu.memory == pytest.approx(2**30 * devices.find(gpu.name).hbm_gb, rel=0.07)


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, 0.75),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, 0.9),
        ({"XLA_CLIENT_MEM_FRACTION": ".5"}, 0.5),
    ],
)
def test_programs_get_the_share_of_a_gpu_that_jax_takes(monkeypatch, environment, share):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def mesh(kind, platform):
        device = SimpleNamespace(device_kind=kind, platform=platform)
        return SimpleNamespace(devices=np.array([device]))

    assert available(mesh("NVIDIA H100 80GB HBM3", "gpu")) == share * 80 * 2**30
    assert available(mesh("TPU v5 lite", "tpu")) == 16 * 2**30
    assert available(mesh("cpu", "cpu")) is None


ROOFLINE = """
HloModule step

%fused (p: bf16[100,100], q: bf16[100,100]) -> bf16[100,100] {
  %p = bf16[100,100]{1,0} parameter(0)
  %q = bf16[100,100]{1,0} parameter(1)
  ROOT %y = bf16[100,100]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[100,100]) -> bf16[100,100] {
  %a = bf16[100,100]{1,0} parameter(0)
  %x = bf16[100,100]{1,0} fusion(%a, %a), kind=kOutput, calls=%fused
  %start = (bf16[100,100]{1,0:S(1)}, bf16[100,100]{1,0}, u32[]) copy-start(%x)
  %fast = bf16[100,100]{1,0:S(1)} copy-done(%start)
  %y = bf16[100,100]{1,0:S(1)} custom-call(%fast), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"5000000","bytes_accessed":"1"}}}
  ROOT %z = bf16[100,100]{1,0} add(%y, %y)
}
"""


@pytest.mark.parametrize(
    ("tflops", "gbps", "expected"),
    [
        # The product moves 60 kB, the kernel nothing, the sum 20 kB, beside a copy of 20 kB.
        (2, 100, (4e-6, 1e-6, (2e6 + 5e6) / 2e12 + 2e-7)),
        (2, 10, (4e-6, 1e-5, 6e-6 + 5e6 / 2e12 + 2e-6)),
        (1e9, 10, (8e-15, 1e-5, 8e-6)),
    ],
)
def test_roofline_is_by_flops_memory_and_each_operator(tflops, gbps, expected):
    chip = devices.Chip("a", peak_tflops=tflops, hbm_gb=1, hbm_gbps=gbps, source="")
    found = roofline(Module(ROOFLINE.replace("\\\n", "")), chip, 8e6)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found.seconds == max(found)


def test_rate_is_that_of_the_roofline():
    def step(seconds):
        fields = dict.fromkeys(("chip", "available", "xla_bytes", "memory", "collectives"))
        times = Roofline(seconds, 1e-3, 1e-4)
        return StepPlan((8, 8), 10, False, 64, 4, flops=1, seconds=1, roofline=times, **fields)

    assert step(2e-3).rate == 32_000 and step(2e-5).rate == 64_000
    assert step(2e-3).per_image(16) == 1
    assert image_seconds([step(2e-3), step(1e-2)]) == pytest.approx(6e-3 / 64)


def test_compiler_says_how_much_is_missing():
    sentence = (
        "the total memory required for HLO temporaries (27.94G) exceeds available HBM (15.75G)"
    )
    assert str(TooLarge.by_compiler(sentence)) == "needs 27.94 GiB of the 15.75 that programs get"
    assert str(TooLarge.by_compiler("no")) == "does not fit into a chip's memory"


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        ("v5x:2x2", "there is no kind of chip 'v5x', did you mean"),
        ("v5e:3x3", "v5e has no slice of 3x3 chips, but 1x1, 2x2, 2x4"),
        ("v5e:2x2x2", "must name a slice, such as v5e:2x2"),
        ("v5p", "must name a slice, such as v5p:2x2x1"),
        ("v5p:0x2x1", "must name a slice, such as v5p:2x2x1"),
        ("l4:8", "of GPUs that are not there a100, h100, h200, b200 can be planned for"),
        ("H100:8", "there is no kind of chip 'H100', did you mean 'h100'"),
        ("h100", "must name a number of GPUs, such as h100:8"),
        ("h100:2x2", "must name a number of GPUs, such as h100:8"),
        ("h100:0", "must name a number of GPUs, such as h100:8"),
        ("a100:12", "12 GPUs are not at most 8, nor hosts of 8 each"),
    ],
)
def test_slice_that_does_not_exist_is_an_error(topology, sentence):
    with pytest.raises(ConfigError, match=sentence):
        topologies.check(topology)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "--topology=NAME is missing, such as v5e:2x2, h100:8 or local"),
        ("--topology=local,l4:8", "--topology=l4:8: of GPUs that are not there a100, h100,"),
        ("--topology=local --num_examples=3", "--num_examples and --num_classes go together"),
        ("--topology=local --json=/nowhere/x", "--json=/nowhere/x is in a folder that does not"),
        ("--topology=local --tune", "--tune compares by peaks, which are not known of local"),
        ("--topology=local --config.mesh.cpu_devices=3", "config.batch_size (divided by"),
    ],
)
def test_wrong_command_line_is_one_sentence(plan, recipe, arguments, sentence):
    result = plan(f"--config={recipe}", *arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"flaxcls: {sentence}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="it is installed")
def test_missing_compiler_is_named(plan, recipe):
    result = plan(f"--config={recipe}", "--topology=v5e:2x2")
    assert (result.returncode, result.stdout) == (2, "")
    assert "pip install 'flaxcls[plan]'" in result.stderr


@pytest.mark.skipif(has_cuda, reason="it is installed")
def test_missing_compiler_for_gpus_is_named(plan, recipe):
    result = plan(f"--config={recipe}", "--topology=h100:8")
    assert (result.returncode, result.stdout) == (2, "")
    assert "pip install 'flaxcls[cuda]'" in result.stderr


@pytest.mark.skipif(not has_cuda, reason="XLA for NVIDIA GPUs is not installed")
@pytest.mark.slow
def test_gpus_are_planned_for_without_one(plan, recipe, tmp_path):
    report = tmp_path / "plan.json"
    topologies = "--topology=h100:2,a100:1,h200:16"
    result = plan(f"--config={recipe}", topologies, "--batch_per_chip=32", f"--json={report}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" GFLOP, read off the program") == 3
    assert result.stdout.count(": fits, 0.") == 3
    parameters = 8 * 8 * 3 * 32 + 32 + 32 * 1000 + 1000
    flops = 2 * (2 * 8 * 8 * 3 * 32 + 3 * 32 * 1000)
    plans = json.loads(report.read_text())["plans"]
    assert [(each["chip"]["name"]) for each in plans] == ["h100", "a100-80gb", "h200"]
    for each, chips in zip(plans, (2, 1, 16), strict=True):
        figures = each["variants"][0]["steps"][0]
        assert figures["batch_size"]["value"] == 32 * chips
        assert figures["memory: parameters"]["value"] == 4 * parameters
        assert figures["flops"]["value"] == pytest.approx(flops, rel=0.01)
        assert ("all-reduce: count" in figures) == (chips > 1)
        assert figures["memory: available"]["value"] == 0.75 * each["chip"]["hbm_gb"] * 2**30


def test_this_machine_is_planned_for_without_data(plan, recipe, tmp_path):
    report = tmp_path / "plan.json"
    flags = ("--topology=local", "--config.mesh.cpu_devices=2", f"--json={report}")
    result = plan(f"--config={recipe}", *flags)
    assert result.returncode == 0, result.stderr
    assert "1,281,167 images of 1,000 classes (train); not on this machine" in result.stdout
    assert "64 images of 8 x 8 a step, 32 a chip; compiled in " in result.stdout
    assert "the peaks of these devices are not known" in result.stdout
    content = json.loads(report.read_text())
    (planned,) = content["plans"]
    figures = planned["variants"][0]["steps"][0]
    parameters = 8 * 8 * 3 * 32 + 32 + 32 * 1000 + 1000
    assert figures["memory: parameters"] == {"value": 4 * parameters, "unit": "bytes/chip"}
    assert figures["steps"]["value"] == round(2 * 1_281_167 / 64)
    assert planned["config"]["batch_size"] == 64 and content["versions"]["jax"] == jax.__version__


@needs_libtpu
@pytest.mark.slow
def test_tpus_are_planned_for_without_one(plan, recipe, tmp_path):
    report = tmp_path / "plan.json"
    slices = ("--topology=v5e:2x2,v4:2x2x1", "--topology=v5p:2x2x1")
    result = plan(f"--config={recipe}", *slices, "--batch_per_chip=32", f"--json={report}")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == ["compiling the recipe ..."] * 3
    assert result.stdout.count("128 images of 8 x 8 a step, 32 a chip") == 3
    assert result.stdout.count(": fits, 0.") == 3 and "chip-hours" in result.stdout
    content = json.loads(report.read_text())
    assert [planned["chip"]["name"] for planned in content["plans"]] == ["v5e", "v4", "v5p"]
    parameters = 8 * 8 * 3 * 32 + 32 + 32 * 1000 + 1000
    for planned in content["plans"]:
        figures = planned["variants"][0]["steps"][0]
        # bfloat16 gradients of the kernels are summed as such.
        assert 2 * parameters <= figures["all-reduce: bytes"]["value"] <= 4 * parameters + 1000
        assert figures["roofline_rate"]["value"] > 0


@pytest.fixture
def tpu_planner(tiny_config, tpu_compiler):
    """Makes a Planner for v5e:2x2."""
    return lambda **changes: Planner(tiny_config(**changes), topologies.devices("v5e:2x2"))


@pytest.mark.slow
def test_state_that_is_too_large_fits_sharded(tpu_planner):
    planner = tpu_planner(model__widths=(45_000, 45_000))  # 8 GB, twice
    with pytest.raises(TooLarge, match=r"needs [\d.]+ GiB of the 15.75 that programs get"):
        planner.plan()
    (found,) = planner.remedies()
    assert found.variant == Variant(fsdp=4) and found.fits


@pytest.mark.slow
def test_batch_that_is_too_large_is_halved_until_it_fits(tpu_planner):
    config = {"batch_size": 2**20, "data__num_examples": 2**20, "model__widths": (2**15,)}
    *others, found = tpu_planner(**config).smaller_batches()
    assert found.fits and not any(one.fits for one in others)
    assert found.variant.batch_per_chip == 2 ** (17 - len(others))


@pytest.mark.slow
def test_attention_is_a_kernel_forward_and_backward(tiny_config, tpu_compiler):
    config = tiny_config(model__name="vit", model__dtype="bfloat16")
    del config.model.widths
    config.model.update({"width": 128, "heads": 2, "depth": 1, "patch": 4})
    experiment = build.make_experiment(config, build.mesh(config, topologies.devices("v5e:2x2")))
    with compilation_cache.unused():
        text = Program(experiment, RunData.unread(experiment)).lower().compile().as_text()
    calls = re.findall(r"%(attention\w*?)[.\d]* = .* custom_call_target=\"tpu_custom_call\"", text)
    assert sorted(calls) == ["attention", "attention_gradient"]


@pytest.mark.slow
def test_tuning_sorts_what_it_tried(tpu_planner):
    tried = tpu_planner(data__num_examples=24).tune()
    speeds = [image_seconds(one.result) for one in tried if one.fits]
    assert speeds == sorted(speeds) and len(speeds) == 4  # two batches, two options
    assert [one.fits for one in tried] == [True] * 4 + [False]
    assert "is larger than the training split" in str(tried[-1].result)
