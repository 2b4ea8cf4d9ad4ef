"""Files of strangers: tensors and arrays come out, nothing that a file names is ever run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from videoclip.data.pickles import Inert, _Kind, read_pickle, read_torch_file
from videoclip.errors import InputError


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


class Setting:
    """Somebody's own class, with a state."""

    def __init__(self) -> None:
        self.values = {"lr": 0.1}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_out_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    features = {
        "video0": [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.ones((2, 3), np.float16))],
        "video1": float("nan"),
        "video2": np.float64(2.5),
        "video3": defaultdict(list, {"words": ["a", "dog"]}),
        "video4": np.arange(4, dtype=">i2"),
        "video5": {1, 2},
    }
    (tmp_path / "features.pkl").write_bytes(pickle.dumps(features, protocol))
    read = read_pickle(tmp_path / "features.pkl")
    assert (read["video0"][0] == features["video0"][0]).all() and type(read["video0"][0]) is np.ndarray
    assert (read["video0"][1] == 1).all() and read["video0"][1].dtype == np.float16
    assert np.isnan(read["video1"]) and read["video2"] == 2.5 and read["video3"] == {"words": ["a", "dog"]}
    assert read["video4"].tolist() == [0, 1, 2, 3] and read["video5"] == {1, 2}


def test_a_pickle_of_python_2_and_old_numpy_is_read(tmp_path: Path) -> None:
    raw = np.array([1.5, 200.0], "<f4").tobytes()
    text = "".join(f"\\x{byte:02x}" for byte in raw)  # as Python 2 wrote an array's bytes: a text in quotes
    old = (
        f"(dS'video0'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        f"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'{text}'\ntbs."
    )
    (tmp_path / "old.pkl").write_bytes(old.encode())
    assert read_pickle(tmp_path / "old.pkl")["video0"].tolist() == [1.5, 200.0]


def test_nothing_that_a_file_names_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps({"video0": np.ones(2), "video1": Bomb(made)}))
    read = read_pickle(tmp_path / "bomb.pkl")
    assert isinstance(read["video1"], Inert) and (read["video0"] == 1).all() and not made.exists()
    for zipped in (True, False):
        path = tmp_path / f"bomb-{zipped}.pth"
        torch.save(
            {"state_dict": {"w": torch.ones(2)}, "config": Bomb(made)}, path, _use_new_zipfile_serialization=zipped
        )
        assert isinstance(read_torch_file(path)["config"], Inert) and not made.exists()


@pytest.mark.parametrize(
    ("what", "program"),
    [
        ("an attribute of ours", b"cnumpy\ndtype\n}(X\x04\x00\x00\x00codeI1\nub."),
        ("an eval", b"c__builtin__\neval\n(S'1/0'\ntR."),
        ("a getattr", b"cbuiltins\ngetattr\n(cbuiltins\nset\nS'__class__'\ntR."),
    ],
)
def test_what_would_reach_python_itself_stays_inert(tmp_path: Path, what: str, program: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(program)
    before = dict(vars(_Kind))
    assert isinstance(read_pickle(tmp_path / "x.pkl"), (Inert, type)), what
    assert dict(vars(_Kind)) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_both_of_torchs_formats_are_read(tmp_path: Path, zipped: bool) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    state = OrderedDict(
        a=shared, b=shared.T, c=torch.tensor(7), d=torch.nn.Parameter(torch.ones(2, dtype=torch.float16)), e=shared[1:]
    )
    path = tmp_path / "trained_model.pth"
    values = {"state_dict": state, "config": Setting(), "arguments": argparse.Namespace(a=1), "where": Path("x")}
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    read = read_torch_file(path)
    for name, tensor in state.items():
        assert torch.equal(read["state_dict"][name], tensor.detach()) and read["state_dict"][name].dtype == tensor.dtype
    assert isinstance(read["config"], Inert)


def test_tensors_in_a_plain_pickle_are_read(tmp_path: Path) -> None:
    (tmp_path / "teacher.pkl").write_bytes(pickle.dumps({"video0": {"vid_embds": torch.arange(3.0)}}))
    assert read_pickle(tmp_path / "teacher.pkl")["video0"]["vid_embds"].tolist() == [0, 1, 2]


def legacy(storage_numbers: int, tensor_numbers: int) -> bytes:
    """A file in torch's old format that claims sizes that it has not."""
    file = io.BytesIO()
    torch.save({"w": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    raw = file.getvalue()
    raw = raw.replace(b"K\x04N", b"J" + struct.pack("<i", storage_numbers) + b"N")
    return raw.replace(b"K\x00K\x04\x85", b"K\x00J" + struct.pack("<i", tensor_numbers) + b"\x85")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"not a pickle", "cannot be read safely"),
        (pickle.dumps({"a": np.ones(9)})[:-9], "cannot be read safely"),
        (pickle.dumps({"a": np.array([object()], object)}), "only numbers are read"),
        (pickle.dumps(np.zeros(1, [("a", "f4")])), "only numbers are read"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", "cannot be read safely|the file"),
        (b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"U", "cannot be read safely"),
        (b"cbuiltins\nbytes\n(I1000000000000\ntR.", "cannot be read safely"),
        (b"P1\n.", "something outside"),
    ],
)
def test_what_is_no_features_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "features.pkl").write_bytes(content)
    with pytest.raises(InputError, match=f"features.pkl: .*({message})"):
        read_pickle(tmp_path / "features.pkl")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 no zip", legacy(2**30, 4), legacy(4, 2**30), pickle.dumps({"a": 1}), legacy(4, 4)[:-3]]
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"model.pth: cannot be read safely"):
        read_torch_file(tmp_path / "model.pth")


def test_the_claimed_sizes_of_these_tests_are_what_makes_them_fail(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(legacy(4, 4))
    assert read_torch_file(tmp_path / "model.pth")["w"].tolist() == [1, 1, 1, 1]
