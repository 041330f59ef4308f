"""Source code, sliders that call a function, claims and expectations, shown in a cell beside plots and sounds."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from refined_ldm.display.figures import ROOT

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


def show_source(item: Callable | type) -> None:
    """Show the source of a function, a method or a class, with its file and line."""
    from IPython.display import Markdown, display

    item = inspect.unwrap(item)
    lines, first = inspect.getsourcelines(item)
    path = Path(inspect.getsourcefile(item)).resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    display(Markdown(f"`{name}`, line {first}\n```python\n{textwrap.dedent(''.join(lines)).rstrip()}\n```"))


def explore(function: Callable, **controls) -> None:
    """Show sliders and menus that call `function` anew; they start at its defaults.

    controls: (low, high) or (low, high, step) for a slider, ((low, high, step), (from, to)) for a slider of a range,
    a list for a menu, text for a field, a bool for a box.
    """
    try:
        import ipywidgets
    except ImportError:
        print("The sliders need ipywidgets (pip install ipywidgets); the plot above shows their first position.")
        return
    from IPython.display import display
    from IPython.utils.capture import capture_output

    for name, control in controls.items():
        if isinstance(control, tuple) and isinstance(control[0], tuple):
            (low, high, step), marked = control
            controls[name] = ipywidgets.FloatRangeSlider(value=marked, min=low, max=high, step=step)
    knobs, screen = ipywidgets.interactive(function, {"manual": True}, **controls).kwargs_widgets, ipywidgets.Output()

    # What `function` shows is caught here and handed to the screen as a whole. An Output used as a context asks the
    # client to answer, which now and then stops papermill and nbconvert for good (nbclient issue 312).
    def call(_=None):
        with capture_output() as shown:
            try:
                function(**{knob.description: knob.value for knob in knobs})
                plt.show()
            except ValueError as fault:
                print(fault)
        text = [{"output_type": "stream", "name": "stdout", "text": shown.stdout}] if shown.stdout else []
        rich = [{"output_type": "display_data", "data": i.data, "metadata": i.metadata} for i in shown.outputs]
        screen.outputs = text + rich

    for knob in knobs:
        knob.style, knob.layout.width = {"description_width": "120px"}, "420px"
        if hasattr(knob, "continuous_update"):
            knob.continuous_update = False  # once the slider is let go
        knob.observe(call, "value")
    plt.show()  # what the cell has drawn so far stays outside
    call()
    display(ipywidgets.VBox([*knobs, screen]))


def report_unless(holds: bool, expected: str) -> None:
    """Print which expectation a measurement did not meet in this run, unless it holds; the notebook goes on."""
    if not holds:
        print(f"NOT in this run: {expected}. The model is weak, or too little was measured")


def claims_table(ledger: Sequence[dict]) -> "Styler":
    """Each claim of `ledger.read_ledger` with its verdict and evidence -> a pandas table that wraps its text."""
    import pandas as pd

    rows = [{"claimed": claim["words"], "verdict": claim["verdict"], "found": claim["found"],
             "evidence": "\n".join(f"{of['what']}: {of['is']}" for of in claim.get("evidence", ()))}
            for claim in ledger]  # fmt: skip
    wrapped = {"white-space": "pre-wrap", "text-align": "left", "max-width": "32em", "vertical-align": "top"}
    return pd.DataFrame(rows).style.set_properties(**wrapped).hide(axis="index")
