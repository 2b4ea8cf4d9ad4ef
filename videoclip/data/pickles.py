"""Pickles and torch files of strangers, read without running anything that they name.

A pickle is a program: opening one with Python's own `pickle` runs whatever its writer wanted. Here a name in the file
stands either for one of a few makers written below (plain containers, NumPy arrays, torch tensors) or for `Inert`, a
class that does nothing, and nothing is ever imported. Nothing is allocated that is larger than the file.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from videoclip.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a torch file from before 1.6
STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class Inert:
    """Stands for an instance of whatever class a file names; made with any arguments, it keeps nothing of them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing of the arguments is used."""


class _Kind:
    """A NumPy dtype in the making; only plain numbers are known."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code if isinstance(code, str) else code.decode("ascii")
        self.order = "="

    def set_state(self, state: tuple[Any, ...]) -> None:
        """The byte order is the second of what NumPy pickles of a dtype."""
        self.order = state[1]

    def made(self) -> np.dtype:
        """The dtype. Raises UnpicklingError for anything but plain numbers."""
        order = "=" if self.order == "|" else self.order
        if not re.fullmatch(r"[fiub]\d{1,2}|\?", self.code) or order not in ("=", "<", ">"):
            raise pickle.UnpicklingError(f"an array of {self.code!r}; only numbers are read")
        return np.dtype(order + self.code)


class _Array(np.ndarray):
    """A NumPy array in the making. It was empty when its pickle made it; `set_state` gives it shape and numbers."""

    content: np.ndarray

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Shape, kind of numbers, their order, and the numbers themselves, as NumPy pickles an array."""
        *_, shape, kind, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # as Python 2 wrote bytes
        self.content = _numbers(raw, kind, shape, "F" if fortran else "C")


def _numbers(raw: bytes | bytearray, kind: _Kind, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    return np.frombuffer(raw, kind.made()).reshape(shape, order="F" if order == "F" else "C")


def _empty(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, (0,))


def _number(kind: _Kind, raw: bytes | str) -> Any:
    return _numbers(raw.encode("latin1") if isinstance(raw, str) else raw, kind, ())[()]


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """OrderedDict, which Python 2 made of a list of pairs."""
    return dict(*arguments)


def _default_mapping(_: Any = None, *arguments: Any) -> dict[Any, Any]:
    return dict(*arguments)


def _bytes(value: Any = b"", encoding: str = "latin1") -> bytes:
    """`bytes` and `_codecs.encode`; never of a number, which would be that many zeros."""
    return value.encode("latin1") if isinstance(value, str) and encoding == "latin1" else b"".join([value])


def _instance(*_: Any) -> Inert:
    return Inert()


def _tensor(flat: np.ndarray, offset: int, size: Iterable[int], stride: Iterable[int], *_: Any) -> Tensor:
    """`_rebuild_tensor_v2`: a view of the numbers of one storage, which has at least as many as the tensor."""
    size = tuple(size)
    if math.prod(size) > len(flat):
        raise pickle.UnpicklingError(f"a tensor {size} of {len(flat)} numbers")
    return torch.from_numpy(flat).as_strided(size, tuple(stride), offset)


def _storage_of_bytes(raw: bytes) -> np.ndarray:
    """The storage of a tensor that was pickled without torch.save: a small torch file inside the pickle."""
    return _read_legacy(io.BytesIO(raw), len(raw))


def _text(value: str = "") -> str:
    if not isinstance(value, str):  # the text of anything else could be longer than any file
        raise pickle.UnpicklingError("a text made of something else")
    return value


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


# What a name in a file stands for. Module names of Python 2 and of NumPy 1 and 2.
MAKERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _default_mapping,
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _Kind,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage_of_bytes,
    ("torch", "Size"): tuple,
}
for _core in ("numpy.core", "numpy._core"):
    MAKERS[f"{_core}.multiarray", "_reconstruct"] = _empty
    MAKERS[f"{_core}.multiarray", "scalar"] = _number
    MAKERS[f"{_core}.numeric", "_frombuffer"] = _numbers
for _builtins in ("builtins", "__builtin__"):
    MAKERS |= {(_builtins, kind.__name__): kind for kind in (set, frozenset, int, float, bool)}
    MAKERS |= {(_builtins, "long"): int, (_builtins, "bytes"): _bytes}
    MAKERS |= {(_builtins, name): _text for name in ("str", "unicode")}
for _registry in ("copyreg", "copy_reg"):
    MAKERS[_registry, "_reconstructor"] = _instance


class _Unpickler(pickle._Unpickler):
    """Makes what `MAKERS` can make. Storages are looked up by `storage`, where the file is torch's.

    Python's own unpickler, not the one in C, whose memory grows to whatever place in its memo a file names.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, encoding: str, storage: Callable[[tuple[Any, ...]], np.ndarray] | None = None):
        super().__init__(file, encoding=encoding)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """One of our makers, or `Inert`: what the file names is never imported."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return MAKERS.get((module, name), Inert)

    def persistent_load(self, identity: Any) -> np.ndarray:
        """The storage of a tensor, where there can be one. Raises UnpicklingError for anything else."""
        if self.storage is None or not isinstance(identity, tuple) or identity[0] != "storage":
            raise pickle.UnpicklingError("a reference to something outside of the file")
        if not isinstance(identity[1], np.dtype):
            raise pickle.UnpicklingError("a storage of unknown numbers")
        return self.storage(identity)

    def load_build(self) -> None:
        """State goes to arrays alone: anything else would let a file set attributes of what is ours."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], (_Array, _Kind)):
            self.stack[-1].set_state(state)

    def load_bytearray8(self) -> None:
        """As inherited, without making room first for as many bytes as a file says there are."""
        self.append(bytearray(self.read(struct.unpack("<Q", self.read(8))[0])))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    for _extension in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_extension[0]]


