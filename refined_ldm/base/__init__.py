"""What everything stands on: files written atomically, checks of numbers, lengths of sound files."""
