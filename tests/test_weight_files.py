"""Files of weights: what PyTorch saves is read without PyTorch, and nothing in it runs."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from flaxcls.errors import ConfigError
from flaxcls.weights.files import read_weights


def test_state_dict_of_pytorch_is_read_as_it_is(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "layer.weight": base,
        "layer.transposed": base.t(),  # strides of its own
        "layer.part": base[1:3, 2:],  # an offset
        "norm.num_batches_tracked": torch.tensor(3),
        "half": base.half(),
        "brain": base.bfloat16(),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    for wrapped in (
        state,
        {"epoch": 3, "state_dict": state},
        {"module." + k: state[k] for k in state},
    ):
        for as_archive in (True, False):  # as since PyTorch 1.6, and as before
            path = tmp_path / "weights.pth"
            torch.save(wrapped, path, _use_new_zipfile_serialization=as_archive)
            arrays = read_weights(path)
            assert arrays.keys() == state.keys()
            for name, tensor in state.items():
                np.testing.assert_array_equal(
                    np.asarray(arrays[name], np.float64), tensor.detach().double().numpy()
                )


def test_safetensors_is_read(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    numpy.save_file(state, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(read_weights(tmp_path / "w.safetensors")["a"], state["a"])


def pth(path, content, **files):
    """A file as PyTorch makes it, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in files.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_file_that_would_run_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for thing in (Malicious(), {"a": Malicious()}, [print], {"state_dict": [Malicious()]}):
        path = pth(tmp_path / "evil.pth", pickle.dumps(thing))
        with pytest.raises(ConfigError, match="evil.pth is refused: it asks for .*tensors only"):
            read_weights(path)
    magic = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    for thing in (magic[:1], magic, ()):  # as before PyTorch 1.6: the first, the fourth, any
        path.write_bytes(b"".join(map(pickle.dumps, (*thing, {"a": Malicious()}))))
        with pytest.raises(ConfigError, match="evil.pth is refused: it asks for .*tensors only"):
            read_weights(path)
    assert not (tmp_path / "ran").exists()


def test_tensor_beyond_its_bytes_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (root,) = (n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("data.pkl"))
        content, data = archive.read(f"{root}data.pkl"), archive.read(f"{root}data/0")
    assert read_weights(pth(tmp_path / "w.pth", content, **{"0": data}))["a"].shape == (4,)
    for cut in (0, 12):
        with pytest.raises(ConfigError, match="w.pth"):
            read_weights(pth(tmp_path / "w.pth", content, **{"0": data[:cut]}))


def test_old_file_that_is_cut_off_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    state = {"a": torch.zeros(400), "b": torch.ones(3)}
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    for size in (9, 40, 300, len(content) - 1700, len(content) - 2):
        (tmp_path / "w.pth").write_bytes(content[:size])
        with pytest.raises(ConfigError, match="w.pth is not a readable file of weights"):
            read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a readable file of weights: it does not begin as torch.save's do"),
        (b"no zip", "is not a readable file of weights: it does not begin as torch.save's do"),
        (None, "can't be read: No such file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read_weights(tmp_path / "w.pth")


def test_archive_without_tensors_is_refused(tmp_path):
    for thing in ({"epoch": 3}, [1, 2], "text"):
        with pytest.raises(ConfigError, match="holds no state dict"):
            read_weights(pth(tmp_path / "w.pth", pickle.dumps(thing)))
    with pytest.raises(ConfigError, match="is not a readable file of weights"):
        read_weights(pth(tmp_path / "w.pth", b"\x80\x04broken"))
