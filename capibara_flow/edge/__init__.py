"""The door: a thin aiohttp application that publishes turns and writes down what comes back."""
