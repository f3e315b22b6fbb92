"""The programs that a card brings along: they take over its folder, and enrol the device. Standard library alone."""
