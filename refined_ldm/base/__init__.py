"""The ground of the package: files written atomically, plain YAML, checks of numbers, lengths of sound files."""
