"""The `volseg` command: thin over the Python interface, one module a concern."""
