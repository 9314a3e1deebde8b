"""tinygrad's side of the house: tracing, lowering, running, and the sandbox around it."""