def read_pickle(path: Path | str) -> Any:
    """What a pickle holds: containers, texts, numbers and NumPy arrays; anything else has become `Inert`.

    Files of Python 2 are read as well. Raises InputError if the file is missing, damaged or no pickle.
    """
    path = Path(path)
    with _mapped(path) as file:
        for encoding in ("ASCII", "latin1"):
            file.seek(0)
            try:
                return _settled(_Unpickler(file, encoding).load(), {})
            except UnicodeDecodeError:
                continue  # bytes of Python 2, which only latin1 takes as they are
            except Exception as error:  # a pickle can go wrong in any way that Python can
                raise _unreadable(path, error) from None
    raise InputError(f"{path}: texts in an unknown encoding")


def read_torch_file(path: Path | str) -> Any:
    """What `torch.save` wrote, in either of its formats: as `read_pickle`, with tensors on the CPU.

    Raises InputError if the file is missing, damaged, or not torch's.
    """
    path = Path(path)
    with _mapped(path) as file:
        try:
            if file[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(path) as archive:
                    return _settled(_read_zipped(archive), {})
            return _settled(_read_legacy(file, len(file)), {})
        except Exception as error:  # as above, and zip files besides
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{path}: cannot be read safely ({reason})")


def _mapped(path: Path) -> mmap.mmap:
    """The file as memory: reads beyond its end give what is there, and nothing is allocated beforehand."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_zipped(archive: zipfile.ZipFile) -> Any:
    name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if name is None:
        raise pickle.UnpicklingError("a zip file without data.pkl")
    folder = name.removesuffix("data.pkl")

    def entry(name: str) -> bytes:
        """The bytes of one file of the archive, stored as they are."""
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("compressed entries, which torch never writes")
        return archive.read(name)

    if f"{folder}byteorder" in archive.namelist() and entry(f"{folder}byteorder") != b"little":
        raise pickle.UnpicklingError("numbers of a big-endian machine")
    kept: dict[str, np.ndarray] = {}

    def storage(identity: tuple[Any, ...]) -> np.ndarray:
        """The numbers of one storage, read once and shared by its tensors."""
        _, kind, key, _, count = identity[:5]
        if key not in kept:
            kept[key] = np.frombuffer(bytearray(entry(f"{folder}data/{key}")), kind)
        return kept[key][:count]

    return _Unpickler(io.BytesIO(entry(name)), "utf-8", storage).load()


def _read_legacy(file: mmap.mmap | io.BytesIO, size: int) -> Any:
    """Three small pickles, the object, the keys of its storages, and then their numbers, one after the other."""
    if _Unpickler(file, "utf-8").load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError("not a file that torch wrote")
    _Unpickler(file, "utf-8").load()  # version of the protocol
    if not _Unpickler(file, "utf-8").load().get("little_endian", True):
        raise pickle.UnpicklingError("numbers of a big-endian machine")
    kept: dict[str, np.ndarray] = {}

    def storage(identity: tuple[Any, ...]) -> np.ndarray:
        """Room for the numbers, which come behind the object; all rooms together fit into the file."""
        _, kind, key, _, count, *view = identity
        if key not in kept:
            if any(view) or count < 0 or sum(array.nbytes for array in kept.values()) + kind.itemsize * count > size:
                raise pickle.UnpicklingError(f"a storage of {count} numbers in a file of {size} bytes")
            kept[key] = np.zeros(count, kind)
        return kept[key]

    value = _Unpickler(file, "utf-8", storage).load()
    for key in _Unpickler(file, "utf-8").load():
        if struct.unpack("<q", file.read(8)) != (len(kept[key]),):
            raise pickle.UnpicklingError(f"storage {key} has another size than its tensor says")
        raw = file.read(kept[key].nbytes)
        if len(raw) != kept[key].nbytes:
            raise pickle.UnpicklingError(f"storage {key} is cut off")
        kept[key][:] = np.frombuffer(raw, kept[key].dtype)  # tensors are views of it
    return value


def _settled(value: Any, seen: dict[int, Any]) -> Any:
    """The same value with finished arrays in place of those in the making; containers keep their identity."""
    if isinstance(value, _Array):
        return value.content
    if id(value) in seen or not isinstance(value, (dict, list, tuple)):
        return seen.get(id(value), value)
    seen[id(value)] = value
    if isinstance(value, dict):
        for key in value:
            value[key] = _settled(value[key], seen)
    elif isinstance(value, list):
        value[:] = [_settled(item, seen) for item in value]
    else:
        seen[id(value)] = tuple(_settled(item, seen) for item in value)
    return seen[id(value)]


def tensors_by_name(value: Any, path: Path) -> dict[str, Tensor]:
    """Check that `value` is a state dict.

    Raises InputError if it is anything else.
    """
    if not isinstance(value, Mapping) or not value or not all(isinstance(item, Tensor) for item in value.values()):
        raise InputError(f"{path}: expected tensors by name under state_dict")
    return {str(name): tensor for name, tensor in value.items()}
