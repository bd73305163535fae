"""Everything that touches stored bytes: Zarr volumes, OME metadata, importers, the ledger."""
