"""Units for systemd, as package data: `importlib.resources.files("streamd.systemd")`."""
