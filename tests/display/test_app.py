"""The app is started, used through its API and stopped; it asks no other machine for anything."""

import os
import socket
import sys
import urllib.error
import urllib.request

import pytest
import soundfile
import torch

from refined_ldm import display
from refined_ldm.audio import save_audio
from refined_ldm.cli import app as command
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import small
from tests.support.shell import run

if "CI" not in os.environ:
    pytest.importorskip("gradio", reason="gradio is not here: pip install 'refined-audio-ldm[app]'")
from gradio_client import Client, handle_file  # noqa: E402

from refined_ldm.display import app  # noqa: E402

SETTINGS = {"negative": "", "seed": 7, "guidance": 2, "steps": "2", "candidates": 1}


def free_port() -> int:
    with socket.socket() as free:
        free.bind((app.HOST, 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def served():
    """(address, model, client, hosts that were asked) of an app with a small model."""
    asked, connect = set(), socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:

        def noted(self, address):
            asked.add(address[0] if isinstance(address, tuple) else "local")
            return connect(self, address)

        patch.setattr(socket.socket, "connect", noted)
        model = small.loud_model(patch)
        with app.serve(model, DetailClassifier.load(), free_port()) as address:
            yield address, model, Client(address, verbose=False), asked


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = save_audio(tmp_path_factory.mktemp("sounds") / "sound.wav", small.clips(1)[0]["waveform"])
    return handle_file(str(path))


def test_a_sound_made_through_the_api_is_that_of_the_model(served):
    _, model, client, asked = served
    file, picture, notes = client.predict("rain", 0.3, **SETTINGS, api_name="/generate")
    samples, rate = soundfile.read(file, dtype="int16")
    made = model.generate(["rain"], 0.3, 2, 2, 7)[0]
    assert rate == 16_000 and torch.equal(torch.from_numpy(samples), (made * 32_767).round().short())
    assert picture["plot"].startswith("data:image/") and notes == ""
    assert asked and asked <= {app.HOST, "localhost", "local"}


def test_settings_that_stay_as_they_are_shown_are_the_model_s_own(served, monkeypatch):
    _, model, client, _ = served
    given, generate = {}, model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **how: given.update(how) or generate(*args, **how))
    own = model.config
    shown = SETTINGS | {"guidance": own.guidance_scale, "steps": "", "candidates": own.candidates}
    client.predict("rain", 0.3, **shown, api_name="/generate")
    assert given["guidance_scale"] is given["steps"] is given["candidates"] is None
    client.predict("rain", 0.3, **SETTINGS | {"candidates": own.candidates + 1}, api_name="/generate")
    assert (given["guidance_scale"], given["steps"], given["candidates"]) == (2, 2, own.candidates + 1)


@pytest.mark.parametrize("name, arguments, samples", [
    ("edit", ["rain", 0.6, "sdedit", ""], 5120), ("edit", ["rain", 0.6, "inversion", "wind"], 5120),
    ("edit", ["rain", 0.6, "diffedit", "wind"], 5120),
    ("inpaint", ["rain", "0.1", "", "", ""], 5120), ("inpaint", ["rain", "", "", "2000", ""], 5120),
    ("extend", ["rain", 0.1], 6720), ("upsample", ["rain", "4000"], 5120), ("loop", ["rain", ""], 5120),
])  # fmt: skip
def test_every_edit_of_the_shell_is_there(served, sound, name, arguments, samples):
    file, picture, _ = served[2].predict(sound, *arguments, **SETTINGS, api_name=f"/{name}")
    assert soundfile.info(file).frames == samples and picture["plot"].startswith("data:image/")


def test_seeds_and_guidances_are_side_by_side_and_the_classifier_answers(served, sound):
    client = served[2]
    picture, sounds, _ = client.predict("rain", "0, 1", "1, 3", 0.3, "", "1", api_name="/compare")
    assert picture["plot"].startswith("data:image/") and sounds.count("<audio") == 4 and "seed 1, guidance 3" in sounds
    table, picture, _ = client.predict(sound, "", api_name="/describe")
    assert table["headers"] == list(app.COLUMNS) and picture["plot"].startswith("data:image/")


@pytest.mark.parametrize("name, arguments, message", [
    ("generate", {"caption": "rain", "seconds": 500}, "seconds must be between 0.01 and 120"),
    ("generate", {"caption": "rain", "seconds": 0.3, "seed": -1}, "seed must be"),
    ("generate", {"caption": "rain", "seconds": 0.3, "steps": "few"}, "steps must be a whole number"),
    ("edit", {"sound": None, "caption": "rain"}, "sound is missing: upload one or record it"),
    ("inpaint", {"caption": "rain"}, "say what to redraw"),
    ("inpaint", {"caption": "rain", "start": "5"}, "start and end must lie within the sound"),
    ("upsample", {"caption": "rain"}, "give the cutoff"),
    ("extend", {"caption": "rain", "seconds": 0}, "must be above 0"),
    ("compare", {"caption": "rain", "seeds": "a"}, "each of the seeds must be a whole number"),
    ("compare", {"caption": "rain", "seeds": ""}, "seeds is empty"),
    ("compare", {"caption": "rain", "seeds": "1 2 3 4 5", "guidances": "1 2 3"}, "15 sounds: at most 12"),
])  # fmt: skip
def test_bad_input_is_one_line(served, sound, name, arguments, message):
    given = {} if name in ("generate", "compare") else {"sound": sound}
    with pytest.raises(Exception, match=message) as refused:
        served[2].predict(**given | arguments, api_name=f"/{name}")
    assert "\n" not in str(refused.value)


def test_the_page_names_no_other_server_and_answers_to_no_other_name(served):
    with urllib.request.urlopen(served[0]) as answer:
        page = answer.read().decode()
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert "gradio_config" in page and "https://" not in page
    other = urllib.request.Request(served[0], headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(other)


def test_the_command_serves_until_it_is_stopped(tmp_path, monkeypatch, capsys):
    small.use_small_clap(monkeypatch)
    RefinedAudioLDM(small.config()).save(tmp_path / "run")
    port = free_port()

    class Stop:
        def wait(self):
            assert urllib.request.urlopen(f"http://{app.HOST}:{port}").status == 200
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "Event", Stop)
    options = ["--checkpoint", tmp_path / "run", "--port", port, "--no-browser", "--device", "cpu"]
    status, printed, errors = run(capsys, "app", *options)
    assert status == 130 and printed == [f"http://{app.HOST}:{port} (Ctrl+C stops it)"]
    assert [line for line in errors if line] == ["refined-ldm app: stopped"]
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{app.HOST}:{port}")


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server((app.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        status, _, errors = run(capsys, "app", "--port", port)
    assert status == 2 and len(errors) == 1 and f"port {port} cannot be used" in errors[0]


def test_a_missing_gradio_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "refined_ldm.display.app")
    monkeypatch.delattr(display, "app")
    status, _, errors = run(capsys, "app")
    assert status == 2 and len(errors) == 1 and "pip install 'refined-audio-ldm[app]'" in errors[0]
