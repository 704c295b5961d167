"""What the commands do, as functions: of a model in memory and anybody's images, with results that show themselves."""
