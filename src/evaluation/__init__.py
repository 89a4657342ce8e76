"""Protocols: which features, which split, which numbers. How the network was trained does not matter here."""
