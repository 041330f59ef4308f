"""Use the app in headless Chromium as a person would, and write a picture of each tab to docs/images.

`python docs/screenshots.py`; ends with an error if the page asks any other server for anything.
"""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import websocket  # of JupyterLab's dependencies

from refined_ldm.base.files import atomic_write
from refined_ldm.display.app import HOST, serve
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.text_to_audio import RefinedAudioLDM

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT, STEPS = 1100, 940, 15
FIND = """
const seen = e => e.offsetParent !== null;
const all = (selector, text) => [...document.querySelectorAll(selector)].filter(
    e => seen(e) && (text === undefined || e.textContent.trim().startsWith(text)));
const click = (selector, text) => all(selector, text).at(-1).click();
const fill = (label, value) => {
    const field = all('label', label).at(-1).querySelector('input, textarea');
    field.value = value;
    field.dispatchEvent(new Event('input', {bubbles: true}));
    field.dispatchEvent(new Event('blur', {bubbles: true}));
};
"""
PICTURE = "all('[data-testid=matplotlib] img, .plot img, img').filter(e => e.naturalWidth > 300).length"


class Browser:
    """Headless Chromium, by its DevTools protocol; `asked` are the addresses that its page asked for."""

    def __init__(self, folder: str):
        command = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                    "--remote-allow-origins=*", f"--user-data-dir={folder}"]  # fmt: skip
        self.process = subprocess.Popen([command, *switches, "about:blank"], stderr=subprocess.DEVNULL)
        port_file = Path(folder) / "DevToolsActivePort"
        while not port_file.is_file() or not port_file.read_text():
            time.sleep(0.2)
        port = int(port_file.read_text().split()[0])
        self.count, self.asked = 0, []
        with urlopen(f"http://{HOST}:{port}/json") as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=600)
        self.send("Network.enable")
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def send(self, method: str, **parameters) -> dict:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            if message.get("id") == self.count:
                return message["result"]

    def run(self, script: str):
        found = self.send("Runtime.evaluate", expression=f"(() => {{ {FIND} {script} }})()", returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']['exception']['description']}")
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"the page never had: {condition}")
            time.sleep(0.5)

    def shoot(self, name: str) -> None:
        time.sleep(2)  # waveforms are drawn
        picture = self.send("Page.captureScreenshot", format="png")["data"]
        with atomic_write(IMAGES / f"{name}.png") as temporary:
            temporary.write_bytes(base64.b64decode(picture))
        print(IMAGES / f"{name}.png", flush=True)


def use(browser: Browser, address: str) -> None:
    """Generate a sound, redraw a part of it, describe it and compare seeds; a picture of each."""
    browser.send("Page.navigate", url=address)
    browser.wait("all('button.primary', 'Generate').length", 300)
    browser.run("click('button.primary', 'Generate')")
    browser.wait(PICTURE)
    browser.shoot("app_generate")
    browser.run("click('button', 'Edit this sound')")
    browser.wait("all('button', 'Redraw').length")
    browser.run("click('button', 'Redraw')")
    browser.wait("all('label', 'from (s)').length")
    browser.run("fill('caption of the new sound', 'a dog barks, then a bird chirps'); fill('from (s)', '0.9')")
    browser.run(f"fill('steps', '{STEPS}'); click('button.primary', 'Redraw')")
    browser.wait(PICTURE)
    browser.shoot("app_edit")
    browser.run("click('button', 'Generate')")
    browser.wait("all('button', 'What is in this sound').length")
    browser.run("click('button', 'What is in this sound')")
    browser.wait(f"all('button.primary', 'Describe').length && {PICTURE} && all('td').length > 2")
    browser.shoot("app_describe")
    browser.run("click('button', 'Compare')")
    browser.wait("all('button.primary', 'Compare').length")
    browser.run(f"fill('steps', '{STEPS}'); click('button.primary', 'Compare')")
    browser.wait(f"{PICTURE} && all('audio').length == 6")
    browser.shoot("app_compare")


def main() -> None:
    """Start the app and the browser, use it, and stop both."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with (
        serve(RefinedAudioLDM.from_preset("tiny"), DetailClassifier.load(), port) as address,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        browser = Browser(folder)
        try:
            use(browser, address)
        finally:
            browser.process.terminate()
            browser.process.wait()
    outside = [url for url in browser.asked if not url.startswith((f"{address}/", "data:", "blob:", "about:"))]
    print(f"{len(browser.asked)} requests, {len(outside)} to other servers")
    if outside:
        raise SystemExit(f"the page asked other servers: {', '.join(outside)}")


if __name__ == "__main__":
    main()
