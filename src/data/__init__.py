"""Images, indices, views and loaders. This package does not depend on methods, losses or networks."""
