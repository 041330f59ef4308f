"""The app: the functions of the shell on a page in the browser, served to this machine alone.

Nothing is fetched from elsewhere and nothing is reported; what is uploaded or made is deleted when the app stops.
"""

import os
import re
import socket
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from starlette.datastructures import MutableHeaders  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from refined_ldm.audio import audio_info, is_silent_waveform, load_audio  # noqa: E402
from refined_ldm.base.integers import LARGEST_SEED, integer, real  # noqa: E402
from refined_ldm.config import Config  # noqa: E402
from refined_ldm.display.players import players  # noqa: E402
from refined_ldm.display.spectrograms import plot_waveform_mels  # noqa: E402
from refined_ldm.editing import METHODS  # noqa: E402
from refined_ldm.evaluation.description import describe  # noqa: E402
from refined_ldm.evaluation.detail_classifier import DetailClassifier  # noqa: E402
from refined_ldm.text_to_audio import RefinedAudioLDM  # noqa: E402

HOST = "127.0.0.1"
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # for the browser: ask no other server
OUTSIDE = re.compile(rb"https://[\w./-]+")
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
COMPARED = 12  # sounds at most
COLUMNS = ("at (s)", "sound", "probability", "number", "pitch", "pace", "far")  # of the table of a sound's events
CLASSIFIER = (
    "A small network finds the sounds. It learned the 32 classes of the included scenes from rendered sounds of "
    "2.56 s. Of other sounds it names the nearest of these classes."
)
PROGRESS = gr.Progress()  # as a default it makes gradio hand the page's own to a function

Made = tuple[tuple[int, np.ndarray], Figure, str]  # sample rate and 16-bit samples (N,), spectrograms, notes
Described = tuple[list[list], Figure, str]  # rows of COLUMNS, spectrogram, notes


def in_one_line(function: Callable) -> Callable:
    """Show bad input as one line on the page, as the shell does."""

    @wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as fault:
            raise gr.Error(str(fault), title="", print_exception=False) from fault

    return call


