"""volseg: distributed segmentation of tomography volumes."""
