"""`python -m refined_ldm …` is the same as `refined-ldm …`."""

from refined_ldm.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
