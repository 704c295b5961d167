"""What a model costs: multiply-adds and parameters, computed and counted; time and memory, measured and foretold."""
