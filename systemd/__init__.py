"""Units, users and folders for systemd, as package data: `importlib.resources.files("streamd.systemd")`."""
