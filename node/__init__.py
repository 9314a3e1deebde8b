"""The daemon behind ``p2pflop node``: one trio process that never imports tinygrad."""
