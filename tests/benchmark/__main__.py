"""Speed and memory on this machine, beside other people's code: `make bench`, or python -m tests.benchmark --help."""

import argparse
import json
from pathlib import Path

from tests.benchmark.bench import bench, measure_more


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--no-peers", action="store_true", help="leave out other people's code for the same work")
    parser.add_argument("--sizes", action="store_true", help="cost against length, batch and width too (minutes)")
    parser.add_argument("--accuracy", action="store_true", help="what quick arithmetic and few steps change (minutes)")
    parser.add_argument(
        "--few-steps", type=int, default=0, metavar="CLIPS", help="how good few steps are (96: an hour)"
    )
    parser.add_argument(
        "--quality", type=int, default=0, metavar="N", help="right details against seconds, N captions a detail (32)"
    )
    parser.add_argument("--notebooks", action="store_true", help="the notebooks too (minutes)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write pictures and tables there")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    if options.few_steps and options.few_steps < 12:
        parser.error(f"--few-steps must be 12 clips or more, got {options.few_steps}: a distance needs a set")
    more = {"peers": not options.no_peers, "few_steps": options.few_steps, "quality": options.quality}
    say = (lambda line: None) if options.json else print
    rows = bench(options.notebooks, on_row=say)
    rows += measure_more(**more, sizes=options.sizes, accuracy=options.accuracy, out=options.out, on_row=say)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
