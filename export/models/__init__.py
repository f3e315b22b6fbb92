"""Ready example models: factories to export as they are, or to start from."""
