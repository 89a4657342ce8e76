"""Images, indices, views and loaders. Nothing here knows a method, a loss or a network."""
