"""Content-addressed blobs: manifests, the local store, and fetching from peers."""
