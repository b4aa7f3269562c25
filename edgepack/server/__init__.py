"""The server that travels in a bundle: OpenAI's API, /chat and one set of metrics for every runtime.

The package runs under two names, ``edgepack.server`` here and ``edgepack_server`` on a device, and imports nothing
of edgepack outside itself.
"""

VERSION = "0.1.0"
"""edgepack's own version; a device has this package only, so it is repeated here."""
