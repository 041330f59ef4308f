"""`refined-ldm app`: a page in the browser. Heavy imports are inside the function."""

import webbrowser
from argparse import Namespace
from threading import Event

from refined_ldm.cli.sounds import open_model, optimized


def app(options: Namespace) -> None:
    """Serve the page until Ctrl+C."""
    from refined_ldm.devices import pick_device

    try:
        from refined_ldm.display import app as page
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("refined_ldm"):
            raise
        raise ModuleNotFoundError(
            f"{missing.name} is not installed, which this needs: pip install 'refined-audio-ldm[app]'"
        ) from missing
    from refined_ldm.evaluation.detail_classifier import DetailClassifier

    page.check_port(options.port)
    model = optimized(open_model(options, pick_device(options.device)), options)
    with page.serve(model, DetailClassifier.load(), options.port) as address:
        print(f"{address} (Ctrl+C stops it)", flush=True)
        if not options.no_browser:
            webbrowser.open(address)
        Event().wait()
