"""What a model costs: multiply-adds and parameters, in closed form and counted; time and memory, measured and foretold.
"""
