"""`fedge flash`: an official image or a card becomes a client of a federation."""
