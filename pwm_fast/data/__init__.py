"""Where training data lives: `episodes` is the store (written, opened, sampled); the other files are its parts and
the ways into it."""
