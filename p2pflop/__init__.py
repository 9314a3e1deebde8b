"""p2pflop: a peer-to-peer market for compute."""
