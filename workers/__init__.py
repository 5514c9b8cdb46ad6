"""The workers: each takes one command of the map and says what comes of it."""
