"""Published files of weights, read without executing them.

A pickle is a small program that may call anything. torch's `weights_only` reader lets it call a short list of names;
a file that asks for anything else is refused, with its name.
"""

import argparse
import codecs
import pathlib
import pickle
import pickletools
import re
import types
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

NOT_WEIGHTS = (  # first bytes of files that are mistaken for checkpoints
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a WAV recording"),
    (b"fLaC", "a FLAC recording"),
    (b"ID3", "an MP3 recording"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"version https://git-lfs", "a pointer that git LFS left in place of the file: run `git lfs pull`"),
    (b"<!DOCTYPE", "a web page, not what was to be downloaded"),
    (b"<html", "a web page, not what was to be downloaded"),
    (b"{", "JSON"),
)

INDEX = r"\.index(\.\w+)?\.json$"  # how the list of a sharded file's tensors is named


def _emptied(factory=None):
    """A defaultdict is read as the dict it is: torch fills no other."""
    return {}


_CORE = np.core if np.__version__ < "2" else np._core
HARMLESS = [  # what a pickle may ask for beside what torch allows: what numpy counts with, containers that do nothing
    *((kind, f"numpy.{core}.{name}") for core in ("core", "_core") for kind, name in (
        (_CORE.multiarray.scalar, "multiarray.scalar"), (_CORE.multiarray._reconstruct, "multiarray._reconstruct"),
        (_CORE.numeric._frombuffer, "numeric._frombuffer"))),
    *((type(np.dtype(kind)), f"numpy.dtypes.{type(np.dtype(kind)).__name__}")
      for kind in ("float64", "float32", "int64", "int32", "uint64", "uint32", "uint8", "bool")),
    (np.dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray"),
    (_emptied, "collections.defaultdict"),
    (argparse.Namespace, "argparse.Namespace"),
    *((kind, f"{module}.{name}") for module in ("pathlib", "pathlib._local")  # the latter: from Python 3.13 on
      for kind, names in ((pathlib.PurePosixPath, ("PosixPath", "PurePosixPath")),
                          (pathlib.PureWindowsPath, ("WindowsPath", "PureWindowsPath"))) for name in names),
    *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, tuple, int, float, str, bool)),
]  # fmt: skip
TORCHS_OWN = {  # what torch's reader allows by itself and a file of weights needs
    **{f"torch._utils.{name}": getattr(torch._utils, name)
       for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")},
    **{str(kind): kind for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)},
    "torch.Size": torch.Size, "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict, "collections.Counter": Counter, "_codecs.encode": codecs.encode,
    "builtins.set": set, "builtins.bytearray": bytearray, "builtins.complex": complex,
}  # fmt: skip
ALLOWED = {name for _, name in HARMLESS} | {"collections.OrderedDict", "collections.Counter", "_codecs.encode",
                                            "builtins.set", "builtins.bytearray", "builtins.complex"}  # fmt: skip


def file_format(path: str | Path) -> str:
    """The format of a file by its first bytes: "safetensors" or "pickle"; by its name: "index", a list of shards.

    Raises FileNotFoundError, or ValueError saying what the file is instead of a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give a file of weights")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if re.search(INDEX, path.name):
        return "index"
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip archive; a bare pickle of protocol 2 or later
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} was refused: it is a pickle under the name of safetensors; such is named .ckpt")
        if found := _other_archive(path):
            raise ValueError(f"{path} was refused: it is {found}")
        return "pickle"
    if not head:
        raise ValueError(f"{path} was refused: it is empty (0 bytes): fetch it again")
    found = next((what for start, what in NOT_WEIGHTS if head.lstrip().startswith(start)), None)
    text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    raise ValueError(f"{path} was refused: it is {found or ('text' if text else 'of no known format')}, no checkpoint")


def _other_archive(path):
    """Name a zip archive that is no checkpoint, None for one. Compressed members may grow a thousandfold."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, LookupError):
        return None
    if any(member.filename.endswith("/constants.pkl") for member in members):
        return "a program of torch.jit, no checkpoint: save the state_dict of the model"
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return "a compressed archive, as no checkpoint is: unpack it"
    return None


def unpickle(path: str | Path) -> Any:
    """Read a .pth, .pt or .ckpt file without executing it: tensors, plain containers and numbers of numpy only.

    Tensors of torch's usual format stay on disk until they are used. Raises FileNotFoundError, or ValueError naming
    what the file asks to run, or saying that it is cut or no checkpoint.
    """
    if file_format(path) != "pickle":
        raise ValueError(f"{path} was refused: it is safetensors, not a pickle")
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is read, or refused and named
            options = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}
            if _protocol(path) < 3:
                return torch.load(path, weights_only=True, **options)
            # torch's own reader knows protocol 2 only; ours takes its place, and finds no more than it does
            return torch.load(path, pickle_module=RESTRICTED, **options)
    except Exception as fault:  # a damaged file makes torch raise anything, struct.error and MemoryError among it
        names, blocked = forbidden(path), re.search(r"GLOBAL (\S+) ", str(fault))
        if blocked and not names:
            names = [blocked[1]]
        reason = f"asks to run {', '.join(names)}" if names else "is cut, damaged or no checkpoint: fetch it again"
        raise ValueError(f"{path} was refused: it {reason}") from fault


class _Restricted(pickle.Unpickler):
    """Python's reader of pickles, for protocols from 3 on, which torch's knows in part: it finds what is listed."""

    def find_class(self, module, name):
        given = [kind if isinstance(kind, tuple) else (kind, f"{kind.__module__}.{kind.__qualname__}")
                 for kind in torch.serialization.get_safe_globals()]  # fmt: skip
        allowed = {**TORCHS_OWN, **{named: kind for kind, named in given}}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return allowed[f"{module}.{name}"]


RESTRICTED = types.SimpleNamespace(  # as torch.load takes a module
    __name__="restricted", Unpickler=_Restricted, load=lambda file, **options: _Restricted(file, **options).load()
)


def _protocol(path):
    """The protocol of a pickle, by its first two bytes; 0 if it does not say."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            head = archive.open(pickled).read(2) if pickled else b""
    else:
        with open(path, "rb") as file:
            head = file.read(2)
    return head[1] if head[:1] == b"\x80" and len(head) == 2 else 0


def forbidden(path: str | Path) -> list[str]:
    """The names that a pickle would import and must not, in their order; the file is not executed."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return _imports(file)
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            return _imports(archive.open(pickled)) if pickled else []
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, LookupError):
        return []


def _imports(file):
    found = {}
    try:
        for _ in range(5):  # torch's older format is five pickles, one after the other, and then bare numbers
            strings, memo = [], {}  # memo: what the pickle noted down under a number, where it is a string
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found[argument] = None
                elif opcode.name == "STACK_GLOBAL":
                    found[" ".join(strings[-2:])] = None
                elif "UNICODE" in opcode.name or "STRING" in opcode.name:
                    strings.append(argument)
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name in ("BINGET", "LONG_BINGET"):
                    strings.append(memo.get(argument, ""))
    except Exception:  # the numbers, the end, or damage, as which pickletools may raise anything
        pass
    names = (_present_name(*f"{name} ".split(" ", 1)) for name in found)
    return [name for name in names if name not in ALLOWED and not name.startswith("torch.")]


def _present_name(module, name):
    """Python 3's public name of what a pickle, often in Python 2's words, asks for: posix.system is os.system."""
    name = name.strip()
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{'os' if module in ('posix', 'nt') else module}.{name}"
