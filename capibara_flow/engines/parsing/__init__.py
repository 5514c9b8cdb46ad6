"""Files become text: one parser a format, each run in a process of its own that may be slow, hungry or die at a hostile file."""
