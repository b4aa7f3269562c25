"""The server that travels in a bundle: OpenAI's API, /chat and one set of metrics for every runtime.

The package runs under two names, ``edgepack.server`` here and ``edgepack_server`` on a device, and imports nothing
of edgepack outside itself.
"""
