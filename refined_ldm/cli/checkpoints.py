"""The commands for published files: `inspect` and `convert`."""

import json
from argparse import Namespace


def inspect(options: Namespace) -> None:
    """Print what a checkpoint, pipeline or run holds; ValueError if a file asks to run something."""
    from dataclasses import asdict

    from refined_ldm.published.checkpoints import inspect_checkpoint

    found = inspect_checkpoint(options.checkpoint)
    if options.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        for file in (found, *found.files):
            print("\n".join(_lines(file)), end="\n\n" if found.files else "\n")
    refused = [file for file in (found, *found.files) if file.forbidden]
    if refused:
        raise ValueError("; ".join(f"{f.path} was refused: it asks to run {', '.join(f.forbidden)}" for f in refused))


def _lines(file):
    """The contents of a file, as lines of a table."""
    yield f"{file.path}: {file.kind}, {file.bytes / 1e6:,.1f} MB"
    if file.sha256:
        yield f"sha256 {file.sha256}" + (f", tensors under {file.wrapper!r}" if file.wrapper else "")
    width = max((len(group.prefix) for group in file.groups), default=0)
    for g in file.groups:
        yield (
            f"  {g.prefix:{width}} {g.tensors:6,} tensors {g.parameters:14,} numbers {g.bytes / 1e6:10,.1f} MB  "
            f"{', '.join(g.dtypes)}"
        )
    yield from (f"{what}: {call}" for what, call in (("Python", file.python), ("shell", file.command)) if call)


def convert(options: Namespace) -> None:
    """Write a published file as safetensors."""
    from refined_ldm.published.checkpoints import convert_checkpoint

    print(convert_checkpoint(options.checkpoint, options.out, options.force, options.tokenizer))