class Functions:
    """The functions of the buttons: the values of the fields -> what the page shows.

    An empty number takes the model's default, as an option that is not given does in the shell.
    """

    def __init__(self, model: RefinedAudioLDM, classifier: DetailClassifier):
        self.model, self.classifier, self.rate = model, classifier, model.config.mel.sample_rate

    @in_one_line
    def generate(self, caption: str, seconds: float | None, negative: str, seed: int, guidance: float | None,
                 steps: str, candidates: int, progress: gr.Progress = PROGRESS) -> Made:  # fmt: skip
        """Make a sound of a caption."""

        def make(**settings) -> torch.Tensor:
            return self.model.generate([caption], seconds, **settings)[0]

        return self._make(make, None, caption, negative, seed, guidance, steps, candidates, progress)

    @in_one_line
    def edit(self, sound: str, caption: str, strength: float, method: str, source: str, negative: str, seed: int,
             guidance: float | None, steps: str, candidates: int, progress: gr.Progress = PROGRESS
             ) -> Made:  # fmt: skip
        """Change a sound into one of a caption."""
        before = self._read(sound)
        make = partial(self.model.edit, before, caption, _given("strength", strength), method, source)
        title = f"changed: {caption}"
        return self._make(make, before, title, negative, seed, guidance, steps, candidates, progress)

    @in_one_line
    def inpaint(self, sound: str, caption: str, start: str, end: str, low: str, high: str, negative: str,
                seed: int, guidance: float | None, steps: str, candidates: int, progress: gr.Progress = PROGRESS
                ) -> Made:  # fmt: skip
        """Redraw a stretch of a sound, a band of frequencies, or both."""
        before, band = self._read(sound), None
        start, end = _number("from (s)", start, real(0)), _number("to (s)", end, real(0))
        low, high = _number("from (Hz)", low, real(0)), _number("to (Hz)", high, real(0))
        if low is not None or high is not None:
            band = (low or 0, self.model.config.mel.fmax if high is None else high)
        make, title = partial(self.model.inpaint, before, caption, start, end, band), f"redrawn: {caption}"
        return self._make(make, before, title, negative, seed, guidance, steps, candidates, progress)

    @in_one_line
    def extend(self, sound: str, caption: str, seconds: float, negative: str, seed: int, guidance: float | None,
               steps: str, candidates: int, progress: gr.Progress = PROGRESS) -> Made:  # fmt: skip
        """Continue a sound."""
        before = self._read(sound)
        make, title = partial(self.model.extend, before, caption, _given("seconds", seconds)), f"continued: {caption}"
        return self._make(make, before, title, negative, seed, guidance, steps, candidates, progress)

    @in_one_line
    def upsample(self, sound: str, caption: str, cutoff: str, negative: str, seed: int, guidance: float | None,
                 steps: str, candidates: int, progress: gr.Progress = PROGRESS) -> Made:  # fmt: skip
        """Draw the high frequencies that a sound lacks."""
        before, (_, rate), cutoff = self._read(sound), audio_info(sound), _number("cutoff", cutoff, real(above=0))
        cutoff = 0.45 * rate if cutoff is None and rate < self.rate else cutoff
        make, title = partial(self.model.super_resolve, before, caption, cutoff), f"upsampled: {caption}"
        return self._make(make, before, title, negative, seed, guidance, steps, candidates, progress)

    @in_one_line
    def loop(self, sound: str | None, caption: str, seconds: str, negative: str, seed: int,
             guidance: float | None, steps: str, candidates: int, progress: gr.Progress = PROGRESS
             ) -> Made:  # fmt: skip
        """Make a sound that repeats without a seam, from a sound or, without one, from the caption."""
        before, seconds = self._read(sound) if sound else None, _number("seconds", seconds, real(0.01))
        make, title = partial(self.model.loop, caption, seconds, before), f"loop: {caption}"
        return self._make(make, before, title, negative, seed, guidance, steps, candidates, progress)

    @in_one_line
    def compare(self, caption: str, seeds: str, guidances: str, seconds: float | None, negative: str,
                steps: str, progress: gr.Progress = PROGRESS) -> tuple[Figure, str, str]:  # fmt: skip
        """Make the sound of one caption with every seed (a column each) and every guidance (a row each)."""
        columns, rows = _numbers("seeds", seeds, integer(0, LARGEST_SEED)), _numbers("guidances", guidances, real())
        if (count := len(columns) * len(rows)) > COMPARED:
            raise ValueError(f"{len(columns)} seeds with {len(rows)} guidances are {count} sounds: at most {COMPARED}")
        made, notes, steps = {}, [], _number("steps", steps, integer(1))
        for guidance in rows:
            for seed in columns:
                progress((len(made), count), unit="sounds")
                made[f"seed {seed}, guidance {guidance:g}"] = self.model.generate(
                    [caption], seconds, steps, guidance, seed, negative, on_note=notes.append
                )[0].cpu()
        figure = self._draw(made, len(columns))
        return figure, players(list(made.values()), list(made), self.rate, len(columns)), _lines(notes)

    @in_one_line
    def describe_sound(self, sound: str, caption: str) -> Described:
        """What the detail classifier finds in a sound, and which words of its caption the model does not know."""
        waveform = self._read(sound, self.classifier.mel.config.sample_rate)
        rows = [[round(one.second, 2), one.name, round(one.probability, 2), one.number, one.pitch, one.pace,
                 "yes" if one.distant else ""] for one in describe(self.classifier, waveform)]  # fmt: skip
        notes = self.model.unfamiliar([caption]) if caption else []
        if not rows:
            notes.append("none of its 32 classes was found in this sound")
        return rows, self._draw({caption: waveform}), _lines(notes)

    def _make(self, make, before, title, negative, seed, guidance, steps, candidates, progress):
        """Call `make` with the settings that all functions have -> what the page shows of the sound it makes."""
        notes, own = [], self.model.config  # a setting that is the model's own is not given: a student would refuse it
        made = make(
            negative_caption=negative,
            seed=_given("seed", seed),
            guidance_scale=None if guidance == own.guidance_scale else guidance,
            steps=_number("steps", steps, integer(1)),
            candidates=None if before is None and candidates == own.candidates else _given("candidates", candidates),
            on_step=lambda done, total: progress((done, total), unit="steps"),
            on_note=notes.append,
        ).cpu()
        if is_silent_waveform(made[None]).item():
            notes.append("the sound is silent: try another seed")
        sounds = {title: made} if before is None else {"before": before, title: made}
        return (self.rate, (made * 32_767).round().short().numpy()), self._draw(sounds), _lines(notes)

    def _read(self, path: str | None, rate: int | None = None) -> torch.Tensor:
        return load_audio(_given("sound", path), rate or self.rate)

    def _draw(self, sounds: dict[str, torch.Tensor], columns: int = 2) -> Figure:
        figure = plot_waveform_mels(list(sounds.values()), list(sounds), self.model.config.mel, columns)
        plt.close(figure)  # pyplot would keep it
        return figure


