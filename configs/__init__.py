"""Ready configurations and the demo's clip, as package data: `importlib.resources.files("streamd.configs")`."""
