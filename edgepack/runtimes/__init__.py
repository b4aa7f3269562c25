"""The runtimes edgepack plans for: each is one module of constants and arithmetic."""
