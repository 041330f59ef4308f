"""The tests run offline, on the CPU, on two threads at most."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import ipaddress
import socket
from functools import cache

import pytest
import torch

from refined_ldm.tokenizer import TOKENIZERS

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Nothing waits for the disk, as no test cuts the power; the installed vocabulary is read once, not by each model.

    That a file is flushed before it gets its name is tested in tests/base/test_files.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for name in ("gpt2", "small-roberta"):
            patch.setitem(TOKENIZERS, name, _installed_once(TOKENIZERS[name]))
        yield


def _installed_once(read):
    installed = cache(read)
    return lambda directory=None: installed(None) if directory is None else read(directory)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anywhere but this machine fails at once."""
    connect = socket.socket.connect

    def connect_to_loopback(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise OSError(f"tests run offline; refused a connection to {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another machine's name
        return False


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests and their commands receive Ctrl-C again
