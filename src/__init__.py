"""The code of this checkout: methods that classify images without labels, and what they share."""
