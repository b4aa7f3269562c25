"""edgepack: from a language model to a signed bundle that provably runs on a given edge device."""

__version__ = "0.1.0"
