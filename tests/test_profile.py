"""config.profile traces a range of steps, says what took the time, and changes nothing else."""

import contextlib
import gzip
import json
import re
import signal
import time

import jax
import pytest
from jax.profiler import ProfileData

from flaxcls import build
from flaxcls.errors import ConfigError
from flaxcls.runtime import sharding, trace
from flaxcls.training.profile import Profile, operator_table

STEPS = ("--config.profile.start=4 steps", "--config.profile.stop=50%")  # 4 to 6 of 12


def traces(workdir):
    return sorted((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_range_of_steps_is_traced_and_changes_no_number(run_main, recipe, tmp_path):
    traced, plain = tmp_path / "traced", tmp_path / "plain"
    result = run_main(f"--config={recipe}", f"--workdir={traced}", *STEPS)
    assert result.returncode == 0, result.stderr
    assert run_main(f"--config={recipe}", f"--workdir={plain}").returncode == 0
    assert (traced / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert not (plain / "profile").exists()

    assert "traced 2 steps, from 5 to 6; written in" in result.stdout
    rows = re.findall(r"^ *([\d.]+) % +([\d.]+) +([\d,]+)  (\S+)(.*)", result.stdout, re.MULTILINE)
    assert sum(float(share) for share, *_ in rows) == pytest.approx(100, abs=2)
    named = [row for row in rows if row[4].strip() and not row[4].endswith("others")]
    assert named and all(int(row[2]) == 2 * 2 for row in named)  # two steps on two devices
    assert any("jit(update)/" in row[4] for row in named)

    (path,) = traces(traced)
    with gzip.open(path.with_name("perfetto_trace.json.gz")) as file:
        events = json.load(file)["traceEvents"]
    assert {"train"} <= {event.get("name") for event in events}


def test_finished_run_that_is_made_longer_is_not_traced_again(run_main, recipe, tmp_path):
    arguments = (f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    assert run_main(*arguments).returncode == 0
    result = run_main(*arguments, *STEPS, "--config.duration=16 steps")
    assert result.returncode == 0, result.stderr
    assert "traced" not in result.stdout and not traces(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_inside_of_the_range_keeps_the_trace_and_the_run(
    start_main, recipe, tmp_path, number
):
    workdir = tmp_path / "run"
    arguments = (f"--config={recipe}", f"--workdir={workdir}", "--config.duration=100000 steps")
    rare = [f"--config.{name}.every=100000 steps" for name in ("eval", "checkpoint")]
    ends = ("--config.profile.start=4 steps", "--config.profile.stop=99999 steps")
    process = start_main(*arguments, *rare, *ends)
    until = time.monotonic() + 120
    while (
        not (workdir / "metrics.jsonl").exists()
        or len((workdir / "metrics.jsonl").read_text().splitlines()) < 3
    ):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGTERM: 42, signal.SIGINT: 130}[number], stderr
    assert re.search(r"traced \d+ steps, from 5 to \d+;", stdout)
    assert len(traces(workdir)) == 1 and "saved" in stderr


@pytest.mark.parametrize(
    ("start", "stop", "sentence"),
    [
        ("4 steps", None, "config.profile.stop is missing: a trace needs config.profile.start and"),
        (None, "4 steps", "config.profile.start is missing"),
        ("4 steps", "4 steps", "config.profile.start must be at least a step before config.profil"),
        ("4 steps", "3 epochs", "must be within the run, which has 12 steps, got '3 epochs'"),
        ("4 minutes", "5 steps", "config.profile.start: '4 minutes' is a time"),
        ("4 steps", "soon", "config.profile.stop: a duration is a number and a unit"),
    ],
)
def test_impossible_range_is_refused(tiny_config, start, stop, sentence):
    config = tiny_config(profile__start=start, profile__stop=stop)
    build.check(config)
    with pytest.raises(ConfigError) as raised:
        build.make_experiment(config, sharding.make_mesh())
    assert sentence in str(raised.value)


def profile(folder, said):
    return Profile(range(4, 6), folder, said.append, lambda: None, contextlib.nullcontext)


def test_run_goes_on_where_no_trace_can_be_made(tmp_path):
    said = []
    jax.profiler.start_trace(tmp_path / "users")
    with profile(tmp_path / "profile", said) as mine:
        for step in range(3, 8):
            mine.begin(step, None)
            mine.end(step + 1, None)
    jax.profiler.stop_trace()
    assert len(said) == 1 and "there will be no trace of these steps: Profile has alrea" in said[0]
    assert traces(tmp_path) == []


def test_rollback_before_the_range_ends_the_trace_and_begins_no_other(tmp_path):
    said = []
    with profile(tmp_path / "profile", said) as mine:
        mine.begin(4, None)
        mine.end(2, None)
        for step in (2, 3, 4, 5):
            mine.begin(step, None)
            mine.end(step + 1, None)
    assert len(said) == 1 and len(traces(tmp_path)) == 1


PLANE = """
planes {{
  id: {plane}
  name: "{name}"
  lines {{ id: 1 name: "{line}" {events} }}
  lines {{ id: 2 name: "Steps" events {{ metadata_id: 1 duration_ps: 9000000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "kernel" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "copy" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_module" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "hlo_op" }} }}
}}
"""


def event(metadata, begin, milliseconds, operator=""):
    """An event at so many milliseconds."""
    stats = 'stats { metadata_id: 1 str_value: "jit_update" }'
    if operator:
        stats += f' stats {{ metadata_id: 2 str_value: "{operator}" }}'
    times = f"offset_ps: {begin * 10**9} duration_ps: {milliseconds * 10**9}"
    return f"events {{ metadata_id: {metadata} {times} {stats} }}"


@pytest.mark.parametrize(
    ("device", "line"), [("/device:TPU:0", "XLA Ops"), ("/device:GPU:0", "Stream #17(Compute)")]
)
def test_operators_of_accelerators_have_their_own_time_only(tmp_path, device, line):
    events = " ".join(
        [event(1, 0, 10, "while.1"), event(1, 2, 3, "fusion.2"), event(1, 6, 3, "fusion.2")]
        + [event(2, 10, 1)]
    )
    space = PLANE.format(plane=1, name=device, line=line, events=events)
    space += PLANE.format(plane=2, name="/host:CPU", line="python", events=event(1, 0, 99, "other"))
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(space))
    found = {(o.program, o.name): (o.calls, 1e3 * o.seconds) for o in trace.operators(path)}
    assert found == {
        ("jit_update", "fusion.2"): (2, pytest.approx(6)),
        ("jit_update", "while.1"): (1, pytest.approx(4)),
        ("jit_update", "copy"): (1, pytest.approx(1)),
    }
    table = operator_table(trace.operators(path), {("jit_update", "fusion.2"): "conv1/relu"})
    assert re.search(r"54\.5 % +6\.00 +2  fusion\.2 +conv1/relu\n", table)


def test_fusion_without_a_name_has_that_of_its_result():
    text = """HloModule jit_update, is_scheduled=true

%fused (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %b = f32[2]{0} add(%a, %a), metadata={op_name="jit(update)/first"}
  ROOT %c = f32[2]{0} multiply(%b, %b), metadata={op_name="jit(update)/second"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  ROOT %fusion.1 = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
}
"""
    assert trace.origins(text)["jit_update", "fusion.1"] == "jit(update)/second"
