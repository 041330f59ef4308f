"""What everything stands on: files written atomically, plain YAML, checks of numbers, lengths of sound files."""
