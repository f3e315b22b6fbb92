"""Raspberry Pis: cards, images and the units that run a client on them."""
