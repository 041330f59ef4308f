"""`fetch` against a small hub on this machine, in a process of its own, and without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from refined_ldm.clap import Clap
from refined_ldm.published.hub import CONDITIONERS, PUBLISHED, fetch, how_to_get

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 90_000  # 23 MB: three of the pieces that are written at once
FETCH = "import sys; from refined_ldm.published.hub import fetch; print(fetch(sys.argv[1]))"


class Hub(BaseHTTPRequestHandler):
    """The little of the hub that a download needs; `server.break_at` cuts the first answer off after so many bytes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        self.server.seen.append((self.command, self.path, self.headers.get("Range")))
        _, owner, name, *rest = self.path.split("?")[0].split("/")
        if owner == "api":  # what the repository holds
            return self.listing()
        body = self.server.files.get(f"{owner}/{name}", {}).get("/".join(rest[2:]))
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        digest = self.server.announced or hashlib.sha256(body).hexdigest()
        for header, value in (("ETag", f'"{digest}"'), ("X-Linked-Etag", f'"{digest}"'), ("X-Repo-Commit", COMMIT),
                              ("X-Linked-Size", len(body)), ("Content-Length", len(body) - start),
                              ("Accept-Ranges", "bytes")):  # fmt: skip
            self.send_header(header, str(value))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if not with_body:
            return
        if self.server.break_at:
            self.wfile.write(body[start : self.server.break_at])
            self.wfile.flush()
            self.server.break_at = None
            return self.connection.close()
        self.wfile.write(body[start:])

    def listing(self):
        repository = "/".join(self.path.split("?")[0].split("/")[3:5])
        files = self.server.files[repository]
        tree = [{"type": "file", "path": path, "size": len(body), "oid": "0" * 40,
                 "lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 1}}
                for path, body in files.items()]  # fmt: skip
        found = tree if "/tree/" in self.path else {"id": repository, "sha": COMMIT, "siblings": []}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.break_at, server.announced = [], None, None
    server.files = {"microsoft/msclap": {"CLAP_weights_2023.pth": WEIGHTS}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(name, tmp_path, hub=None, offline=False):
    """fetch(name) in a process of its own -> the finished process."""
    address = f"http://127.0.0.1:{hub.server_port}" if hub else "http://127.0.0.1:9"  # where no server runs
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(tmp_path),
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", FETCH, name], env=environment, capture_output=True, text=True,
                          timeout=120)  # fmt: skip


def test_a_broken_download_is_resumed_announced_and_fetched_once(hub, tmp_path):
    hub.break_at = 15_000_000
    done = run("CLAP_weights_2023.pth", tmp_path, hub)
    assert done.returncode == 0, done.stderr
    path = done.stdout.strip()
    assert open(path, "rb").read() == WEIGHTS and path.endswith("CLAP_weights_2023.pth")
    assert path.startswith(str(tmp_path))
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    address = f"http://127.0.0.1:{hub.server_port}"
    message = (
        f"downloading CLAP_weights_2023.pth from {address}/microsoft/msclap: 0.02 GB, MS-PL, sha256 {digest}, into"
    )
    assert done.stderr.startswith(f"{message} {tmp_path}")
    ranges = [asked for method, _, asked in hub.seen if method == "GET"]
    assert ranges[0] is None and len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 15_000_000  # not from the start again

    before = len(hub.seen)
    again = run("CLAP_weights_2023.pth", tmp_path, hub)
    assert (again.stdout, again.stderr, len(hub.seen)) == (done.stdout, "", before)  # not even asked for
    assert run("CLAP_weights_2023.pth", tmp_path, offline=True).stdout == done.stdout


def test_what_is_not_what_was_announced_is_thrown_away(hub, tmp_path):
    hub.announced = "0" * 64
    done = run("CLAP_weights_2023.pth", tmp_path, hub)
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr and "thrown away" in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1_000_000]


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_one_error_says_what_to_do(tmp_path, offline):
    done = run("CLAP_weights_2023.pth", tmp_path, offline=offline)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and error.startswith("FileNotFoundError: CLAP_weights_2023.pth cannot be fetched")
    for part in ("0.7 GB", "MS-PL", "https://huggingface.co/microsoft/msclap", 'load("ms-clap-2023", checkpoint=PATH)'):
        assert part in error
    assert ("HF_HUB_OFFLINE is set" in error) == offline


def test_a_pipeline_is_fetched_without_copies_of_its_weights(hub, tmp_path):
    hub.files["cvssp/audioldm-s-full-v2"] = {
        "model_index.json": b"{}", "README.md": b"a card", "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"safe" * 10, "unet/diffusion_pytorch_model.bin": b"pickled",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half", "vocoder/pytorch_model.bin": b"only a pickle",
        "tokenizer/merges.txt": b"a b",
    }  # fmt: skip
    done = run("audioldm-s-full-v2", tmp_path, hub)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "model_index.json", "tokenizer/merges.txt", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vocoder/pytorch_model.bin",
    ]  # fmt: skip
    assert "downloading audioldm-s-full-v2 from" in done.stderr and "CC BY-NC 4.0" in done.stderr
    again = run("audioldm-s-full-v2", tmp_path, hub)
    assert (again.stdout, again.stderr) == (done.stdout, "")
    assert run("audioldm-s-full-v2", tmp_path, offline=True).stdout == done.stdout


def test_a_conditioner_without_a_file_is_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "refined_ldm.published.conditioner.fetch", lambda name: asked.append(name) or tmp_path / "nothing.pth"
    )
    for name, file in (("ms-clap-2023", "CLAP_weights_2023.pth"), ("laion-clap", "630k-audioset-best.pt")):
        with pytest.raises(FileNotFoundError):
            Clap.load(name)
        assert asked.pop() == file == CONDITIONERS[name]


def test_what_only_a_person_can_download_says_where(tmp_path):
    for name, file in PUBLISHED.items():
        assert bool(file.repository) != bool(file.page)
        if file.page:
            with pytest.raises(FileNotFoundError, match=r"by hand from https://zenodo.org/records/\d+") as found:
                fetch(name)
            assert str(found.value) == how_to_get(name) and "\n" not in how_to_get(name)
    with pytest.raises(ValueError, match="nothing published is called 'CLAP'"):
        fetch("CLAP")
