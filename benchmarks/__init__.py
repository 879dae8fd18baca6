"""One program per claim, with its rivals in the same run."""
