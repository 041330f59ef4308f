"""The command `data`: what is in a data set, before it is trained on."""

import json
import sys
import warnings
from argparse import Namespace

from refined_ldm.cli.sounds import write_picture


def data(options: Namespace) -> None:
    """Print what a data set holds, and what of it cannot be used and why."""
    from tqdm import tqdm

    from refined_ldm.base.files import check_folder
    from refined_ldm.data.report import report_data
    from refined_ldm.data.sources import open_recordings

    if options.picture:
        from refined_ldm.display import plot_data_report

        if options.picture.suffix.lower() != ".png":
            raise ValueError(f"--picture writes a PNG file, got {options.picture}")
        check_folder(options.picture.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report lists what is left out
        dataset = open_recordings(
            options.root,
            options.split,
            options.seconds,
            file=options.file_column,
            caption=options.caption_column,
            skip_bad=True,
        )
    with tqdm(total=len(dataset), unit="clip", disable=None) as bar:
        report = report_data(dataset, lambda *_: bar.update())
    if options.picture:
        print(write_picture(plot_data_report(report), options.picture), file=sys.stderr)
    print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) if options.json else report.table())
