"""Vision transformers with a plan: layers, the whole model, its names, and checkpoints taken into it."""
