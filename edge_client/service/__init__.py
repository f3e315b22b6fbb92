"""A client as a service of a device: its settings, when it may train, what systemd is told."""
