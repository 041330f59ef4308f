"""Commands run in this process."""

from refined_ldm.cli import commands as cli


def run(capsys, *arguments):
    """-> (exit status, lines of stdout, lines of stderr)"""
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()
