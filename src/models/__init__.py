"""Network architectures. Each backbone declares its feature width. This package does not depend on losses or data sets."""