def _given(name, value):
    if value is None:
        raise ValueError(f"{name} is missing: {'upload one or record it' if name == 'sound' else 'fill it in'}")
    return value


def _number(name: str, text: str, read: Callable[[str], float]) -> float | None:
    """A number in a text field, None if that is empty. Raises ValueError, naming the field."""
    try:
        return read(text) if text.strip() else None
    except ArgumentTypeError as fault:
        raise ValueError(f"{name} {fault}") from fault


def _numbers(name: str, text: str, read: Callable[[str], float]) -> list:
    """ "1, 2" -> [1, 2], each once. Raises ValueError, naming the field."""
    parts = text.replace(",", " ").split()
    if not parts:
        raise ValueError(f"{name} is empty: give numbers with commas between them")
    return list(dict.fromkeys(_number(f"each of the {name}", part, read) for part in parts))


def _lines(notes: list[str]) -> str:
    return "\n".join(dict.fromkeys(notes))


def page(functions: Functions) -> gr.Blocks:
    """The page: a tab for each thing that one does, with the fields of the command that does it in the shell."""
    config = functions.model.config
    alone = {"concurrency_id": "model", "concurrency_limit": 1}  # one sound at a time
    hidden = {"api_visibility": "private", "queue": False}
    with gr.Blocks(title="Refined Audio-LDM", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# Refined Audio-LDM\nThe model *{config.name}*. Everything stays on this machine.")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"), gr.Row():
                with gr.Column():
                    caption = gr.Textbox("a dog barks twice", label="caption")
                    seconds = gr.Number(config.seconds, label="seconds")
                    settings = _settings(config, config.candidates)
                    button = gr.Button("Generate", variant="primary")
                with gr.Column():
                    made = _made()
                    with gr.Row():
                        edit_it, describe_it = gr.Button("Edit this sound"), gr.Button("What is in this sound?")
                inputs = [caption, seconds, *settings]
                gr.on([button.click, caption.submit], functions.generate, inputs, made, api_name="generate", **alone)
            with gr.Tab("Edit", id="edit"), gr.Row():
                with gr.Column():
                    sound, text = _sound(), gr.Textbox("rain falls", label="caption of the new sound")
                    with gr.Tabs():
                        own = _edit_tabs(config)
                    common = _settings(config)
                with gr.Column():
                    edited = _made()
                for name, (start, fields) in own.items():
                    inputs = [sound, text, *fields, *common]
                    start.click(getattr(functions, name), inputs, edited, api_name=name, **alone)
            with gr.Tab("Compare", id="compare"):
                with gr.Row():
                    asked = [gr.Textbox("a bird chirps", label="caption"), gr.Textbox("0, 1, 2", label="seeds"),
                             gr.Textbox("1, 3", label="guidances"), gr.Number(config.seconds, label="seconds"),
                             gr.Textbox("", label="negative caption"), _steps(config)]  # fmt: skip
                button = gr.Button("Compare", variant="primary")
                compared = [_plot(), gr.HTML(label="sounds"), _notes()]
                button.click(functions.compare, asked, compared, api_name="compare", **alone)
            with gr.Tab("Describe", id="describe"), gr.Row():
                with gr.Column():
                    described, about = _sound(), gr.Textbox("", label="caption it was made from, if any")
                    button = gr.Button("Describe", variant="primary")
                    gr.Markdown(CLASSIFIER)
                with gr.Column():
                    found = [gr.Dataframe(headers=list(COLUMNS), label="sounds that were found", interactive=False),
                             _plot(), _notes()]  # fmt: skip
                button.click(functions.describe_sound, [described, about], found, api_name="describe", **alone)
        edit_it.click(lambda of: (gr.Tabs(selected="edit"), of), made[0], [tabs, sound], **hidden)
        describe_it.click(
            lambda of, said: (gr.Tabs(selected="describe"), of, said),
            [made[0], caption],
            [tabs, described, about],
            **hidden,
        ).then(functions.describe_sound, [described, about], found, api_visibility="private", **alone)
    return blocks


def _edit_tabs(config: Config) -> dict[str, tuple[gr.Button, list]]:
    """{function: (its button, its own fields)}"""
    own = {}
    with gr.Tab("Change"):
        fields = [gr.Slider(0, 1, 0.6, label="strength", info="0 keeps the sound, 1 only its level"),
                  gr.Radio(METHODS, value="sdedit", label="method",
                           info="inversion keeps more of the sound, and takes longer; diffedit is inversion in the "
                           "one stretch in which the captions differ"),
                  gr.Textbox("", label="caption of the sound as it is, for inversion and diffedit")]  # fmt: skip
        own["edit"] = gr.Button("Change", variant="primary"), fields
    with gr.Tab("Redraw"):
        with gr.Row():
            fields = [_optional("from (s)"), _optional("to (s)")]
        with gr.Row():
            fields += [_optional("from (Hz)"), _optional("to (Hz)")]
        own["inpaint"] = gr.Button("Redraw", variant="primary"), fields
    with gr.Tab("Continue"):
        fields = [gr.Number(config.seconds, label="seconds to add")]
        own["extend"] = gr.Button("Continue", variant="primary"), fields
    with gr.Tab("Upsample"):
        fields = [_optional("cutoff (Hz)", info="nothing is above it; empty: by the sample rate")]
        own["upsample"] = gr.Button("Upsample", variant="primary"), fields
    with gr.Tab("Loop"):
        fields = [_optional("seconds", info="of a loop from the caption alone, without a sound")]
        own["loop"] = gr.Button("Loop", variant="primary"), fields
    return own


def _settings(config: Config, count: int = 1) -> list:
    with gr.Accordion("Settings"):
        negative = gr.Textbox("", label="negative caption", info="guidance moves away from it")
        with gr.Row():
            seed, guidance = gr.Number(0, label="seed", precision=0), gr.Number(config.guidance_scale, label="guidance")
            steps = _steps(config)
        candidates = gr.Slider(
            1, max(8, count), count, step=1, label="candidates", info="the one nearest to the caption is kept"
        )
    return [negative, seed, guidance, steps, candidates]


def _steps(config: Config) -> gr.Textbox:
    return _optional("steps", placeholder=str(config.steps))


def _optional(label: str, placeholder: str = "", info: str | None = None) -> gr.Textbox:
    """A field for a number or nothing; gradio's own field for numbers shows nothing as 0."""
    return gr.Textbox("", label=label, placeholder=placeholder, info=info, max_lines=1)


def _sound() -> gr.Audio:
    return gr.Audio(sources=["upload", "microphone"], type="filepath", label="sound", buttons=["download"])


def _made() -> list:
    sound = gr.Audio(type="filepath", label="sound", interactive=False, buttons=["download"])
    return [sound, _plot(), _notes()]


def _plot() -> gr.Plot:
    return gr.Plot(show_label=False)


def _notes() -> gr.Textbox:
    return gr.Textbox("", label="notes", interactive=False)


class LocalOnly:
    """ASGI middleware: no page names another server, and a header forbids the browser to ask one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = None  # the start of a page, whose length is known when its body is

        async def send_local(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                if headers.get("content-type", "").startswith("text/html"):
                    held = message
                    return
            elif held is not None:
                message["body"] = OUTSIDE.sub(b"", message["body"])
                MutableHeaders(scope=held)["Content-Length"] = str(len(message["body"]))
                await send(held)
                held = None
            await send(message)

        await self.app(scope, receive, send_local)


def check_port(port: int) -> None:
    """Raise OSError unless the page can be served on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as fault:
            raise OSError(f"port {port} cannot be used ({fault.strerror}): give another --port") from fault


@contextmanager
def serve(model: RefinedAudioLDM, classifier: DetailClassifier, port: int) -> Iterator[str]:
    """Serve the page on a port of this machine, and to it alone -> its address, until the block ends."""
    check_port(port)
    plt.switch_backend("agg")  # drawn in threads, without a window
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page(Functions(model, classifier))
        only_here = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(LocalOnly)]
        try:
            blocks.launch(
                server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, show_error=True,
                run_history=False, footer_links=[], theme=THEME, ssr_mode=False, app_kwargs={"middleware": only_here},
            )  # fmt: skip
            yield f"http://{HOST}:{port}"
        finally:
            blocks.close(verbose=False)
